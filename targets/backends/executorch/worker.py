"""The child process that lowers to ExecuTorch: one JSON request on stdin, one JSON reply on stdout."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.errors import CompileError, sdk_errors
from targets.isolation import serve


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Lower ``onnx`` with ``shapes`` and write ``pte``."""
    try:
        with sdk_errors(CompileError, "lower the model"):
            return {"ok": True, **_lower(request)}
    except CompileError as error:
        return {"ok": False, "error": str(error), "hint": error.hint}


def _lower(request: Mapping[str, Any]) -> dict[str, Any]:
    from targets.static_graph import read_static

    # First, because it is quick: a file that is no model should not cost the import of the exporter.
    graph = read_static(Path(request["onnx"]), {name: tuple(shape) for name, shape in request["shapes"].items()})
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    from targets.backends.executorch.module import OnnxModule

    torch.set_num_threads(1)
    samples = tuple(torch.zeros(graph.shape(name), dtype=_torch_type(graph.types[name].name)) for name in graph.inputs)

    def make(at_run_time: bool) -> dict[str, Any]:
        module = OnnxModule(graph, at_run_time).eval()
        with torch.no_grad():
            exported = torch.export.export(module, samples)
            lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
            program = lowered.to_executorch()
        Path(request["pte"]).write_bytes(program.buffer)
        return {**_placement(lowered.exported_program()), **module.coverage()}

    try:
        return make(True)
    except RuntimeError as error:
        if "Missing out variants" not in str(error):
            raise
        return make(False)  # a quantization that no delegate took, and that portable kernels do not know


def _torch_type(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _placement(program: Any) -> dict[str, Any]:
    """Operations inside the delegates and outside of them."""
    from executorch.exir.lowered_backend_module import get_lowered_submodules

    inside = 0
    delegates = get_lowered_submodules(program.graph_module)
    for _, lowered, _ in delegates:
        nodes = lowered.original_module.graph_module.graph.nodes
        inside += sum(node.op == "call_function" and "quantize_per" not in str(node.target) for node in nodes)
    outside: Counter[str] = Counter()
    for node in program.graph_module.graph.nodes:
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_function" and "getitem" not in name and "executorch_call_delegate" not in name:
            outside[name] += 1
    return {"delegated": inside, "delegates": len(delegates), "outside": dict(outside)}


if __name__ == "__main__":
    sys.exit(serve(answer))
