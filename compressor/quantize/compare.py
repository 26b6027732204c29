"""Where two files of one model part: signal-to-noise layer by layer, the first bad layer, the worst samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto

from compressor.errors import StageError
from compressor.quantize.watch import LOUDEST_DB, Noise, watch
from compressor.types import Array, Inputs

BAD_DB = 20.0  # a tenth of the signal is error: the decision of a classifier starts to depend on it
SHOWN = 10  # values of an output that are kept per sample
HIDDEN = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast", "Shape")
CLAMPS = ("Relu", "Clip")


@dataclass(frozen=True)
class LayerNoise:
    """One tensor of the first file and its image in the second. ``added``: error energy relative to the signal that the
    layer has beyond its noisiest input (0 where it repairs some)."""

    layer: str
    operator: str
    tensor: str
    sqnr_db: float
    added: float


@dataclass(frozen=True)
class WorstSample:
    """A sample on which the outputs part most. ``error``: length of the difference relative to the first output."""

    index: int
    error: float
    first: tuple[float, ...]
    second: tuple[float, ...]
    same_class: bool


@dataclass(frozen=True)
class Difference:
    """The comparison of two files over ``samples`` samples. Layers stand in the first file's order."""

    layers: tuple[LayerNoise, ...]
    outputs: tuple[LayerNoise, ...]
    first_bad: LayerNoise | None
    threshold_db: float
    worst: tuple[WorstSample, ...]
    same_class: float | None  # share of samples with equal argmax; None when the output is no vector
    unmatched: int  # tensors of the first file that the second does not have
    samples: int

    @property
    def dearest(self) -> LayerNoise | None:
        """The layer that adds most noise by itself."""
        return max(self.layers, key=lambda item: item.added, default=None)


def compare(
    first: ModelProto,
    second: ModelProto,
    batches: Callable[[], Iterable[Inputs]],
    *,
    threshold_db: float = BAD_DB,
    worst: int = 5,
) -> Difference:
    """Run both models on the same batches and compare every tensor that exists in both.

    Tensors are matched by name; where the second model quantizes one, its dequantized image is taken, and where its
    quantizer has absorbed a ReLU, the first model's tensor behind the ReLU. Raises :class:`StageError` when the models
    share no output.
    """
    pairs = match(first, second)
    ends = [value.name for value in first.graph.output if value.name in pairs]
    if not ends:
        raise StageError("the two files share no output", hint="They must be two forms of the same model.")
    run_first, run_second = watch(first, set(pairs)), watch(second, set(pairs.values()))
    noises = {name: Noise() for name in pairs}
    rows: list[tuple[Array, Array]] = []
    for inputs in batches():
        after = dict(run_second(inputs))
        for name, array in run_first(inputs):
            image = after.get(pairs[name])
            if image is None or image.shape != array.shape:
                continue
            noises[name].add(np.ravel(array), np.ravel(image))
            if name == ends[0]:
                rows.append((array.reshape(len(array), -1), image.reshape(len(array), -1)))
    if not rows:
        raise StageError("there is no data to compare with", hint="Give at least one sample.")
    before, image = (np.concatenate(part) for part in zip(*rows, strict=True))
    layers = _layers(first, noises)
    return Difference(
        layers=layers,
        outputs=tuple(item for item in layers if item.tensor in ends),
        first_bad=next((item for item in layers if item.sqnr_db < threshold_db), None),
        threshold_db=threshold_db,
        worst=_worst(before, image, worst),
        same_class=float(np.mean(before.argmax(1) == image.argmax(1))) if before.shape[1] > 1 else None,
        unmatched=len(_floats(first)) - len(layers),
        samples=len(before),
    )


def match(first: ModelProto, second: ModelProto) -> dict[str, str]:
    """Tensor of the first model -> its image in the second, in the first model's order."""
    images = _images(second)
    known = {name for node in second.graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in first.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    pairs: dict[str, str] = {}
    for name in _floats(first):
        if name not in known:
            continue
        after = readers.get(name, [])
        absorbed = len(after) == 1 and after[0].op_type in CLAMPS and after[0].output[0] not in known
        if not absorbed:
            pairs[name] = images.get(name, name)
        elif name in images:  # the pair behind the layer does the clamping
            pairs[after[0].output[0]] = images[name]
    return pairs


def _floats(model: ModelProto) -> list[str]:
    """Tensors that layers make, in order, without what only quantizes or shapes."""
    return [name for node in model.graph.node if node.op_type not in HIDDEN for name in node.output if name]


def _images(model: ModelProto) -> dict[str, str]:
    """Tensor -> the dequantized copy of it that other layers read."""
    made = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, str] = {}
    for node in model.graph.node:
        source = made.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if source is not None and source.op_type == "QuantizeLinear":
            found.setdefault(source.input[0], node.output[0])
    return found


def _layers(model: ModelProto, noises: Mapping[str, Noise]) -> tuple[LayerNoise, ...]:
    makers = {name: node for node in model.graph.node for name in node.output}
    ratios = {name: noise.sqnr_db for name, noise in noises.items() if noise.signal or noise.error}
    found = []
    for node in model.graph.node:
        for name in node.output:
            if name not in ratios:
                continue
            inherited = max(
                (_noise(ratio) for part in node.input for ratio in _before(part, makers, ratios)), default=0
            )
            added = max(0.0, _noise(ratios[name]) - inherited)
            shown = _layer(node, makers, ratios)
            found.append(LayerNoise(shown.name or name, shown.op_type, name, round(ratios[name], 2), added))
    return tuple(found)


def _noise(ratio_db: float) -> float:
    """Error energy relative to the signal's; 0 for an exact copy."""
    return 0.0 if ratio_db >= LOUDEST_DB else float(10 ** (-ratio_db / 10))


def _layer(node: NodeProto, makers: Mapping[str, NodeProto], ratios: Mapping[str, float]) -> NodeProto:
    """The layer that a row is about: of a ReLU that the second file has absorbed, the layer before it."""
    before = makers.get(node.input[0]) if node.op_type in CLAMPS and node.input[0] not in ratios else None
    return before if before is not None else node


def _before(name: str, makers: Mapping[str, NodeProto], ratios: Mapping[str, float]) -> list[float]:
    """Ratios of the nearest tensors before this one that have one."""
    pending, seen, found = [name], set[str](), []
    while pending:
        current = pending.pop()
        if current in ratios:
            found.append(ratios[current])
        elif current in makers and current not in seen:
            seen.add(current)
            pending += makers[current].input
    return found


def _worst(before: Array, after: Array, count: int) -> tuple[WorstSample, ...]:
    before, after = before.astype(np.float64), after.astype(np.float64)
    length = np.linalg.norm(before, axis=1)
    apart = np.linalg.norm(before - after, axis=1)
    error = np.divide(apart, length, out=np.where(apart > 0, np.inf, 0.0), where=length > 0)
    order = np.argsort(-error, kind="stable")[:count]
    return tuple(
        WorstSample(
            int(index),
            round(float(error[index]), 6),
            tuple(round(float(value), 4) for value in before[index, :SHOWN]),
            tuple(round(float(value), 4) for value in after[index, :SHOWN]),
            bool(before[index].argmax() == after[index].argmax()),
        )
        for index in order
    )
