"""Weight-only quantization of MatMul: int8 or int4 in groups along the input, layer by layer, as ``MatMulNBits``.

Activations stay float. The format is ONNX Runtime's contrib operator MatMulNBits (docs/ContribOperators.md): codes are
(N, K / block, block * bits / 8) bytes, low nibble first; scales (N, K / block); zero points packed like the codes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from compressor.errors import StageError
from compressor.models.onnx_graph import name_nodes
from compressor.quantize.watch import Calibration
from compressor.quantize.weights.files import Store
from compressor.quantize.weights.fold import Folder, Site
from compressor.quantize.weights.grid import Bits, Codes, packed
from compressor.quantize.weights.methods import WITH_AWQ, Inputs, Method, awq_factor, output_error, quantized
from compressor.quantize.weights.stream import Stream, reads
from compressor.types import Array, LayerFact, write_atomic

DOMAIN = "com.microsoft"
SMALLEST = 16  # block sizes are powers of two from here on (the operator's own rule)
STAGE = "quantize"
INT8_SUMS = 4  # `accuracy_level`: activations may be rounded to int8; without it int8 weights ran 16 times slower


def quantize_weights(
    source: Path,
    out: Path,
    *,
    bits: Bits = 4,
    block: int = 32,
    skip: Mapping[str, str] | None = None,
    method: Method = "rtn",
    calibration: Calibration | None = None,
) -> tuple[LayerFact, ...]:
    """Write ``out`` (and ``out``.data beside it) with every MatMul of a constant 2-D float32 weight in few bits.

    ``source`` is read tensor by tensor: no more than one layer's weight is in memory beside the graph without weights,
    however big the model is, when its weights lie in an external file. Every ``method`` but ``rtn`` needs
    ``calibration``; the model is then run piece by piece, each piece on what the quantized ones before it give.
    ``skip`` maps nodes that stay float to reasons. Returns a fact per MatMul, in the order of the graph. Raises
    :class:`StageError` for a block size that the operator does not know and for data that does not fit.
    """
    if block < SMALLEST or block & (block - 1):
        raise StageError(f"a block of {block} rows is impossible", hint="Take 16, 32, 64, 128 or 256.")
    if method != "rtn" and calibration is None:
        raise StageError(f"`{method}` needs calibration data", hint="Give some, or take `rtn`.")
    model = onnx.load(source, load_external_data=False)
    name_nodes(model)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    reasons = _reasons(model, stored, skip or {})
    layers = [node for node in model.graph.node if reasons.get(node.name) == ""]
    if layers and not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    with (
        out.with_name(out.name + ".data").open("w+b") as stream,
        tempfile.TemporaryDirectory(prefix="stream-", dir=out.parent) as work,
    ):
        store = Store(stream, stored, source, out)
        job = _Job(model, store, bits, block, method)
        if method == "rtn":
            for node in layers:
                job.layer(node)
        else:
            assert calibration is not None
            job.calibrated(layers, Stream(model, job.is_stored, store.read, calibration, Path(work)))
        del model.graph.initializer[:]
        model.graph.initializer.extend(store.finish())
    write_atomic(out, model.SerializeToString(deterministic=True))
    return tuple(_fact(name, why, job) for name, why in reasons.items())


def _reasons(model: ModelProto, stored: Mapping[str, TensorProto], skip: Mapping[str, str]) -> dict[str, str]:
    """Every MatMul, and why it stays float; empty: it does not."""
    users: dict[str, int] = {}
    for node in model.graph.node:
        for name in reads(node):
            users[name] = users.get(name, 0) + 1
    return {
        node.name: skip.get(node.name) or _why_not(node, stored, users)
        for node in model.graph.node
        if node.op_type == "MatMul"
    }


def _why_not(node: NodeProto, stored: Mapping[str, TensorProto], users: Mapping[str, int]) -> str:
    tensor = stored.get(node.input[1])
    if tensor is None:
        return "both operands are computed, or the weight is the left one"
    if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
        return "its weight is not a float32 matrix"
    return "its weight has other readers" if users[node.input[1]] > 1 else ""


def _fact(name: str, why: str, job: _Job) -> LayerFact:
    if why:
        return LayerFact(STAGE, name, "left-float", "float32", "float32", why)
    told = f"groups of {job.block} rows{job.told.get(name, '')}"
    return LayerFact(STAGE, name, "quantized", "float32", f"int{job.bits}", told)


@dataclass
class _Job:
    """One file in the making. ``told``: node -> what its fact adds."""

    model: ModelProto
    store: Store
    bits: Bits
    block: int
    method: Method
    told: dict[str, str] = field(default_factory=dict)

    def is_stored(self, name: str) -> bool:
        return name in self.store.kept or name in self.store.made

    def calibrated(self, layers: list[NodeProto], stream: Stream) -> None:
        """All layers that read the same tensor together, in the order of the graph."""
        groups: dict[str, list[NodeProto]] = {}
        for node in layers:
            groups.setdefault(node.input[0], []).append(node)
        for name, nodes in groups.items():
            inputs = stream.inputs(name)
            factor = self._folded(name, nodes, inputs) if self.method in WITH_AWQ else None
            if factor is not None:
                stream.divide(name, factor)
                inputs = inputs.scaled(factor)
            for node in nodes:
                self.layer(node, inputs, factor)

    def _folded(self, name: str, nodes: list[NodeProto], inputs: Inputs) -> Array | None:
        """AWQ's factor, taken into what makes the tensor; None where it has no exact place, or would not help."""
        site: Site | None = Folder(self.model, self.store).site(name, len(nodes), len(inputs.mean))
        if site is None:
            return None
        factor = awq_factor((self.store.read(node.input[1]) for node in nodes), inputs, self.bits, self.block)
        if np.all(factor == factor[0]):
            return None
        site.divide(self.store, factor)
        for node in nodes:
            self.told[node.name] = f", inputs divided by {factor.min():.2g} to {factor.max():.2g} (AWQ)"
        return factor

    def layer(self, node: NodeProto, inputs: Inputs | None = None, factor: Array | None = None) -> None:
        """Write one layer's codes and rewrite its node."""
        name = node.input[1]
        weight = self.store.read(name)
        if factor is not None:
            weight = weight * factor[:, None]
        codes = quantized(weight, inputs, self.method, self.bits, self.block)
        if inputs is not None:
            self.told[node.name] = f"{self.told.get(node.name, '')}, {self._gain(weight, codes, inputs, factor)}"
        for made, array in self._tensors(name, codes):
            self.store.add(made, array)
        self.store.drop(name)
        _rewrite(node, weight.shape, self.bits, self.block)

    def _gain(self, weight: Array, codes: Codes, inputs: Inputs, factor: Array | None) -> str:
        """The loss of the layer's output beside that of rounding the given weight to nearest."""
        lost = output_error(weight, codes, inputs.gram)
        if factor is not None:
            inputs, weight = inputs.scaled(1 / factor), weight / factor[:, None]
        plain = output_error(weight, quantized(weight, None, "rtn", self.bits, self.block), inputs.gram)
        return f"squared error of its output {lost / plain:.2f} of nearest rounding's" if plain else "exact"

    def _tensors(self, name: str, codes: Codes) -> Iterator[tuple[str, Array]]:
        yield f"{name}_codes", packed(codes.codes, self.bits)
        yield f"{name}_scales", codes.scale
        yield f"{name}_zeros", packed(codes.zero, self.bits)


def _rewrite(node: NodeProto, shape: tuple[int, ...], bits: int, block: int) -> None:
    weight = node.input[1]
    inputs = [node.input[0], *(f"{weight}_{part}" for part in ("codes", "scales", "zeros"))]
    made = helper.make_node(
        "MatMulNBits", inputs, list(node.output), name=node.name, domain=DOMAIN,
        K=shape[0], N=shape[1], bits=bits, block_size=block, accuracy_level=INT8_SUMS,
    )  # fmt: skip
    node.CopyFrom(made)
