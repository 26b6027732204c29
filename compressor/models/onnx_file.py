"""Validate and describe an ONNX file that nobody vouches for. No torch; the file is never written to.

Order matters: the protobuf is parsed without external data, every external path is checked to stay inside the model's
folder and inside its file, and only then do the checker and ONNX Runtime see it, in a child process.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from compressor.errors import ConfigError, PlanError, Problem
from compressor.types import TensorSpec

PROTOBUF_LIMIT_BYTES = 2**31 - 1  # protobuf cannot hold more in one message; larger models need external data
PROBE_TIMEOUT_S = 300
QUANTIZED_OPS = frozenset(
    {
        "QuantizeLinear",
        "QLinearConv",
        "QLinearMatMul",
        "ConvInteger",
        "MatMulInteger",
        "DynamicQuantizeLinear",
        "QGemm",
        "MatMulNBits",
    }
)
# Domains whose operators the runtime we ship with knows; anything else needs a custom operator library.
KNOWN_DOMAINS = frozenset(
    {"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "ai.onnx.preview.training"}
)
_DTYPES = {
    "float": "float32", "double": "float64", "float16": "float16", "int64": "int64", "int32": "int32", "int16": "int16",
    "int8": "int8", "uint8": "uint8", "uint16": "uint16", "uint32": "uint32", "uint64": "uint64",
    "bool": "bool", "string": "str",
}  # fmt: skip


@dataclass(frozen=True)
class OnnxFacts:
    """What an ONNX file holds."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: int
    nodes: int
    file_bytes: int  # with external data
    quantized: tuple[str, ...]  # quantized operator types found
    digest: str
    metadata: dict[str, str]
    faults: tuple[str, ...] = ()  # what the ONNX checker minds and the runtime does not


def read_onnx(path: Path) -> OnnxFacts:
    """Validate ``path`` and describe it.

    Raises :class:`ConfigError` for files that are broken or unsafe, :class:`PlanError` for operators the runtime does
    not have.
    """
    model = parse(path)
    external = check_external_data(model, path)
    _check_domains(model, path)
    found = _probe(path)
    kinds = sorted({node.op_type for graph in graphs(model) for node in graph.node} & QUANTIZED_OPS)
    return OnnxFacts(
        inputs=_specs(found["inputs"], path, model),
        outputs=_specs(found["outputs"], path, model),
        parameters=count_parameters(model),
        nodes=sum(len(graph.node) for graph in graphs(model)),
        file_bytes=sum(file.stat().st_size for file in (path, *external)),
        quantized=tuple(kinds),
        digest=_digest(path, external),
        metadata={entry.key: entry.value for entry in model.metadata_props},
        faults=(" ".join(found["fault"].split())[:300],) if found["fault"] else (),
    )


