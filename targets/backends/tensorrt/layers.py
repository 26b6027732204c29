"""Read the builder's own layer table: the proof, without a GPU, of which precision each layer was compiled in.

With ``ProfilingVerbosity.DETAILED`` TensorRT-RTX writes one message that starts with ``Layers:``, a row a layer::

    Name: conv0_myl0_2, LayerType: correlation, Inputs: [ { Name: .., Datatype: Int8, .. }], Constants: [ .. ],
    Outputs: [ .. ], TacticName: .., StreamId: 0, Metadata: [ONNX Layer: conv0]<RS>[ONNX Layer: relu0]

The log is no contract of the vendor's, so reading is tolerant: what is not understood is left out, and the caller
says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.types import Measurement, Origin
from targets.base import Coverage, NodeFact

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
COMPUTE_TYPES = {"correlation": "conv", "convolution": "conv", "deconvolution": "conv", "gemm": "gemm"}
QUANTIZED = ("Int8", "FP8")
_ROW = re.compile(
    r"^Name: (?P<name>.*), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), StreamId: \d+, Metadata: ?(?P<metadata>.*)$"
)
_SEPARATOR = re.compile("[\x1e\x1f]")  # record separator between nodes, unit separator between a node and its Q/DQ
_DATATYPE = re.compile(r"Datatype: (\w+)")
_MEMORY = re.compile(
    r"^(?:Total|Max) (Weights|Activation|Scratch|Host Persistent|Device Persistent) Memory: (\d+) bytes"
)
_PURE_DATA_MOVEMENT = frozenset({"shape_call", "kgen"})


@dataclass(frozen=True)
class Layer:
    """A row of the table. ``onnx`` are the names of the ONNX nodes that were fused into it."""

    name: str
    kind: str
    inputs: tuple[str, ...]  # data types
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    onnx: tuple[str, ...]

    @property
    def precision(self) -> str:
        """Data type the arithmetic reads: its first activation, or its first constant where it has none."""
        return (self.inputs or self.constants or self.outputs or ("none",))[0]

    def as_json(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind, "precision": self.precision, "onnx": list(self.onnx)}


def parse_layers(table: str) -> tuple[Layer, ...]:
    """All rows of a ``Layers:`` message that can be read."""
    found = []
    for line in table.split("\nI/O Tensors:")[0].split("\n"):
        match = _ROW.match(line)
        if match:
            found.append(
                Layer(
                    name=match["name"],
                    kind=match["kind"],
                    inputs=tuple(_DATATYPE.findall(match["inputs"])),
                    constants=tuple(_DATATYPE.findall(match["constants"])),
                    outputs=tuple(_DATATYPE.findall(match["outputs"])),
                    onnx=_origins(match["metadata"]),
                )
            )
    return tuple(found)


def _origins(metadata: str) -> tuple[str, ...]:
    pieces = (piece.strip() for piece in _SEPARATOR.split(metadata))
    return tuple(piece[len("[ONNX Layer: ") : -1] for piece in pieces if piece.startswith("[ONNX Layer: "))


def precision_counts(layers: Iterable[Layer]) -> dict[str, int]:
    """How many convolution and matrix layers there are per data type: ``{"conv Int8": 9, "gemm Int8": 1}``."""
    counts = Counter(
        f"{COMPUTE_TYPES[layer.kind]} {layer.precision}" for layer in layers if layer.kind in COMPUTE_TYPES
    )
    counts.update(f"fused {layer.precision}" for layer in layers if layer.kind == "runtime_fusion")
    return dict(sorted(counts.items()))


def memory_estimates(lines: Iterable[str], device: str) -> tuple[Measurement, ...]:
    """The builder's figures in MiB; ``detail["figure"]``: weights, activation, scratch, host or device persistent."""
    found = []
    for line in lines:
        match = _MEMORY.match(line)
        if match:
            figure = {"figure": match[1].lower(), "bytes": int(match[2])}
            found.append(Measurement(int(match[2]) / 2**20, "MiB", Origin.ESTIMATED, device, figure))
    return tuple(found)


@dataclass(frozen=True)
class WeightedNode:
    """A Conv, Gemm or MatMul of the ONNX file, by the name that TensorRT's parser gives it."""

    name: str
    operator: str


def coverage(layers: Sequence[Layer], nodes: Sequence[WeightedNode]) -> Coverage:
    """Which of the file's weighted nodes the engine computes in int8 or float8.

    A node counts as quantized only if every compute layer that stems from it reads one of these; a node that the table
    does not name counts as float, with that as its reason.
    """
    left = []
    for node in nodes:
        reason = _why_float(node, layers)
        if reason:
            left.append(NodeFact(node.name, node.operator, quantized=False, reason=reason))
    return Coverage(quantized=len(nodes) - len(left), total=len(nodes), left_float=tuple(left))


def _why_float(node: WeightedNode, layers: Sequence[Layer]) -> str:
    named = [layer for layer in layers if node.name in layer.onnx]
    compute = [layer for layer in named if layer.kind in COMPUTE_TYPES]
    if not compute:  # a runtime fusion, or a generated kernel when nothing better names the node
        compute = [layer for layer in named if layer.kind not in _PURE_DATA_MOVEMENT] or named
    if not compute:
        return "the builder's layer table does not name it"
    slow = next((layer for layer in compute if layer.precision not in QUANTIZED), None)
    return f"compiled as {slow.kind} in {slow.precision} (layer `{slow.name}`)" if slow else ""
