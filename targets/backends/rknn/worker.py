"""Runs in the environment of the tool chain ``rknn`` (see targets/toolchains/runner.py).

Actions: ``smoke``; ``compile`` an ONNX file of fixed shapes to a ``.rknn`` file; ``open``: build the same again and
start the simulator (it takes a graph that was just built, not a file); ``run`` pieces from an ``.npz`` file.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from targets.backends.rknn.watch import COLOURS, Stuck, watched

_SWITCH_OFF = re.compile(r"disable_rules=\['([\w.-]+)'\]")  # what the toolkit advises when one of its rules breaks
_CUSTOM = re.compile(r"No lowering found for: (.+?), node type = (\w+), use CustomOperatorLower")
_RAISED = re.compile(r"^(?:(?:\w+\.)*(\w*(?:Error|Exception))|(?:\w+\.)+(\w+)): ", re.MULTILINE)
_PASSES = re.compile(r"^D (\w+) \.\.\.$", re.MULTILINE)
_MOST_OFF = 5  # beyond, what is left of the toolkit's rules was seen to run in circles
# What level 3 changes in a quantized file: scales of tensors, and a Conv fused with the Add behind it, which drops the
# rounding between them and with it the ReLU that a zero point at the end of the range stands for.
_QUANTIZED = "The QAT model is loaded"
_RESCALED = re.compile(r"^D +(adjust_\w+): \[(.*)\]", re.MULTILINE)
_FUSED = re.compile(r"\] +\d+ +(Conv\w*Add\w*) +U?INT8 .* \w+:(\S+)\s*$", re.MULTILINE)
_BEST, _FAITHFUL = 3, 2  # levels of optimisation
_SHARE = 0.9  # of the time limit, so that the reason comes out before the process is stopped
_loaded: dict[str, Any] = {}


class Refused(Exception):
    """The toolkit did not take the model."""


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """One request; raises what the toolkit raises."""
    action = request["action"]
    if action == "smoke":
        return _smoke()
    if action in ("compile", "open"):
        rknn, found = _build(request)
        if action == "open":
            _check(rknn.init_runtime(target=None), "start the simulator")
            _loaded.update(rknn=rknn, inputs=dict(request["inputs"]), outputs=list(request["outputs"]))
        return found
    if action == "run":
        return _run(Path(request["inputs"]), Path(request["outputs"]))
    raise ValueError(f"unknown action {action}")


def _build(request: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Build and export; a rule of the toolkit that breaks on this model or runs in circles is switched off.

    Where no level of optimisation is asked for it is 3, or 2 if 3 changes what a quantized file computes.
    """
    level: int | None = request["optimisation"]
    changed: list[tuple[str, str]] = []
    off, deadline = list(request.get("off", ())), time.monotonic() + _SHARE * float(request["seconds"])
    while True:
        log: list[str] = []
        try:
            with _captured(log) as stream, watched(stream, deadline):
                rknn = _attempt(request, off, _BEST if level is None else level)
        except (Exception, SystemExit, Stuck) as error:
            advised = error.rules if isinstance(error, Stuck) else _SWITCH_OFF.findall("".join(log))[-1:]
            rule = next((name for name in advised if name not in off), None)
            if rule is None or len(off) >= _MOST_OFF:
                raise Refused(_reason(error, "".join(log))) from error
            off.append(rule)
            continue
        text = "".join(log)
        if level is None:
            changed = changes_of(text)
            level = _FAITHFUL if changed else _BEST
            if changed:
                continue
        found = {"log": text, "off": off, "level": level, "changed": changed, "custom": _CUSTOM.findall(text)}
        return rknn, {**found, "versions": _versions()}


def changes_of(log: str) -> list[tuple[str, str]]:
    """Rules of level 3 that change what a quantized file computes, each with the nodes, from the log of a build."""
    if _QUANTIZED not in log:
        return []
    return list(dict.fromkeys([*_RESCALED.findall(log), *_FUSED.findall(log)]))


def _attempt(request: Mapping[str, Any], off: list[str], level: int) -> Any:
    from rknn.api import RKNN

    rknn = RKNN(verbose=True)
    settings = {"quantized_algorithm": request["quantizer"], "optimization_level": level}
    more = {"disable_rules": off} if off else {}
    _check(rknn.config(target_platform=request["chip"], **settings, **more), "set the options")
    dataset = request.get("dataset")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # it drops files of its own when it fails
        _check(rknn.load_onnx(model=request["model"]), "read the model")
        listed = _dataset(Path(dataset), list(request["inputs"]), Path(folder)) if dataset else None
        _check(rknn.build(do_quantization=dataset is not None, dataset=listed), "build the model")
    _check(rknn.export_rknn(request["rknn"]), "write the file")
    return rknn


