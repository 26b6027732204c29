"""The fake quantization of a distil stage: put into the student before its first step, kept in its record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.distil.objectives.base import ChangesStudent
from compressor.distil.stream import TrainingSet
from compressor.distil.terms import made
from compressor.errors import Problem, StageError
from compressor.models import fakequant
from compressor.models.fakequant import KINDS, Scheme
from compressor.models.placement import Traffic, fold_norms, traffic_of
from compressor.models.sparse import masked
from compressor.models.structure.surgery import FORWARD_ERRORS
from compressor.models.structure.trace import evaluating, run
from compressor.profile import QuantizationRules
from compressor.qat import Qat
from compressor.recipe import DistilStage
from compressor.types import LayerFact

STAGE = "qat"
BATCH = 32  # samples at once while the first ranges are found
Reach = dict[str, tuple[tuple[float, float], tuple[float, float]]]  # layer -> (lowest, highest) read, and given


@dataclass
class Rounding:
    """What fake quantization made of one student."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    facts: list[LayerFact] = field(default_factory=list)


def install(
    student: nn.Module,
    config: Qat,
    rules: QuantizationRules,
    example: Mapping[str, Tensor],
    batches: Callable[[], Iterable[Mapping[str, Tensor]]],
) -> Rounding:
    """Fold batch norms, find the ranges on ``batches``, and let the layers of ``student`` round from now on, in place.

    Raises:
        StageError: nothing can be quantized, or the student's zeros would not stay zero.
    """
    if config.method == "dlt" and any(True for _ in masked(student)):
        raise StageError("`dlt` shifts weights, and the student has zeros to keep", hint='Take `quantizer = "twn"`.')
    found = Rounding(fold_norms(student, example))
    traffic = traffic_of(student, example)
    chosen, left = choose(student, config, traffic)
    if not chosen:
        raise StageError("`qat` finds no layer to quantize", hint="; ".join(sorted(set(left.values()))))
    reach = _reach(student, chosen, batches())
    owners: dict[str, str] = {}  # who reads a tensor first -> the layer that has its range
    for name in chosen:
        owner = owners.setdefault(traffic.first[name], name)
        scheme = scheme_for(name, student.get_submodule(name), config, rules, traffic, reach)
        scheme = replace(scheme, source=owner if scheme.activation_bits and owner != name else "")
        fakequant.start(fakequant.change(student, name, scheme), *reach[name])
        found.steps.append(fakequant.step_of(name, scheme))
        found.facts.append(_fact(name, scheme, config))
    found.facts += [LayerFact(STAGE, name, "left-float", "float32", "float32", why) for name, why in left.items()]
    return found


def calibration(
    data: TrainingSet, samples: int, place: Callable[[dict[str, Any]], dict[str, Tensor]]
) -> Iterator[dict[str, Tensor]]:
    """Model inputs of the first samples of a set, a small batch at a time."""
    count = min(samples, len(data))
    for start in range(0, count, BATCH):
        yield place(data.batch(np.arange(start, min(start + BATCH, count))))


