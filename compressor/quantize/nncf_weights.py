"""Weight-only quantization by NNCF: ``compress_weights`` with AWQ and scale estimation, as ``MatMulNBits``.

Its ONNX side writes MatMulNBits only below opset 21 (from there on block-wise DequantizeLinear, which ONNX Runtime's
processor kernels do not fuse), and knows neither GPTQ nor LoRA correction.
"""

from __future__ import annotations

from typing import Any

from onnx import ModelProto, TensorProto, numpy_helper

from compressor.errors import StageError, sdk_errors
from compressor.models.onnx_graph import opset_of
from compressor.quantize.nncf_engine import import_nncf, items, silence
from compressor.quantize.watch import Calibration
from compressor.quantize.weights import Bits, packed

BLOCKWISE_OPSET = 21
RENAMED = "_compressed_matmul"
OPTIONS = {"awq": {"awq": True}, "scale-estimation": {"scale_estimation": True}}


def compress_weights(
    model: ModelProto, bits: Bits, block: int, method: str, calibration: Calibration, skip: set[str]
) -> ModelProto:
    """Every MatMul of a constant weight in ``bits``; tables and Gemm stay float, as in our own files.

    Raises :class:`StageError` when NNCF is missing or refuses the graph.
    """
    if opset_of(model) >= BLOCKWISE_OPSET:
        hint = f"Export the model at opset {BLOCKWISE_OPSET - 1}, or leave `nncf` out of `engines`."
        raise StageError(f"NNCF writes no MatMulNBits at opset {opset_of(model)}", hint=hint)
    nncf = import_nncf()
    first = items(model, calibration)
    hint = "Leave `nncf` out of `engines`; the built-in methods may take this graph."
    with silence(), sdk_errors(StageError, "compress weights with NNCF", hint=hint):
        mode = nncf.CompressWeightsMode.INT4_ASYM if bits == 4 else nncf.CompressWeightsMode.INT8_ASYM
        more: dict[str, Any] = {}
        if bits == 4:
            more = {"group_size": block, "ratio": 1.0, "all_layers": True, "subset_size": len(first)}
            more |= {"dataset": nncf.Dataset(first), **OPTIONS[method]}
        ignored = nncf.IgnoredScope(names=sorted(skip | _not_products(model)), validate=False)
        result: ModelProto = nncf.compress_weights(model, mode=mode, ignored_scope=ignored, **more)
    return _mended(result)


def _mended(model: ModelProto) -> ModelProto:
    """NNCF 3.4 stores one 4-bit zero point a byte, which ONNX Runtime 1.31 refuses; and it renames the nodes."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        node.name = node.name.removesuffix(RENAMED)
        known = {item.name: item.i for item in node.attribute}
        zeros = stored.get(node.input[3]) if len(node.input) > 3 else None
        if zeros is not None and known["bits"] == 4 and list(zeros.dims)[-1] == -(-known["K"] // known["block_size"]):
            array = packed(numpy_helper.to_array(zeros), 4)
            if array.shape != tuple(zeros.dims):
                zeros.CopyFrom(numpy_helper.from_array(array, zeros.name))
    return model


def _not_products(model: ModelProto) -> set[str]:
    """Nodes with weights that our own files leave in float."""
    floats = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    return {n.name for n in model.graph.node if n.op_type != "MatMul" and floats & set(n.input)}
