"""Every combination of quantization rules that a built-in profile states, made by our quantizer for real."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from onnx import ModelProto

from compressor.errors import CompileError, Problem, StageError
from compressor.models.onnx_facts import describe_model
from compressor.models.onnx_graph import read_model, save_model
from compressor.profile import HardwareProfile, QuantizationRules, load_profile, profile_names
from compressor.quantize.checks.lint import lint
from compressor.quantize.ptq import quantize
from compressor.quantize.variants import variants
from compressor.recipe import QuantizeStage
from compressor.types import Artifact, Inputs, file_digest
from targets import registry
from targets.base import Compiled
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
        "whole graph": rules.whole_graph,
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


@dataclass(frozen=True)
class Break:
    """A file that goes against one rule: ``net`` as it is made by looser rules, then changed by ``edit``."""

    name: str
    net: str
    looser: QuantizationRules
    kind: str = "static"
    edit: Callable[[ModelProto], None] | None = None


def breaks(rules: QuantizationRules) -> tuple[Break, ...]:
    """Every rule that ``rules`` state, broken alone (as far as files can be made so)."""
    wide = "int16" if rules.activation.startswith("int") else "uint16"
    other = "uint8" if rules.activation == "int8" else "int8"
    unsigned = {"activation": "uint8", "weight": "uint8", "symmetric_activation": False}
    found = [
        (True, "16-bit activations", "cnn", {"activation": wide}),
        (other != rules.weight, f"{other} activations", "cnn", {**unsigned, "activation": other, "weight": "int8"}),
        (rules.symmetric_activation, "asymmetric activations", "cnn", {"symmetric_activation": False}),
        (rules.weight == "int8", "uint8 weights", "cnn", unsigned),
        (rules.weight == "uint8", "int8 weights", "cnn", {"weight": "int8"}),
        (not rules.per_channel, "weights per channel", "cnn", {"per_channel": True}),
        (not rules.quantize_bias, "int32 bias pairs", "cnn", {"quantize_bias": True}),
        (rules.opset is not None, f"opset {OPSET}", "transformer", {"opset": None, "whole_graph": False}),
        (not rules.dynamic, "quantized at run time", "transformer", {**unsigned, "weight": "int8", "dynamic": True}),
        (rules.reduce_range, "eight-bit weights", "cnn", {"reduce_range": False}),
    ]
    made = [
        Break(name, net, rules.model_copy(update=change), "dynamic" if change.get("dynamic") else "static")
        for stated, name, net, change in found
        if stated
    ]
    if rules.weighted_only:
        whole = rules.model_copy(update={"weighted_only": False, "whole_graph": True})
        made.append(Break("stored scalars", "transformer", whole, edit=_vectors_to_scalars))
    return tuple(made)


def _vectors_to_scalars(model: ModelProto) -> None:
    read = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for tensor in model.graph.initializer:
        if tensor.name in read and list(tensor.dims) == [1]:
            del tensor.dims[:]


def broken(case: Break, rules: QuantizationRules, folder: Path) -> tuple[Artifact, tuple[Problem, ...]]:
    """The file of ``case``, and what the lint says of it by the target's own ``rules``."""
    artifact = emitted(case.net, case.looser, folder, case.kind)
    model = read_model(artifact.path)
    if case.edit is not None:
        case.edit(model)
        save_model(model, artifact.path)
        artifact = replace(artifact, digest=file_digest(artifact.path))
    return artifact, lint(model, rules)


def unchecked(target: str, artifact: Artifact, profile: HardwareProfile, out: Path) -> Compiled:
    """What the compiler itself makes of a file, without the lint that stands before it.

    Raises :class:`compressor.errors.CompileError` when the compiler refuses.
    """
    backend = registry.get(target)
    if target != "tensorrt":
        return backend.compile(artifact, profile, out)
    from targets.backends.tensorrt import backend as tensorrt

    with mock.patch.object(tensorrt.lint, "problems", return_value=()):
        return backend.compile(artifact, profile, out)


REFUSES, LEAVES, FLOATS, TAKES = "refuses", "leaves it to the CPU", "runs it in float", "takes it"


def consequence(
    target: str, artifact: Artifact, said: Sequence[Problem], profile: HardwareProfile, least: int, out: Path
) -> tuple[str, str]:
    """What the compiler does with a file that the lint has something to say of, and its own words.

    ``least``: how many products of a file by the rules run quantized on this target.
    """
    try:
        compiled = unchecked(target, artifact, profile, out)
    except CompileError as error:
        return REFUSES, str(error)
    named = {problem.where.strip("`") for problem in said}
    ends = ("QuantizeLinear ", "DequantizeLinear ")  # of the graph: some targets leave these to the CPU in any file
    left = [item for item in compiled.fallback if item.split(" ", 1)[-1] in named and not item.startswith(ends)]
    if compiled.placed == 0 or left:
        return LEAVES, ", ".join(left[:2])
    if compiled.coverage is not None and compiled.coverage.quantized < least:
        return FLOATS, f"{compiled.coverage.quantized} of {least} products run quantized"
    return TAKES, ""
