"""Runs in the environment of the tool chain ``executorch`` (see targets/toolchains/runner.py).

Actions: ``smoke``; ``compile`` a static graph (:mod:`targets.graph_file`) to a ``.pte`` program; ``open`` a program in
ExecuTorch's runtime; ``run`` pieces from an ``.npz`` file; ``times``: run one piece several times, each timed here.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from targets.clock import available_priority, real_time
from targets.graph_file import load_graph

_loaded: dict[str, Any] = {}


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """One request; raises what the exporter or the runtime raises."""
    action = request["action"]
    if action == "smoke":
        return _smoke()
    if action == "compile":
        return _compile(Path(request["graph"]), Path(request["pte"]))
    if action == "open":
        return _open(request)
    if action == "run":
        return _run(Path(request["inputs"]), Path(request["outputs"]))
    if action == "times":
        return _times(Path(request["inputs"]), int(request["count"]))
    if action == "memory":
        return {"baseline_mib": _loaded["baseline"], "peak_mib": _peak_mib()}
    raise ValueError(f"unknown action {action}")


def _compile(graph_file: Path, pte: Path) -> dict[str, Any]:
    import torch

    from targets.backends.executorch.module import OnnxModule

    torch.set_num_threads(1)
    graph = load_graph(graph_file)
    samples = tuple(
        torch.zeros(graph.shape(name), dtype=getattr(torch, graph.types[name].name)) for name in graph.inputs
    )

    def make(at_run_time: bool) -> dict[str, Any]:
        module = OnnxModule(graph, at_run_time).eval()
        return {**_lowered(module, samples, pte), **module.coverage()}

    try:
        return make(True)
    except RuntimeError as error:
        if "Missing out variants" not in str(error):
            raise
        return make(False)  # a quantization that no delegate took, and that portable kernels do not know


def _lowered(module: Any, samples: tuple[Any, ...], pte: Path) -> dict[str, Any]:
    """Write ``module`` as a program; operations inside the delegates and outside of them."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with torch.no_grad():
        exported = torch.export.export(module, samples)
        lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        program = lowered.to_executorch()
    pte.write_bytes(program.buffer)
    return _placement(lowered.exported_program())


def _placement(program: Any) -> dict[str, Any]:
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


def _open(request: Mapping[str, Any]) -> dict[str, Any]:
    """``inputs``: name to shape of one piece, in the order of the program; ``outputs``: names."""
    import torch  # noqa: F401  the runtime's Python module needs it
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(int(request["threads"]))  # the only way to set its size
    runtime = Runtime.get()
    _loaded["baseline"] = _peak_mib()
    _loaded["program"] = runtime.load_program(request["pte"])  # must outlive its method
    _loaded["method"] = _loaded["program"].load_method("forward")
    _loaded.update(inputs=dict(request["inputs"]), outputs=list(request["outputs"]))
    return {"versions": {name: version(name) for name in ("executorch", "torch")}}


def _call(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """One piece, arrays in and arrays out: what a caller of the runtime pays."""
    import torch

    values = _loaded["method"].execute([torch.from_numpy(inputs[name]) for name in _loaded["inputs"]])
    return {name: value.numpy().copy() for name, value in zip(_loaded["outputs"], values, strict=True)}


def _run(inputs: Path, outputs: Path) -> dict[str, Any]:
    """Any number of pieces, one after the other in the arrays."""
    with np.load(inputs) as file:
        given = {name: file[name] for name in _loaded["inputs"]}
    name, shape = next(iter(_loaded["inputs"].items()))
    size = shape[0]
    found = [
        _call({key: np.ascontiguousarray(array[start : start + size]) for key, array in given.items()})
        for start in range(0, len(given[name]), size)
    ]
    with outputs.open("wb") as stream:
        np.savez(stream, **{key: np.concatenate([piece[key] for piece in found]) for key in _loaded["outputs"]})  # type: ignore[arg-type]
    return {"pieces": len(found)}


def _times(inputs: Path, count: int) -> dict[str, Any]:
    """Time of each of ``count`` runs, in ns, under the priority that measured models in the main process get."""
    with np.load(inputs) as file:
        given = {name: file[name] for name in _loaded["inputs"]}
    _loaded.setdefault("priority", available_priority())
    found = []
    gc.disable()
    try:
        with real_time(_loaded["priority"]):
            for _ in range(count):
                before = time.perf_counter_ns()
                _call(given)
                found.append(time.perf_counter_ns() - before)
    finally:
        gc.enable()
    return {"times": found}


def _peak_mib() -> float:
    """Highest resident set of this process so far; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if sys.platform != "linux":
        return 0.0
    line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def _smoke() -> dict[str, Any]:
    """Lower and run ``relu(x @ w)``, to see that exporter, delegate and runtime work together."""
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.ReLU()).eval()
    with torch.no_grad():
        module[0].weight.fill_(1.5)
    with tempfile.TemporaryDirectory() as folder:
        pte = Path(folder) / "smoke.pte"
        _lowered(module, (torch.zeros(1, 2),), pte)
        opened = _open({"pte": str(pte), "threads": 1, "inputs": {"x": [1, 2]}, "outputs": ["y"]})
        result = float(_call({"x": np.ones((1, 2), np.float32)})["y"][0, 0])
    if abs(result - 3.0) > 1e-5:
        raise RuntimeError(f"1.5 + 1.5 = {result} in ExecuTorch")
    return {**opened, "sum": result}
