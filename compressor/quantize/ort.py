"""ONNX Runtime's quantizer, with the options that lead to int8 kernels."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from compressor.errors import StageError, sdk_errors
from compressor.models.onnx_graph import constants, save_model
from compressor.profile import QuantizationRules
from compressor.quantize.integer import MORE_OPERATORS, fold_biases, masked_scores
from compressor.quantize.prepare import COMPUTED, left_alone
from compressor.quantize.ranges import Ranges
from compressor.quantize.variants import Variant

# Where ONNX Runtime's CPU kernels stay in int8, so that no convolution is fenced in by a return to float. Softmax,
# LayerNormalization and embeddings are left out: int8 there costs accuracy and gains no time.
WHOLE_GRAPH = [
    "Add",
    "AveragePool",
    "Clip",
    "Concat",
    "Conv",
    "ConvTranspose",
    "Flatten",
    "Gemm",
    "GlobalAveragePool",
    "LeakyRelu",
    "MatMul",
    "MaxPool",
    "Mul",
    "Pad",
    "Relu",
    "Reshape",
    "Resize",
    "Sigmoid",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
]
HINT = "Try the other engine, or keep this model in fp32."


def quantize_static(
    model: ModelProto, variant: Variant, rules: QuantizationRules, ranges: Ranges, skip: Mapping[str, str]
) -> ModelProto:
    """Quantize-dequantize pairs from known activation ranges. ``skip`` names the nodes that stay float."""
    import numpy as np
    from onnxruntime import quantization
    from onnxruntime.quantization.calibrate import TensorData, TensorsData, save_tensors_data

    more = MORE_OPERATORS if rules.whole else ()
    operators = list(variant.operators or (*WHOLE_GRAPH, *more))
    with _scratch() as folder, sdk_errors(StageError, f"quantize with `{variant.name}`", hint=HINT):
        method = quantization.CalibrationMethod.MinMax
        data = {
            name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
            for name, (low, high) in ranges.items()
        }
        save_tensors_data(TensorsData(method, data), folder / "ranges.json")
        save_model(model, folder / "in.onnx")
        quantization.quantize_static(
            folder / "in.onnx",
            folder / "out.onnx",
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=operators,
            nodes_to_exclude=sorted(skip),
            per_channel=variant.per_channel,
            reduce_range=rules.reduce_range,
            activation_type=_type(rules.activation),
            weight_type=_type(rules.weight),
            calibrate_method=method,
            calibration_cache_path=folder / "ranges.json",
            extra_options=static_options(variant, rules),
        )
        result = onnx.load(folder / "out.onnx")
    if rules.integer_only:
        fold_biases(result, model)
    if rules.symmetric_activation:
        _scalars_to_vectors(result)
    if variant.operators is not None and not rules.weighted_only:
        _release(result, variant.operators)
    return result


def _scalars_to_vectors(model: ModelProto) -> None:
    """TensorRT refuses a quantized scalar and takes a vector of one, which every operator broadcasts alike."""
    read = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for tensor in model.graph.initializer:
        if tensor.name in read and not tensor.dims:
            tensor.dims.append(1)


def _release(model: ModelProto, operators: tuple[str, ...]) -> None:
    """Give operators that stay float the float tensor again. The quantizer hands the dequantized one to every reader,
    so that residual additions and LayerNormalization would carry int8 noise for nothing. Gathers keep their pair:
    without it the runtime would dequantize the whole table for every call."""
    made = {name: node for node in model.graph.node for name in node.output}
    origin: dict[str, str] = {}
    for node in model.graph.node:
        source = made.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if source is not None and source.op_type == "QuantizeLinear":
            first = made.get(source.input[0])
            if first is None or first.op_type != "Gather":
                origin[node.output[0]] = source.input[0]
    for node in model.graph.node:
        if node.op_type not in (*operators, "QuantizeLinear", "DequantizeLinear"):
            for position, name in enumerate(node.input):
                node.input[position] = origin.get(name, name)


def static_options(variant: Variant, rules: QuantizationRules) -> dict[str, Any]:
    """Extra options of ONNX Runtime's QDQ quantizer.

    A variant of weighted operators only leaves their outputs float: the runtime then fuses DequantizeLinear and MatMul
    into one kernel with a float result (1.13 against 1.29 ms on a small BERT), and TensorRT gets its usual placement.
    """
    options: dict[str, Any] = {
        "ActivationSymmetric": rules.symmetric_activation,
        "WeightSymmetric": rules.weight == "int8",
        "QuantizeBias": rules.quantize_bias,
    }
    if variant.operators is not None:
        options["OpTypesToExcludeOutputQuantization"] = [name for name in variant.operators if name != "Gather"]
    if rules.weighted_only:
        options["DedicatedQDQPair"] = True
    if rules.activation in ("uint16", "int16"):
        options["UseQDQContribOps"] = True  # the standard's QuantizeLinear knows 16 bits from opset 21 on
    return options


def quantize_dynamic(
    model: ModelProto, variant: Variant, rules: QuantizationRules, keep_float: Mapping[str, str] | None = None
) -> tuple[ModelProto, Mapping[str, str]]:
    """Weights to int8, activations quantized at run time; embedding tables become int8 as well (a small BERT's file
    shrinks 3.8x instead of 1.7x). Returns the model and the nodes left float with their reasons."""
    from onnxruntime import quantization

    skip = {name: why for name, why in left_alone(model).items() if "output" not in why}
    skip |= dict(keep_float or {})
    left = sorted({*skip, *(f"{name}_MatMul" for name in skip)})  # what the quantizer calls a Gemm before it looks
    with _scratch() as folder, sdk_errors(StageError, f"quantize with `{variant.name}`", hint=HINT):
        save_model(model, folder / "in.onnx")
        quantization.quantize_dynamic(
            folder / "in.onnx",
            folder / "out.onnx",
            op_types_to_quantize=list(variant.operators or ("Gather", "Gemm", "MatMul")),
            nodes_to_exclude=left,
            per_channel=variant.per_channel,
            reduce_range=rules.reduce_range,
            weight_type=_type(rules.weight),
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT, "MatMulConstBOnly": True},
        )
        return onnx.load(folder / "out.onnx"), skip


def static_skips(model: ModelProto, variant: Variant, rules: QuantizationRules) -> dict[str, str]:
    """Nodes that a static variant leaves float, with reasons."""
    skip = dict(left_alone(model))
    whole = rules.whole and variant.operators is None
    if whole:
        skip = {name: why for name, why in skip.items() if why != COMPUTED} | masked_scores(model)
    fixed = constants(model.graph)
    for node in model.graph.node:
        weighted = node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        if weighted and node.name not in skip and not any(name in fixed for name in node.input[1:2]):
            if node.op_type == "MatMul" and node.input[0] in fixed:
                skip[node.name] = "its weight is the left operand, for which there is no int8 kernel"
            elif node.op_type != "MatMul" or not whole:
                skip[node.name] = "its weight is computed in the graph"
        elif node.op_type == "ConvTranspose" and variant.per_channel and _attribute(node, "group", 1) > 1:
            skip[node.name] = "grouped ConvTranspose has no per-channel int8 form"
    return skip


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


def _type(name: str) -> Any:
    from onnxruntime.quantization import QuantType

    kinds = {"int8": QuantType.QInt8, "uint8": QuantType.QUInt8, "int16": QuantType.QInt16, "uint16": QuantType.QUInt16}
    return kinds[name]


@contextmanager
def _scratch() -> Iterator[Path]:
    """A temporary folder, and silence from the quantizer, which warns about preprocessing on the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory(prefix="quantize-") as folder:
            yield Path(folder)
    finally:
        root.setLevel(level)