def parse(path: Path) -> Any:
    """The ModelProto without its external data; :class:`ConfigError` when it is empty, too large or truncated."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        size = path.stat().st_size
        if size == 0:
            raise _broken(path, "is empty")
        if size > PROTOBUF_LIMIT_BYTES:
            raise _broken(path, f"is {size / 2**30:.1f} GiB, more than protobuf's 2 GiB", "Save it with external data.")
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise _broken(path, "is truncated or not an ONNX file", "Copy or export it again.") from error
    except OSError as error:
        raise _broken(path, f"cannot be read: {error.strerror or error}") from error
    if not model.HasField("graph") or not model.ir_version or not model.opset_import:
        raise _broken(path, "is truncated or not an ONNX file: it has no graph, IR version or operator set")
    return model


def _broken(path: Path, what: str, hint: str = "") -> ConfigError:
    return ConfigError.single(f"`{path}`", "teacher.model", what, hint=hint)


def graphs(model: Any) -> Iterator[Any]:
    """The main graph, every subgraph (If, Loop, Scan) and every function body: all that has ``.node``."""
    stack = [model.graph, *model.functions]
    while stack:
        graph = stack.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    stack.append(attribute.g)
                stack.extend(attribute.graphs)


def tensors(model: Any) -> Iterator[Any]:
    """Every TensorProto that holds weights: initializers (dense and sparse), Constant nodes, tensor attributes."""
    for graph in graphs(model):
        yield from getattr(graph, "initializer", ())
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                    yield from (sparse.values, sparse.indices)
    for training in model.training_info:
        yield from (*training.initialization.initializer, *training.algorithm.initializer)


def count_parameters(model: Any) -> int:
    """Elements of initializers and of Constant nodes with at least one axis (scalars are settings, not weights)."""
    return sum(math.prod(tensor.dims) for tensor in tensors(model) if tensor.dims)


def check_external_data(model: Any, path: Path) -> tuple[Path, ...]:
    """Files with external weights; each must lie inside the model's folder and be long enough.

    Raises :class:`ConfigError` listing every tensor whose location is absolute, climbs out of the folder (also through
    a symbolic link), is missing or is shorter than the tensor says.
    """
    import onnx

    folder = path.resolve().parent
    files: dict[Path, None] = {}
    problems: list[Problem] = []
    for tensor in tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        fault = _external_fault(folder, entries)
        if fault:
            problems.append(Problem(f"tensor `{tensor.name or '?'}`", fault))
        else:
            files[(folder / entries["location"]).resolve()] = None
    if problems:
        raise ConfigError(
            f"`{path}`",
            problems[:10],
            hint="External weights must lie beside the model; keep the files together and do not edit them.",
        )
    return tuple(files)


def _external_fault(folder: Path, entries: dict[str, str]) -> str | None:
    location = entries.get("location", "")
    if not location:
        return "has external data without a location"
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    if posix.is_absolute() or windows.is_absolute() or windows.drive or ".." in posix.parts or ".." in windows.parts:
        return f"its external data `{location}` points outside the model's folder"
    file = (folder / location).resolve()
    if not file.is_relative_to(folder):
        return f"its external data `{location}` points outside the model's folder"
    if not file.is_file():
        return f"its external data `{location}` is missing"
    try:
        end = int(entries.get("offset") or 0) + int(entries.get("length") or 0)
    except ValueError:
        return f"its external data `{location}` has a malformed offset or length"
    if int(entries.get("offset") or 0) < 0 or int(entries.get("length") or 0) < 0:
        return f"its external data `{location}` has a negative offset or length"
    size = file.stat().st_size
    return f"its external data `{location}` is truncated ({size} of {end} bytes)" if size < end else None


def _check_domains(model: Any, path: Path) -> None:
    own = {(function.domain, function.name) for function in model.functions}
    problems: dict[str, Problem] = {}
    for graph in graphs(model):
        for node in graph.node:
            if node.domain not in KNOWN_DOMAINS and (node.domain, node.op_type) not in own:
                name = f"{node.domain}::{node.op_type}"
                problems.setdefault(name, Problem(f"node `{node.name or node.op_type}`", f"unknown operator `{name}`"))
    if problems:
        raise PlanError(
            f"`{path}`",
            list(problems.values())[:10],
            hint="Export without custom operators, or replace them with standard ones.",
        )


def _probe(path: Path) -> dict[str, Any]:
    # -P keeps the current folder off the import path: an `onnx.py` beside a stranger's model must not be run
    command = [sys.executable, "-P", "-m", "compressor.models.onnx_probe", str(path.resolve())]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise _broken(path, f"could not be checked within {PROBE_TIMEOUT_S} s", "Simplify the graph.") from error
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        tail = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise _broken(
            path, f"makes the ONNX checker crash (exit code {done.returncode}): {tail[:200]}", "Export it again."
        ) from error
    if "error" not in found:
        return found
    message = " ".join(str(found["message"]).split())[:400]
    if (
        "No Op registered" in message
        or "is not a registered function/op" in message
        or found["error"] == "NotImplemented"
    ):
        raise PlanError.single(
            f"`{path}`",
            f"unknown operator: {message}",
            hint="Export with an operator set that ONNX Runtime implements.",
        )
    raise _broken(path, f"is not a valid ONNX model: {message}", "Export it again, or run onnx.checker on it.")


def _specs(values: list[Any], path: Path, model: Any) -> tuple[TensorSpec, ...]:
    """ONNX Runtime's view of inputs or outputs; unnamed dynamic axes are called ``dim0``, ``dim1`` ..."""
    proto = {value.name: value for value in (*model.graph.input, *model.graph.output)}
    specs, problems = [], []
    for name, kind, shape in values:
        dtype = _DTYPES.get(kind.removeprefix("tensor(").removesuffix(")"))
        if dtype is None:
            problems.append(Problem(f"`{name}`", f"has type {kind}; only plain tensors are supported"))
            continue
        if not shape and name in proto and not proto[name].type.tensor_type.HasField("shape"):
            problems.append(Problem(f"`{name}`", "has no shape, not even a number of axes"))
            continue
        axes = tuple(
            axis if isinstance(axis, int) and axis >= 0 else (f"dim{i}" if axis in (None, "", "?") else str(axis))
            for i, axis in enumerate(shape)
        )
        specs.append(TensorSpec(name, dtype, axes))
    if problems:
        raise PlanError(
            f"`{path}`", problems, hint="Give inputs and outputs a shape (onnx.shape_inference) and plain tensor types."
        )
    return tuple(specs)


def _digest(path: Path, external: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for file in (path, *sorted(external)):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return "sha256:" + digest.hexdigest()
