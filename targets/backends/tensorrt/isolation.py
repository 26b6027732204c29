"""Run the build worker with a time limit and a memory limit, and turn its end into a reply or a typed error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from compressor.errors import CompileError

_POLL_SECONDS = 0.02
_COMMAND = ("-m", "targets.backends.tensorrt.build_worker")
_TAIL_CHARACTERS = 600


@dataclass(frozen=True)
class Limits:
    """What a child process may use. Memory is its resident set, checked every 20 ms.

    RLIMIT_DATA was tried instead: TensorRT-RTX 1.7.1 answers an allocation that fails inside a compiler thread with a
    deadlock.
    """

    seconds: float
    memory_mib: float


def call_worker(request: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Send ``request`` to a fresh worker and return its reply.

    Raises :class:`CompileError` when it dies or hits a limit.
    """
    with (
        tempfile.TemporaryFile() as source,
        tempfile.TemporaryFile() as reply,
        tempfile.TemporaryFile() as complaints,
    ):
        source.write(json.dumps(request).encode())
        source.seek(0)
        process = subprocess.Popen(
            [sys.executable, *_COMMAND], stdin=source, stdout=reply, stderr=complaints, env=_environment()
        )
        try:
            _wait(process, limits)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        return _read(process.returncode, _text(reply), _text(complaints))


def _environment() -> dict[str, str]:
    """The child must find this package however the parent did (checkout, zip of a test run, installation)."""
    root = str(Path(__file__).resolve().parents[3])
    inherited = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": root + (os.pathsep + inherited if inherited else "")}


def _wait(process: subprocess.Popen[bytes], limits: Limits) -> None:
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
                f"the TensorRT build used {used_mib:.0f} MiB, more than the limit of {limits.memory_mib:.0f} MiB",
                hint="Raise `options.memory_limit_mib` of the profile, or lower `max_batch` and `max_sequence`.",
            )
        if time.monotonic() > deadline:
            raise CompileError(
                f"the TensorRT build took longer than the limit of {limits.seconds:g} s and was stopped",
                hint="Raise `options.timeout_s` of the profile.",
            )


def _text(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode("utf-8", "replace")


def _read(code: int, reply: str, complaints: str) -> dict[str, Any]:
    tail = complaints.strip()[-_TAIL_CHARACTERS:]
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        raise CompileError(
            f"the TensorRT build process was ended by {name}{f': {tail}' if tail else ''}",
            hint="The vendor's library crashed or the system ran out of memory; the model file is untouched.",
        )
    if code != 0:
        raise CompileError(f"the TensorRT build process ended with code {code}: {tail or 'no message'}")
    try:
        answer: dict[str, Any] = json.loads(reply)
    except json.JSONDecodeError as error:
        raise CompileError(
            f"the TensorRT build process gave no readable reply ({error}): {tail or 'no message'}"
        ) from error
    return answer
