"""Runs in the environment of the tool chain ``tflite-micro`` (see targets/toolchains/runner.py).

Actions: ``smoke``; ``open`` a model in an arena and say how much of it is used; ``run`` rows from an ``.npz`` file.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

_USED = re.compile(r"Arena allocation (total|head|tail) (\d+) bytes")
_loaded: dict[str, Any] = {}


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """One request; raises what the interpreter raises."""
    action = request["action"]
    if action == "smoke":
        return _smoke()
    if action == "open":
        return _open(request["model"], int(request["arena_bytes"]))
    if action == "run":
        return _run(Path(request["inputs"]), Path(request["outputs"]))
    raise ValueError(f"unknown action {action}")


def _smoke() -> dict[str, Any]:
    import tflite_micro
    from tflite_micro import runtime

    model = Path(tflite_micro.__file__).parent / "python" / "tflite_micro" / "sine_float.tflite"
    interpreter = runtime.Interpreter.from_file(str(model))
    interpreter.set_input(np.full((1, 1), np.pi / 2, np.float32), 0)
    interpreter.invoke()
    found = float(interpreter.get_output(0).item())
    if abs(found - 1) > 0.1:
        raise RuntimeError(f"the sine model that comes with the package says sin(pi/2) = {found:.3f}")
    return {"version": version("tflite_micro"), "sine": found}


def _open(model: str, arena_bytes: int) -> dict[str, Any]:
    from tflite_micro import runtime

    interpreter = runtime.Interpreter.from_file(model, arena_size=arena_bytes)
    _loaded["interpreter"] = interpreter
    detail = interpreter.get_input_details(0)
    interpreter.set_input(np.zeros(detail["shape"], detail["dtype"]), 0)
    interpreter.invoke()
    return {"version": version("tflite_micro"), "arena": _arena(interpreter)}


def _arena(interpreter: Any) -> dict[str, int]:
    """The recording allocator writes to stderr only."""
    saved = os.dup(2)
    with tempfile.TemporaryFile() as stream:
        os.dup2(stream.fileno(), 2)
        try:
            interpreter.print_allocations()
        finally:
            os.dup2(saved, 2)
            os.close(saved)
        stream.seek(0)
        return {name: int(value) for name, value in _USED.findall(stream.read().decode("utf-8", "replace"))}


def _run(inputs: Path, outputs: Path) -> dict[str, Any]:
    """``inputs`` holds arrays ``0``, ``1`` ... of shape (rows, *the model's input*); outputs are stored likewise."""
    interpreter = _loaded["interpreter"]
    with np.load(inputs) as file:
        given = [file[str(place)] for place in range(len(file.files))]
    found: list[list[Any]] = []
    for row in range(len(given[0])):
        for place, array in enumerate(given):
            interpreter.set_input(array[row], place)
        interpreter.invoke()
        count = len(found[0]) if found else _outputs(interpreter)
        found.append([interpreter.get_output(place) for place in range(count)])
    arrays: dict[str, Any] = {str(place): np.stack([row[place] for row in found]) for place in range(len(found[0]))}
    with outputs.open("wb") as stream:
        np.savez(stream, **arrays)
    return {"rows": len(given[0])}


def _outputs(interpreter: Any) -> int:
    count = 0
    while True:
        try:
            interpreter.get_output_details(count)
        except (RuntimeError, IndexError, ValueError):
            return count
        count += 1
