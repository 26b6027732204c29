"""An artifact as a TFLite file without float tensors at its edges, for NPUs and microcontrollers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from compressor.errors import CompileError, sdk_errors
from compressor.types import Artifact
from targets.static_graph import fixed_shapes, read_static
from targets.tflite.convert import Converted, convert


def export_int8(
    artifact: Artifact, out: Path, *, batch: int, sequence: int, absent: Collection[str] = frozenset()
) -> tuple[Path, Converted]:
    """Write ``out/<artifact>.tflite``, with int8 inputs and outputs where the ONNX file quantizes them.

    ``absent``: operators that the runtime lacks (see :func:`targets.tflite.convert.convert`). Returns the path and what
    is in it. Raises :class:`CompileError`.
    """
    shapes = fixed_shapes(artifact.inputs, batch, sequence)
    graph = read_static(artifact.path, shapes)
    with sdk_errors(CompileError, f"write `{artifact.name}` as TFLite"):
        converted = convert(graph, f"`{artifact.name}`", int8_interface=True, absent=absent)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{artifact.name.replace('/', '-')}.tflite"
    path.write_bytes(converted.content)
    return path, converted


def float_operations(converted: Converted) -> tuple[str, ...]:
    """Operations that touch a float tensor, as ``OPERATOR tensor``: what keeps a graph from being fully int8."""
    return tuple(
        f"{operation.operator} {operation.outputs[0].name}"
        for operation in converted.operations
        if "float32" in {tensor.type for tensor in (*operation.inputs, *operation.outputs)}
    )
