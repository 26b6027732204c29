"""The reader of the builder's layer table, on rows as TensorRT-RTX 1.7.1 writes them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from compressor.errors import CompileError
from targets.backends.tensorrt.builder import Journal, clean
from targets.backends.tensorrt.engine_file import normalised_digest, read_header
from targets.backends.tensorrt.layers import (
    Layer,
    WeightedNode,
    coverage,
    memory_estimates,
    parse_layers,
    precision_counts,
)

SHAPE = "Dimensions: [-1,4,32,32], Strides: [4096,1,128,4], StrideOrder: [3,0,2,1]"


def tensors(*types: str) -> str:
    each = (f"{{ Name: t, {SHAPE}, Datatype: {kind}, Format: (NHWC) Channel major format }}" for kind in types)
    return f"[ {', '.join(each)}]" if types else "[]"


def row(name: str, kind: str, inputs: str, constants: str, outputs: str, metadata: str) -> str:
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: {inputs}, Constants: {constants}, Outputs: {outputs}, "
        f"TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: {metadata}"
    )


ODD = "odd [a, b], LayerType: x"
TABLE = "\n".join(
    [
        "Layers:",
        row("__mye1_0_myl0_0", "shape_call", "[]", "[]", "[]", ""),
        row(
            f"{ODD}_myl0_2",
            "correlation",
            tensors("Int8"),
            tensors("Int8", "Float"),
            tensors("Float"),
            f"[ONNX Layer: {ODD}]\x1f[ONNX Layer: x_DequantizeLinear]\x1e[ONNX Layer: relu0]",
        ),
        row("__myl_FcAdd_myl0_7", "runtime_fusion", tensors("Float"), "[]", tensors("Float"), "[ONNX Layer: fc]"),
        "a line in a format that nobody knows yet",
        "",
        "I/O Tensors:",
        " Name: x, IOMode: Input, DataType: Float, Dimensions: [-1,3,32,32]",
    ]
)


def test_rows_are_read_whatever_the_names() -> None:
    layers = parse_layers(TABLE)
    assert [layer.kind for layer in layers] == ["shape_call", "correlation", "runtime_fusion"]
    assert layers[1] == Layer(
        name="odd [a, b], LayerType: x_myl0_2",
        kind="correlation",
        inputs=("Int8",),
        constants=("Int8", "Float"),
        outputs=("Float",),
        onnx=("odd [a, b], LayerType: x", "x_DequantizeLinear", "relu0"),
    )
    assert precision_counts(layers) == {"conv Int8": 1, "fused Float": 1}


def test_coverage_is_careful() -> None:
    nodes = [
        WeightedNode("odd [a, b], LayerType: x", "Conv"),
        WeightedNode("fc", "Gemm"),
        WeightedNode("lost", "MatMul"),
    ]
    found = coverage(parse_layers(TABLE), nodes)
    assert (found.quantized, found.total) == (1, 3)
    assert {fact.name: fact.reason for fact in found.left_float} == {
        "fc": "compiled as runtime_fusion in Float (layer `__myl_FcAdd_myl0_7`)",
        "lost": "the builder's layer table does not name it",
    }


def test_generated_kernels_do_not_hide_the_matrix_product() -> None:
    kernel = Layer("k", "kgen", ("Float",), (), ("Int8",), ("product",))
    product = Layer("g", "gemm", ("Int8",), ("Int8",), ("Float",), ("product",))
    assert coverage([kernel, product], [WeightedNode("product", "MatMul")]).quantized == 1
    assert coverage([kernel], [WeightedNode("product", "MatMul")]).quantized == 0
    float8 = Layer("g", "gemm", ("FP8",), ("FP8",), ("Half",), ("product",))
    assert coverage([float8], [WeightedNode("product", "MatMul")]).quantized == 1


def test_an_unknown_log_gives_nothing_instead_of_an_error() -> None:
    assert parse_layers("") == ()
    assert parse_layers("Layers:\nsomething else") == ()
    assert memory_estimates(["Total Weights Memory: many bytes"], "builder") == ()


def test_memory_lines_become_mib() -> None:
    found = memory_estimates(["Total Weights Memory: 2097152 bytes", "Max Scratch Memory: 524288 bytes"], "builder")
    assert [(each.detail["figure"], each.value, each.unit) for each in found] == [
        ("weights", 2.0, "MiB"),
        ("scratch", 0.5, "MiB"),
    ]


def test_journal_drops_the_noise_about_the_missing_gpu() -> None:
    noise = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (cudaError 35)"
    assert clean(f"bad node\n{noise}") == "bad node"
    journal = Journal()
    for severity, message in [
        ("ERROR", noise),
        ("ERROR", f"[6] Invalid\n{noise}"),
        ("WARNING", "w"),
        ("VERBOSE", "Layers:\n"),
    ]:
        journal.add(severity, message)
    journal.add("INFO", "Total Weights Memory: 1 bytes")
    assert (journal.errors, journal.warnings, journal.layers) == (["[6] Invalid"], ["w"], "Layers:\n")
    assert journal.memory == ["Total Weights Memory: 1 bytes"]


def plan(path: Path, tag: bytes, size: int, body: bytes = b"") -> Path:
    path.write_bytes(tag + bytes(12) + struct.pack("<q", size) + bytes([1, 7, 1, 116]) + body)
    return path


def test_header_of_both_flavours(tmp_path: Path) -> None:
    rtx = read_header(plan(tmp_path / "a", b"vtrt", 32, b"body"))
    assert (rtx.flavour, rtx.version, rtx.size) == ("rtx", "1.7.1.116", 32)
    assert read_header(plan(tmp_path / "b", b"ftrt", 0)).flavour == "enterprise"


@pytest.mark.parametrize(("tag", "size"), [(b"vtrt", 99), (b"onnx", 28)])
def test_header_of_a_damaged_engine(tag: bytes, size: int, tmp_path: Path) -> None:
    with pytest.raises(CompileError):
        read_header(plan(tmp_path / "a", tag, size))


def test_normalised_digest_masks_symbol_counters_only(tmp_path: Path) -> None:
    digests = []
    for name, body in [("a", b"__mye123_x"), ("b", b"__mye7_x"), ("c", b"__mye7_y")]:
        (tmp_path / name).write_bytes(body)
        digests.append(normalised_digest(tmp_path / name))
    assert digests[0] == digests[1] != digests[2]
