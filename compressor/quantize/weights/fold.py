"""Where AWQ's factor goes without a cost at run time: into the stored vectors and weights that make a tensor.

Dividing channel c of a tensor by ``factor[c]`` is exact when every step back to a stored tensor passes a positive
factor per channel on, and nothing else reads what lies between.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import ModelProto, NodeProto

from compressor.quantize.weights.files import Store
from compressor.quantize.weights.stream import reads
from compressor.types import Array

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
PASSES = ("Identity", "LeakyRelu", "Relu")
FURTHEST = 8  # steps back


@dataclass(frozen=True)
class Site:
    """Stored tensors to divide: ``vectors`` (K,), ``columns`` (n, K) along the outputs, ``rows`` (K, G) scales."""

    vectors: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()

    def divide(self, store: Store, factor: Array) -> None:
        for name in (*self.vectors, *self.columns):
            store.change(name, store.read(name) / factor)
        for name in self.rows:
            store.change(name, store.read(name) / factor[:, None])

    def and_vector(self, name: str) -> Site:
        """With one more vector."""
        return Site((*self.vectors, name), self.columns, self.rows)


class Folder:
    """Looks for sites in a graph whose weights stay on disk."""

    def __init__(self, model: ModelProto, store: Store) -> None:
        self._store = store
        self._made = {name: node for node in model.graph.node for name in node.output if name}
        self._readers: dict[str, int] = {}
        read = (name for node in model.graph.node for name in reads(node))
        for name in [*read, *(value.name for value in model.graph.output)]:
            self._readers[name] = self._readers.get(name, 0) + 1

    def site(self, name: str, readers: int, channels: int, steps: int = FURTHEST) -> Site | None:
        """Where the factor of a tensor goes that ``readers`` nodes read, all of them scaled; None: nowhere exactly."""
        node = self._made.get(name)
        if node is None or steps == 0 or self._readers.get(name, 0) != readers:
            return None
        if node.op_type in NORMS and node.output[0] == name:
            vectors = [item for item in node.input[1:] if item]
            return Site(tuple(vectors)) if all(self._own(item, channels) for item in vectors) else None
        if node.op_type in ("MatMul", "MatMulNBits"):
            return self._product(node, channels)
        if node.op_type in PASSES:
            return self.site(node.input[0], 1, channels, steps - 1)
        if node.op_type == "Mul":
            return self._element_product(node, channels, steps)
        return self._sum(node, channels, steps) if node.op_type == "Add" else None

    def _own(self, name: str, channels: int) -> bool:
        return self._store.shape(name) == (channels,) and self._readers[name] == 1

    def _product(self, node: NodeProto, channels: int) -> Site | None:
        """A weight's output channels; of few-bit weights their scales, so that no code changes."""
        name = node.input[2 if node.op_type == "MatMulNBits" else 1]
        shape = self._store.shape(name)
        if shape is None or len(shape) != 2 or self._readers.get(name, 1) != 1:
            return None
        if node.op_type == "MatMulNBits":
            return Site(rows=(name,)) if shape[0] == channels else None
        return Site(columns=(name,)) if shape[1] == channels else None

    def _element_product(self, node: NodeProto, channels: int, steps: int) -> Site | None:
        """A stored vector (the weight of an RMS norm), or one of two computed factors (a gated unit)."""
        for name in node.input:
            if self._own(name, channels):
                return Site((name,))
        found = (self.site(name, 1, channels, steps - 1) for name in node.input)
        return next((site for site in found if site is not None), None)

    def _sum(self, node: NodeProto, channels: int, steps: int) -> Site | None:
        """A bias: it is divided with what it is added to."""
        for bias, other in ((0, 1), (1, 0)):
            if self._own(node.input[bias], channels):
                site = self.site(node.input[other], 1, channels, steps - 1)
                return None if site is None else site.and_vector(node.input[bias])
        return None