def _dataset(arrays: Path, inputs: list[str], folder: Path) -> str:
    """The toolkit's list: a line for each sample, a file for each input, in the order of the model's inputs."""
    lines = []
    with np.load(arrays) as file:
        given = {name: file[name] for name in inputs}
    for number in range(len(given[inputs[0]])):
        names = [str(folder / f"{number}-{position}.npy") for position in range(len(inputs))]
        for path, name in zip(names, inputs, strict=True):
            np.save(path, given[name][number : number + 1])
        lines.append(" ".join(names))
    listed = folder / "dataset.txt"
    listed.write_text("\n".join(lines) + "\n")
    return str(listed)


def _check(code: int, doing: str) -> None:
    if code != 0:
        raise Refused(f"could not {doing} (code {code})")


def _reason(error: BaseException, log: str) -> str:
    """The toolkit's errors carry whole tracebacks as their text: what stands after them, and the pass it was in."""
    if isinstance(error, Stuck):
        return error.said
    text = COLOURS.sub("", str(error)).strip()
    found = list(_RAISED.finditer(text))
    kind, said = (found[-1][1] or found[-1][2], text[found[-1].end() :]) if found else (type(error).__name__, text)
    told = " ".join(said.split())[:600]
    if kind in ("ValueError", "Refused"):
        return told or kind
    doing = _PASSES.findall(log)
    return f"it broke with {kind} ({told})" + (f" in its pass {doing[-1]}" if doing else "")


@contextlib.contextmanager
def _captured(log: list[str]) -> Iterator[int]:
    """What Python and C code print meanwhile goes into ``log`` at the end; before, it lies in the given descriptor."""
    _flush()
    kept = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        try:
            yield stream.fileno()
        finally:
            _flush()
            for number, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, number)
                os.close(saved)
            stream.seek(0)
            log.append(COLOURS.sub("", stream.read().decode("utf-8", "replace")))


def _flush() -> None:
    """Python's streams and C's: a part of what the toolkit says lies in C's buffer until the process ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)


def _run(inputs: Path, outputs: Path) -> dict[str, Any]:
    """Any number of pieces, one after the other in the arrays."""
    with np.load(inputs) as file:
        given = {name: file[name] for name in _loaded["inputs"]}
    first = next(iter(_loaded["inputs"]))
    size = _loaded["inputs"][first][0]
    pieces = [
        _infer([np.ascontiguousarray(array[start : start + size]) for array in given.values()])
        for start in range(0, len(given[first]), size)
    ]
    found = {name: np.concatenate([piece[place] for piece in pieces]) for place, name in enumerate(_loaded["outputs"])}
    with outputs.open("wb") as stream:
        np.savez(stream, **found)  # type: ignore[arg-type]
    return {"pieces": len(pieces)}


def _infer(values: list[Any]) -> list[Any]:
    with _captured([]):  # it prints a progress bar at the first run
        found = _loaded["rknn"].inference(inputs=values, data_format=["nchw"] * len(values))
    if found is None:
        raise Refused("the simulator gave no outputs")
    return list(found)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("rknn-toolkit2", "torch")}


def _smoke() -> dict[str, Any]:
    """Build and simulate ``relu(conv(x))`` for one chip: the toolkit runs with a newer torch than it declares."""
    import onnx
    from onnx import helper, numpy_helper

    weight = numpy_helper.from_array(np.full((1, 1, 1, 1), 1.5, np.float32), "w")
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], "conv"), helper.make_node("Relu", ["c"], ["y"], "relu")]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1, 4, 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "smoke", ends[:1], ends[1:], [weight])
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "smoke.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(model))
        request = {
            "action": "open",
            "model": str(model),
            "rknn": str(Path(folder) / "smoke.rknn"),
            "chip": "rk3588",
            "quantizer": "normal",
            "optimisation": None,
            "seconds": 600,
            "inputs": {"x": [1, 1, 4, 4]},
            "outputs": ["y"],
        }
        answer(request)
        result = float(_infer([np.full((1, 1, 4, 4), 2.0, np.float32)])[0].max())
    if abs(result - 3.0) > 0.01:  # fp16 on the NPU
        raise RuntimeError(f"1.5 x 2 = {result} in the simulator")
    return {"versions": _versions(), "product": result}
