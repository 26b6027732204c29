#!/usr/bin/env python3
"""Runs on the device: Python 3.9 or later, numpy and onnxruntime, nothing else. Requests on stdin, replies on stdout.

A frame is its length (uint64, little endian) and a message: header length (uint32), JSON header, bytes of the arrays.
Actions: ``hello`` (what device this is), ``missing`` (files that are not here with the right checksum), ``open`` a
model, ``run`` it, ``times`` of so many runs, ``memory`` of this process.
"""

# This file is copied to devices and must run alone, with the Python that they have.

from __future__ import annotations

import gc
import hashlib
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
    import onnxruntime

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__, "python": platform.python_version()}
    return {"processor": processor(), "machine": platform.machine(), "cores": cores, "versions": versions}


def missing(files: dict[str, str]) -> dict[str, Any]:
    """``files``: path -> SHA-256."""
    wrong = []
    for name, digest in files.items():
        path = Path(name)
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            wrong.append(name)
    return {"missing": wrong}


def open_model(path: str, settings: dict[str, Any]) -> Any:
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
        state["session"] = open_model(header["path"], header["settings"])
        return {}, {}
    session = state["session"]
    if action == "times":
        return times(session, arrays, header["count"]), {}
    if action == "run":
        names = [output.name for output in session.get_outputs()]
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
