"""A tool chain's worker that stays: one JSON request per line, one JSON reply per line, until it is closed."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from compressor.errors import RunError
from compressor.types import Array
from targets import toolchain
from targets.isolation import Limits

_TAIL_CHARACTERS = 600


class Worker:
    """The running process. ``limits.seconds`` is for each request, ``limits.memory_mib`` for the process."""

    def __init__(self, process: subprocess.Popen[str], complaints: IO[bytes], limits: Limits, what: str) -> None:
        self._process, self._complaints, self._limits, self._what = process, complaints, limits, what

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and wait. Raises :class:`RunError` when it dies, is too slow, too large, or says no."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()
        timer = threading.Timer(self._limits.seconds, self._stop, (late,))
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""  # it is gone: said below
        finally:
            timer.cancel()
        if late.is_set():
            raise RunError(f"{self._what} took longer than the limit of {self._limits.seconds:g} s and was stopped")
        if not line:
            raise RunError(self._end())
        self._check_memory()
        reply: dict[str, Any] = json.loads(line)
        if not reply.get("ok"):
            raise RunError(f"{self._what} failed: {reply.get('error', 'no reason given')}{self._tail()}")
        return reply

    def _stop(self, late: threading.Event) -> None:
        late.set()
        self._process.kill()

    def _check_memory(self) -> None:
        import psutil

        with contextlib.suppress(psutil.Error):
            used = psutil.Process(self._process.pid).memory_info().rss / 2**20
            if used > self._limits.memory_mib:
                self._process.kill()
                most = self._limits.memory_mib
                raise RunError(f"{self._what} used {used:.0f} MiB, more than the limit of {most:.0f} MiB")

    def _end(self) -> str:
        code = self._process.wait()
        known = -code in set(signal.Signals)
        how = f"was ended by {signal.Signals(-code).name}" if known else f"ended with code {code}"
        return f"the process of {self._what} {how}{self._tail()}"

    def _tail(self) -> str:
        self._complaints.seek(0)
        said = self._complaints.read().decode("utf-8", "replace").strip()[-_TAIL_CHARACTERS:]
        return f": {said}" if said else ""


@contextmanager
def open_worker(name: str, limits: Limits, what: str) -> Iterator[Worker]:
    """Start the worker of tool chain ``name``; it ends with the context. Raises :class:`TargetUnavailable`."""
    arguments = [str(toolchain.interpreter(name)), *toolchain.command(name)]
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=toolchain.environment(),
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(OSError):
                process.stdin.write('{"action": "stay"}\n')
            yield Worker(process, complaints, limits, what)
        finally:
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def exchange(worker: Worker, folder: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """One ``run`` of the worker: arrays by name go and come as ``.npz`` files in ``folder``."""
    given, found = folder / "inputs.npz", folder / "outputs.npz"
    arrays: dict[str, Any] = dict(inputs)
    np.savez(given, **arrays)
    worker.ask({"action": "run", "inputs": str(given), "outputs": str(found)})
    with np.load(found) as file:
        return {name: file[name] for name in file.files}
