"""Every combination of quantization rules that a built-in profile states, made by our quantizer for real."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compressor.errors import StageError
from compressor.models.onnx_facts import describe_model
from compressor.models.onnx_graph import read_model
from compressor.profile import QuantizationRules, load_profile, profile_names
from compressor.quantize.ptq import quantize
from compressor.quantize.variants import Variant, variants
from compressor.recipe import QuantizeStage
from compressor.types import Artifact, Inputs
from tools.operator_groups import OPSET, samples, write_group

RACE = "auto"  # hands each candidate to other targets, whose rules stand for themselves


@dataclass(frozen=True)
class Combination:
    """Rules of the profiles of one target; ``profile`` is the first of them."""

    target: str
    profile: str
    rules: QuantizationRules

    def __str__(self) -> str:
        return f"{self.target} ({describe(self.rules)})"


def describe(rules: QuantizationRules) -> str:
    """The rules in a few words."""
    if not rules.int8:
        return "no int8"
    words = [f"{rules.activation} {'symmetric' if rules.symmetric_activation else 'asymmetric'}"]
    words.append(f"{rules.weight} per {'channel' if rules.per_channel else 'tensor'}")
    told = {
        "float bias": not rules.quantize_bias,
        "weighted only": rules.weighted_only,
        "integers only": rules.integer_only,
        "static only": not rules.dynamic,
        "seven bits": rules.reduce_range,
        "also by the target": rules.by_target,
        f"opset {rules.opset}": rules.opset is not None,
    }
    return ", ".join([*words, *(word for word, said in told.items() if said)])


def combinations() -> tuple[Combination, ...]:
    """The distinct ones, in the order of the profiles' names; profiles of this machine first."""
    profiles = sorted((load_profile(name) for name in profile_names()), key=lambda item: item.here != "this-machine")
    found: dict[tuple[str, str], Combination] = {}
    for profile in profiles:
        if profile.target != RACE:
            made = Combination(profile.target, profile.name, profile.quantization)
            found.setdefault((made.target, made.rules.model_dump_json()), made)
    return tuple(sorted(found.values(), key=str))


def calibration(net: str) -> Iterator[Inputs]:
    """One batch of 16 random inputs."""
    return iter([samples(net, 16, seed=1)])


def emitted(net: str, rules: QuantizationRules, folder: Path, kind: str = "static") -> Artifact:
    """``net`` (a group or small net) as the first int8 file of ``kind`` that we would make for a target of ``rules``.

    Raises :class:`compressor.errors.StageError` when there is none, or the lint refuses it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = write_group(net, folder / "float.onnx", max(OPSET, rules.opset or 0))
    model = read_model(source.path)
    stage = QuantizeStage(kind="quantize", engines=("onnxruntime",), corrections=())
    chosen, refused = variants(stage, rules, describe_model(model, source.path.stat().st_size))
    variant = next((item for item in chosen if item.kind == kind), None)
    if variant is None:
        raise StageError(f"there is no {kind} int8 form of `{net}`: {'; '.join(refused.values())}")
    return quantize(source, variant, rules, lambda: calibration(net), folder / "int8.onnx")


__all__ = ["Combination", "Variant", "calibration", "combinations", "describe", "emitted"]