def choose(student: nn.Module, config: Qat, traffic: Traffic) -> tuple[list[str], dict[str, str]]:
    """Names of the layers that will round, and why the others with weights will not."""
    uses: dict[int, int] = {}
    for part in student.modules():
        for parameter in part.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    chosen: list[str] = []
    left: dict[str, str] = {}
    for name, part in student.named_modules():
        weight = getattr(part, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() < 2:
            continue
        why = _why_not(name, part, config, traffic, tied=uses[id(weight)] > 1)
        if why:
            left[name] = why
        else:
            chosen.append(name)
    return chosen, left


def _why_not(name: str, part: nn.Module, config: Qat, traffic: Traffic, *, tied: bool) -> str:
    pattern = next((item for item in config.protect if matches(name, item)), None)
    if pattern is not None:
        return f"protected by `{pattern}`"
    if isinstance(part, nn.Embedding):
        return "embedding tables stay float in this training"
    if type(part) not in KINDS:
        return f"a {type(part).__name__} has no fake-quantized form here"
    if tied:
        return "its weight is used twice (tied)"
    return "" if name in traffic.first else "it does not run on the example"


def matches(name: str, pattern: str) -> bool:
    """Does a pattern mean this module or one around it?"""
    parents = [name[:end] for end, letter in enumerate(name) if letter == "."]
    return any(fnmatchcase(part, pattern) for part in (name, *parents))


def scheme_for(
    name: str,
    layer: Any,
    config: Qat,
    rules: QuantizationRules,
    traffic: Traffic,
    reach: Reach,
) -> Scheme:
    """How one layer rounds under the target's rules."""
    whole = any(matches(name, pattern) for pattern in config.int8)
    precision = "int8" if whole else config.weights
    linear = isinstance(layer, nn.Linear)
    per = "channel" if rules.per_channel else "tensor"
    if config.group is not None and linear and layer.weight.shape[1] % config.group == 0 and rules.per_channel:
        per = str(config.group)
    bits = 0 if config.activations == "float" else 16 if rules.activation.endswith("16") else 8
    exposed = bool(bits) and not linear and name in traffic.exposed and not rules.weighted_only
    return Scheme(
        precision=precision,
        method="lsq" if precision != config.weights else config.method,
        per=per,
        reduced=rules.reduce_range,
        activation_bits=bits,
        symmetric=rules.symmetric_activation,
        positive=reach[name][0][0] >= 0,
        output="" if not exposed else "positive" if reach[name][1][0] >= 0 else "both",
        # a linear layer that reads more than rows is exported as MatMul and Add, whose bias is no int32
        bias=bool(bits) and rules.quantize_bias and layer.bias is not None and (not linear or traffic.dims[name] == 2),
    )


def _reach(student: nn.Module, chosen: list[str], batches: Iterable[Mapping[str, Tensor]]) -> Reach:
    """Lowest and highest value that every layer reads and gives."""
    reads, gives = Reaches(), Reaches()
    with evaluating(student), _watching(student, chosen, reads, gives):
        for batch in batches:
            run(student, batch)
    missing = next((name for name in chosen if name not in reads.found), None)
    if missing is not None:
        raise StageError(f"`{missing}` read nothing on the calibration data", hint="Raise `data.calibration`.")
    return {name: (reads.found[name], gives.found[name]) for name in chosen}


class Reaches:
    """Running minima and maxima by name."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, float]] = {}

    def add(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor):
            return
        low, high = (float(end) for end in torch.aminmax(value.detach()))
        known = self.found.get(name, (low, high))
        self.found[name] = (min(known[0], low), max(known[1], high))


@contextmanager
def _watching(student: nn.Module, chosen: list[str], reads: Reaches, gives: Reaches) -> Iterator[None]:
    handles = []
    for name in chosen:
        part = student.get_submodule(name)
        handles.append(part.register_forward_pre_hook(lambda _layer, args, name=name: reads.add(name, args[0])))
        handles.append(part.register_forward_hook(lambda _layer, _args, output, name=name: gives.add(name, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fact(name: str, scheme: Scheme, config: Qat) -> LayerFact:
    per = {"channel": "per output channel", "tensor": "per tensor"}.get(scheme.per, f"per {scheme.per} inputs")
    reads = f", {scheme.activation_bits}-bit activations" if scheme.activation_bits else ", float activations"
    why = f"{scheme.method}, a scale {per}, trained with straight-through gradients"
    if config.group is not None and not scheme.per.isdigit():
        why += f"; groups of {config.group} do not divide its inputs, or it is no linear layer"
    return LayerFact(STAGE, name, "rounded", "float32", f"{scheme.precision} weights{reads}", why)


def problems(stage: DistilStage, where: str, module: nn.Module, example: Mapping[str, Tensor]) -> list[Problem]:
    """What keeps fake quantization from being put into the student, seen on the teacher."""
    config = stage.qat
    if config is None:
        return []
    found = []
    names = [name for name, _ in module.named_modules() if name]
    for key in ("int8", "protect"):
        found += [
            Problem(f"{where}.qat.{key}.{number}", f"`{pattern}` matches no module")
            for number, pattern in enumerate(getattr(config, key))
            if not any(matches(name, pattern) for name in names)
        ]
    for number, item in enumerate(stage.objective):
        if isinstance(made(item), ChangesStudent):
            text = f"`{item.use}` puts a part into the student: give it a distil stage of its own, before this one"
            found.append(Problem(f"{where}.objective.{number}.use", text))
    try:
        chosen, left = choose(module, config, traffic_of(module, example))
    except FORWARD_ERRORS as error:
        text = f"the model cannot be followed on its example input: {type(error).__name__}: {error}"
        return [*found, Problem(f"{where}.qat", text)]
    if not chosen:
        reasons = "; ".join(sorted(set(left.values()))) or "the model has no linear layer and no convolution"
        found.append(Problem(f"{where}.qat", f"matches nothing: {reasons}"))
    return found
