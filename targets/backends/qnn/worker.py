"""Runs in the environment of the tool chain ``qnn`` (see targets/toolchains/runner.py).

Actions: ``smoke``; ``compile`` an ONNX file of fixed shapes to a context binary; ``open`` such a context in the x86
simulator of the Hexagon tensor processor; ``run`` batches from an ``.npz`` file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

# ONNX, opset 17: y = x + x, both float32 of shape (1, 4); the environment has no onnx package to make it
_SUM = (
    b'\x08\t:D\n\x13\n\x01x\n\x01x\x12\x01y\x1a\x03sum"\x03Add\x12\x03sumZ\x13\n\x01x\x12'
    b"\x0e\n\x0c\x08\x01\x12\x08\n\x02\x08\x01\n\x02\x08\x04b\x13\n\x01y\x12\x0e\n\x0c\x08\x01\x12\x08\n\x02\x08\x01\n\x02\x08\x04"
    b"B\x04\n\x00\x10\x11"
)
PROVIDER = "QNNExecutionProvider"
_loaded: dict[str, Any] = {}


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """One request; raises what the runtime raises."""
    action = request["action"]
    if action == "smoke":
        return _smoke()
    if action == "compile":
        return _compile(Path(request["model"]), Path(request["context"]), request["options"])
    if action == "open":
        return _open(Path(request["context"]))
    if action == "run":
        return _run(Path(request["inputs"]), Path(request["outputs"]))
    raise ValueError(f"unknown action {action}")


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("onnxruntime", "onnxruntime-qnn")}


def _options(settings: Mapping[str, str], entries: Mapping[str, str]) -> Any:
    """Session options with the QNN provider on its x86 simulator."""
    import onnxruntime
    import onnxruntime_qnn

    if "registered" not in _loaded:
        onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
        _loaded["registered"] = True
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER][:1]
    if not devices:
        raise RuntimeError("the QNN provider offers no device here")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    options.add_provider_for_devices(devices, {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), **settings})
    return options


def _compile(model: Path, context: Path, settings: Mapping[str, str]) -> dict[str, Any]:
    import onnxruntime

    for old in context.parent.glob(f"{context.stem}*"):  # the provider refuses to overwrite
        old.unlink()
    entries = {
        "ep.context_enable": "1",
        "ep.context_file_path": str(context),
        "ep.context_embed_mode": "0",
        "session.record_ep_graph_assignment_info": "1",
    }
    session = onnxruntime.InferenceSession(str(model), _options(settings, entries))
    nodes = [
        (part.ep_name, node.op_type, node.name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    placed = [(operator, name) for provider, operator, name in nodes if provider == PROVIDER]
    left = [(operator, name) for provider, operator, name in nodes if provider != PROVIDER]
    return {"placed": placed, "left": left, "versions": _versions()}


def _open(context: Path) -> dict[str, Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(context), _options({}, {}))
    _loaded["session"] = session
    return {"inputs": {item.name: item.shape for item in session.get_inputs()}}


def _run(inputs: Path, outputs: Path) -> dict[str, Any]:
    session = _loaded["session"]
    with np.load(inputs) as file:
        found = session.run(None, {name: file[name] for name in file.files})
    names = [item.name for item in session.get_outputs()]
    with outputs.open("wb") as stream:
        np.savez(stream, **dict(zip(names, found, strict=True)))
    return {"outputs": names}


def _smoke() -> dict[str, Any]:
    """Compile and run an elementwise sum, to see that the libraries load and the simulator answers."""
    with tempfile.TemporaryDirectory() as folder:
        model, context = Path(folder) / "sum.onnx", Path(folder) / "sum_ctx.onnx"
        model.write_bytes(_SUM)
        _compile(model, context, {"soc_model": "57", "htp_arch": "75"})
        _open(context)
        given, found = Path(folder) / "in.npz", Path(folder) / "out.npz"
        np.savez(given, x=np.full((1, 4), 1.5, np.float32))
        _run(given, found)
        with np.load(found) as file:
            result = float(file["y"].max())
    if abs(result - 3.0) > 0.01:  # fp16 on the processor
        raise RuntimeError(f"1.5 + 1.5 = {result} in the simulator")
    return {"versions": _versions(), "sum": result}
