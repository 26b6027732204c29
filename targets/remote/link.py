"""What every connection to a device has: requests to the runner over there, and files under their checksums."""

from __future__ import annotations

import abc
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from compressor.errors import RunError
from compressor.types import Array
from targets.messages import decode, encode

RUNNER = Path(__file__).parent / "runner.py"
RESUMES = "Run the same command again: it resumes."
NEEDS = "The device needs Python 3.9, numpy and onnxruntime; name its interpreter by ?python=PATH."


class Link(abc.ABC):
    """An open connection with the runner as a process that stays. ``folder`` is ours on the device."""

    folder: str

    def ask(self, header: Mapping[str, Any], arrays: Mapping[str, Array] | None = None) -> Any:
        """One request to the runner: its reply's header and arrays. Raises RunError, or DeviceLost."""
        message = encode(header, arrays or {})
        found, outputs = decode(self.exchange(struct.pack("<Q", len(message)) + message))
        if not found.pop("ok"):
            raise RunError(f"on {self}: {found.get('error', 'no reason given')}")
        return found, outputs

    def bring(self, files: Sequence[tuple[Path, str, str]]) -> None:
        """Copy ``(local, remote, sha256)``; what is there with the right checksum stays. Checked after the transfer."""
        wanted = {remote: digest for _, remote, digest in files}
        missing = set(self.ask({"action": "missing", "files": wanted})[0]["missing"])
        self.send([(local, remote) for local, remote, _ in files if remote in missing])
        if missing and (wrong := self.ask({"action": "missing", "files": wanted})[0]["missing"]):
            raise RunError(f"{', '.join(wrong)} arrived damaged on {self}", hint="Is its disk full?")

    @abc.abstractmethod
    def exchange(self, frame: bytes) -> bytes:
        """Send a frame (its length and the message), and return the reply's message."""

    @abc.abstractmethod
    def send(self, pairs: Sequence[tuple[Path, str]]) -> None:
        """Copy files to the device; a file appears under its name only when it is whole."""

    @abc.abstractmethod
    def restart(self) -> None:
        """A fresh process on the device: what a crashed model left behind is gone."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the runner and the connection."""

    def __enter__(self) -> Link:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
