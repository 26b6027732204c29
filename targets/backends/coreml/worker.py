"""Runs in the environment of the tool chain ``coreml`` (see targets/toolchains/runner.py).

Actions: ``smoke``; ``compile`` a static graph (:mod:`targets.graph_file`) to an ``.mlpackage``, read that from the disk
again and check its structure; ``evaluate``: build each node of graphs over given values and compare what Core ML Tools
evaluate while building. No model runs here: Core ML is part of Apple's systems.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from targets.graph_file import load_graph
from targets.static_graph import Graph, Node

_DATA = Path("Data") / "com.apple.CoreML"


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """One request; raises what the converter raises."""
    warnings.simplefilter("ignore")
    if request["action"] == "smoke":
        return _smoke()
    if request["action"] == "compile":
        graph = load_graph(Path(request["graph"]))
        return _compile(graph, Path(request["package"]), request["system"], request["about"])
    if request["action"] == "evaluate":
        return {"cases": [_evaluate(Path(case["graph"]), Path(case["values"])) for case in request["cases"]]}
    raise ValueError(f"unknown action {request['action']}")


def _evaluate(graph: Path, values: Path) -> dict[str, Any]:
    import coremltools

    from targets.backends.coreml.program import evaluate

    with np.load(values) as file:
        return evaluate(load_graph(graph), {name: file[name] for name in file.files}, coremltools.target.iOS17)


def _compile(graph: Graph, package: Path, system: str, about: Mapping[str, str]) -> dict[str, Any]:
    import coremltools

    from targets.backends.coreml.program import build, coverage

    target = coremltools.target[system]
    model = coremltools.convert(
        build(graph, target),
        source="milinternal",
        convert_to="mlprogram",
        minimum_deployment_target=target,
        compute_precision=coremltools.precision.FLOAT16,
        skip_model_load=True,
    )
    model.short_description = about["description"]
    model.license = about["licence"]
    shutil.rmtree(package, ignore_errors=True)
    model.save(str(package))
    _settle(package)
    return {**_read(package, graph), **coverage(graph), "versions": {"coremltools": version("coremltools")}}


def _settle(package: Path) -> None:
    """The same model shall give the same files: identifiers are drawn at random, tables are written in any order."""
    import coremltools

    spec = coremltools.utils.load_spec(str(package))
    (package / _DATA / "model.mlmodel").write_bytes(spec.SerializeToString(deterministic=True))
    manifest = package / "Manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    entries = content["itemInfoEntries"]
    names = {found: str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])).upper() for found, item in entries.items()}
    content["itemInfoEntries"] = {names[found]: item for found, item in entries.items()}
    content["rootModelIdentifier"] = names[content["rootModelIdentifier"]]
    manifest.write_text(json.dumps(content, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def _read(package: Path, graph: Graph) -> dict[str, Any]:
    """The package as it lies on the disk. Raises ValueError where its structure is not that of the graph."""
    import coremltools

    spec = coremltools.utils.load_spec(str(package))
    (function,) = spec.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    _check_ends(spec, graph)
    weights = package / _DATA / "weights" / "weight.bin"
    size = weights.stat().st_size if weights.is_file() else 0
    _check_block(block, {item.name for item in function.inputs}, size)
    count = Counter(operation.type for operation in block.operations if operation.type != "const")
    return {
        "operations": dict(count),
        "weight_bytes": size,
        "specification": int(spec.specificationVersion),
        "opset": next(iter(function.block_specializations)),
    }


def _check_ends(spec: Any, graph: Graph) -> None:
    for ends, names in ((spec.description.input, graph.inputs), (spec.description.output, graph.outputs)):
        found = {item.name: tuple(item.type.multiArrayType.shape) for item in ends}
        wanted = {name: tuple(graph.shape(name)) for name in names}
        # a package need not repeat the shapes of outputs
        if set(found) != set(wanted) or any(shape not in ((), wanted[name]) for name, shape in found.items()):
            raise ValueError(f"the package has {found}, the model {wanted}")


def _check_block(block: Any, known: set[str], weight_bytes: int) -> None:
    """Every operand is defined before it is read, every stored tensor lies inside the file of weights."""
    for operation in block.operations:
        for name in _operands(operation):
            if name not in known:
                raise ValueError(f"operation {operation.type} reads `{name}`, which nothing makes")
        for value in (*operation.attributes.values(), *_immediates(operation)):
            if value.HasField("blobFileValue") and not 0 < value.blobFileValue.offset < weight_bytes:
                raise ValueError(f"operation {operation.type} reads weights at {value.blobFileValue.offset}")
        known |= {item.name for item in operation.outputs}
    for name in block.outputs:
        if name not in known:
            raise ValueError(f"output `{name}` is made by nothing")


def _operands(operation: Any) -> Iterator[str]:
    for argument in operation.inputs.values():
        for binding in argument.arguments:
            if binding.WhichOneof("binding") == "name":
                yield binding.name


def _immediates(operation: Any) -> Iterator[Any]:
    for argument in operation.inputs.values():
        for binding in argument.arguments:
            if binding.WhichOneof("binding") == "value":
                yield binding.value


def _smoke() -> dict[str, Any]:
    """Convert ``relu(conv(x))`` and read it back."""
    weight = np.full((2, 1, 3, 3), 0.5, np.float32)
    nodes = (
        Node("Conv", "conv", ("x", "w"), ("c",), {"pads": [1] * 4}),
        Node("Relu", "relu", ("c",), ("y",)),
    )
    shapes = {"x": (1, 1, 4, 4), "c": (1, 2, 4, 4), "y": (1, 2, 4, 4)}
    graph = Graph(nodes, {"w": weight}, shapes, {name: np.dtype("float32") for name in shapes}, ("x",), ("y",))
    with tempfile.TemporaryDirectory() as folder:
        found = _compile(graph, Path(folder) / "smoke.mlpackage", "iOS17", {"description": "smoke", "licence": "none"})
    if found["operations"].get("conv") != 1:
        raise RuntimeError(f"a convolution became {found['operations']}")
    return found
