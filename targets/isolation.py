"""Vendor code in a child process: a time limit, a memory limit, and an end that becomes a reply or a typed error.

The parent sends one JSON request (:func:`call_worker`); the child reads it, answers with one JSON object and ends
(:func:`serve`). Converters crash, hang, print to the C level's stdout and take gigabytes: none of that may happen in
the process that trains and measures.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from compressor.errors import CompileError

_POLL_SECONDS = 0.02
_TAIL_CHARACTERS = 600
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Limits:
    """What a child process may use. Memory is its resident set, checked every 20 ms.

    RLIMIT_DATA was tried instead: TensorRT-RTX 1.7.1 answers an allocation that fails inside a compiler thread with a
    deadlock.
    """

    seconds: float
    memory_mib: float


def call_worker(
    command: Sequence[str],
    request: Mapping[str, Any],
    limits: Limits,
    what: str,
    *,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Start ``python *command``, send it ``request`` and return its reply.

    ``what`` names the work in errors ("the TensorRT build"); ``environment`` replaces the child's. Raises
    :class:`CompileError` when the child dies, hits a limit or does not answer.
    """
    with (
        tempfile.TemporaryFile() as source,
        tempfile.TemporaryFile() as reply,
        tempfile.TemporaryFile() as complaints,
    ):
        source.write(json.dumps(request).encode())
        source.seek(0)
        process = subprocess.Popen(
            [python, *command], stdin=source, stdout=reply, stderr=complaints, env=environment or _environment()
        )
        try:
            _wait(process, limits, what)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        return _read(process.returncode, _text(reply), _text(complaints), what)


def serve(answer: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> int:
    """The child's side: answer the request on stdin; whatever else is printed, by C code too, goes to stderr."""
    _die_with_parent()
    reply_stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    with reply_stream:
        json.dump(answer(request), reply_stream)
    return 0


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent goes, so that ``kill -9`` of a run leaves no orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _environment() -> dict[str, str]:
    """The child must find this package however the parent did (checkout, zip of a test run, installation)."""
    root = str(Path(__file__).resolve().parents[1])
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": root + (os.pathsep + inherited if inherited else "")}


def _wait(process: subprocess.Popen[bytes], limits: Limits, what: str) -> None:
    import psutil

    watched = psutil.Process(process.pid)
    deadline = time.monotonic() + limits.seconds
    while True:
        try:
            process.wait(_POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            pass
        try:
            used_mib = watched.memory_info().rss / 2**20
        except psutil.Error:  # it ended between the two calls
            used_mib = 0.0
        if used_mib > limits.memory_mib:
            raise CompileError(
                f"{what} used {used_mib:.0f} MiB, more than the limit of {limits.memory_mib:.0f} MiB",
                hint="Raise `options.memory_limit_mib` of the profile, or give a smaller model.",
            )
        if time.monotonic() > deadline:
            raise CompileError(
                f"{what} took longer than the limit of {limits.seconds:g} s and was stopped",
                hint="Raise `options.timeout_s` of the profile.",
            )


def _text(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode("utf-8", "replace")


def _read(code: int, reply: str, complaints: str, what: str) -> dict[str, Any]:
    tail = complaints.strip()[-_TAIL_CHARACTERS:]
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        raise CompileError(
            f"the process of {what} was ended by {name}{f': {tail}' if tail else ''}",
            hint="The vendor's library crashed or the system ran out of memory; the model file is untouched.",
        )
    if code != 0:
        raise CompileError(f"the process of {what} ended with code {code}: {tail or 'no message'}")
    try:
        answer: dict[str, Any] = json.loads(reply)
    except json.JSONDecodeError as error:
        raise CompileError(f"the process of {what} gave no readable reply ({error}): {tail or 'no message'}") from error
    return answer
