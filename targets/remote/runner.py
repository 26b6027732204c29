#!/usr/bin/env python3
"""Runs on the device: Python 3.9, numpy, and onnxruntime or ai-edge-litert. Requests on stdin, replies on stdout.

A frame is its length (uint64, little endian) and a message: header length (uint32), JSON header, bytes of the arrays.
Actions: ``hello`` (what device this is), ``missing`` (files that are not here with the right checksum), ``open`` a
model, ``run`` it, ``times`` of so many runs, ``memory`` of this process.
"""

# This file is copied to devices and must run alone, with the Python that they have.

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

Message = "tuple[dict[str, Any], dict[str, Any]]"


def read_message(stream: Any) -> Any:
    """The next request; None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    (size,) = struct.unpack("<Q", head)
    body = stream.read(size)
    if len(body) < size:
        return None
    (length,) = struct.unpack_from("<I", body)
    header = json.loads(body[4 : 4 + length])
    arrays, offset = {}, 4 + length
    for item in header.pop("tensors", []):
        end = offset + item["bytes"]
        arrays[item["name"]] = np.frombuffer(body[offset:end], item["type"]).reshape(item["dims"])
        offset = end
    return header, arrays


def write_message(stream: Any, header: dict[str, Any], arrays: dict[str, Any]) -> None:
    tensors, parts = [], []
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        tensors.append({"name": name, "type": str(array.dtype), "dims": list(array.shape), "bytes": array.nbytes})
        parts.append(array.tobytes())
    head = json.dumps({**header, "tensors": tensors}).encode()
    body = struct.pack("<I", len(head)) + head + b"".join(parts)
    stream.write(struct.pack("<Q", len(body)) + body)
    stream.flush()


def processor() -> str:
    """What the device calls its processor: the board where a device tree names it, else the CPU's name."""
    tree = Path("/proc/device-tree/model")
    if tree.is_file():
        return tree.read_text(errors="replace").strip("\0 \n")
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.lower().startswith(("model name", "hardware"))]
    return names[0] if names else platform.processor() or platform.machine()


def hello() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"numpy": np.__version__, "python": platform.python_version(), **runtimes()}
    return {"processor": processor(), "machine": platform.machine(), "cores": cores, "versions": versions}


def runtimes() -> dict[str, str]:
    """Versions of the runtimes that are here."""
    found = {}
    for module, package in (("onnxruntime", "onnxruntime"), ("ai_edge_litert", "ai-edge-litert")):
        if importlib.util.find_spec(module) is not None:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:  # of another name, such as onnxruntime-gpu
                found[package] = "unknown"
    return found


def missing(files: dict[str, str]) -> dict[str, Any]:
    """``files``: path -> SHA-256."""
    wrong = []
    for name, digest in files.items():
        path = Path(name)
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            wrong.append(name)
    return {"missing": wrong}


class TfliteModel:
    """A .tflite file in LiteRT, called as a session of ONNX Runtime is. Its shapes are fixed."""

    def __init__(self, path: str, threads: int) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self.interpreter = Interpreter(model_path=path, num_threads=threads)
        self.interpreter.allocate_tensors()
        self.inputs = {item["name"]: item for item in self.interpreter.get_input_details()}
        places = self.interpreter.get_signature_runner("serving_default").get_output_details()
        self.places = {name: item["index"] for name, item in places.items()}
        self.shapes = {name: [int(size) for size in item["shape"]] for name, item in self.inputs.items()}

    def run(self, _: Any, arrays: dict[str, Any]) -> list[Any]:
        for name, item in self.inputs.items():
            self.interpreter.set_tensor(item["index"], arrays[name].astype(item["dtype"], copy=False))
        self.interpreter.invoke()
        return [self.interpreter.get_tensor(index) for index in self.places.values()]


def open_model(path: str, settings: dict[str, Any]) -> Any:
    if path.endswith(".tflite"):
        return TfliteModel(path, settings["threads"])
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = settings["threads"]
    options.inter_op_num_threads = 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, settings["level"])
    options.enable_cpu_mem_arena = settings["arena"]
    for key, value in settings["entries"].items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def times(session: Any, arrays: dict[str, Any], count: int) -> dict[str, Any]:
    """Each of ``count`` runs in ns; garbage collection is off meanwhile."""
    found = []
    gc.disable()
    try:
        for _ in range(count):
            before = time.perf_counter_ns()
            session.run(None, arrays)
            found.append(time.perf_counter_ns() - before)
    finally:
        gc.enable()
    return {"times": found}


def memory() -> dict[str, Any]:
    """Peak and present resident set in MiB, where the system tells."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return {}
    found = dict(line.split(":", 1) for line in status.read_text().splitlines() if line.startswith("Vm"))
    return {name: int(found[key].split()[0]) / 1024 for name, key in (("peak", "VmHWM"), ("now", "VmRSS"))}


def answer(state: dict[str, Any], header: dict[str, Any], arrays: dict[str, Any]) -> Any:
    action = header["action"]
    if action == "hello":
        return hello(), {}
    if action == "missing":
        return missing(header["files"]), {}
    if action == "memory":
        return memory(), {}
    if action == "open":
        session = state["session"] = open_model(header["path"], header["settings"])
        return {"shapes": session.shapes} if isinstance(session, TfliteModel) else {}, {}
    session = state["session"]
    if action == "times":
        return times(session, arrays, header["count"]), {}
    if action == "run":
        tflite = isinstance(session, TfliteModel)
        names = list(session.places) if tflite else [output.name for output in session.get_outputs()]
        return {}, dict(zip(names, session.run(None, arrays)))  # noqa: B905  Python 3.9 has no strict=
    raise ValueError("unknown action " + action)


def main() -> int:
    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not mix with the replies
    state: dict[str, Any] = {}
    while True:
        message = read_message(sys.stdin.buffer)
        if message is None:
            return 0
        try:
            found, arrays = answer(state, *message)
            write_message(stream, {"ok": True, **found}, arrays)
        except Exception as error:  # noqa: BLE001  the runtime may raise anything; the other side makes it a typed error
            write_message(stream, {"ok": False, "error": type(error).__name__ + ": " + str(error)}, {})


if __name__ == "__main__":
    sys.exit(main())
