"""A connection to a device over SSH: files by SFTP, the runner as a process that stays.

Host keys are checked against ``known_hosts`` and never accepted on the fly; keys come from the user's agent, files and
``~/.ssh/config``. There is no password on the command line: a device that only takes passwords is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import struct
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

from compressor.errors import ConfigError, DeviceLost, TargetUnavailable
from targets.remote.link import NEEDS, RESUMES, RUNNER, Link

FOLDER = ".cache/compress-for-device"  # under the home of the user on the device
INSTALL = "pip install 'compress-for-device[remote]'"
_CONNECT_S = 20.0
T = TypeVar("T")


@dataclass(frozen=True)
class Address:
    """Where a device is: ``ssh://user@host:port``, ``?python=`` the interpreter over there."""

    host: str
    port: int | None = None
    user: str | None = None
    python: str = "python3"

    @property
    def command(self) -> str:
        """How a person connects."""
        return f"ssh {f'-p {self.port} ' if self.port else ''}{f'{self.user}@' if self.user else ''}{self.host}"

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        return f"ssh://{user}{self.host}{f':{self.port}' if self.port else ''}"


def parse_address(text: str) -> Address:
    """Raises :class:`ConfigError`; a password in the address is refused."""
    subject, hint = f"device address `{text}`", "ssh://user@host:port, or ssh://host?python=/path/to/python"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ConfigError.single(subject, "address", str(error), hint=hint) from error
    if parts.scheme != "ssh" or not parts.hostname or parts.path not in ("", "/"):
        raise ConfigError.single(subject, "address", "is not of the form ssh://user@host:port", hint=hint)
    if parts.password is not None:
        what = "a password on the command line can be read by every user of this machine"
        raise ConfigError.single(
            "device address `ssh://...`", "password", what, hint="Use a key: ssh-copy-id USER@HOST."
        )
    query = parse_qs(parts.query)
    if unknown := sorted(set(query) - {"python"}):
        raise ConfigError.single(subject, unknown[0], "unknown; known: python", hint=hint)
    return Address(parts.hostname, port, parts.username, query.get("python", ["python3"])[0])


class SshLink(Link):
    """An open connection. Its coroutines run on a thread of their own, so that callers stay synchronous."""

    def __init__(self, address: Address, timeout_s: float = 300.0) -> None:
        """Connect, bring the runner and start it. Raises :class:`TargetUnavailable`."""
        self.address, self._timeout_s = address, timeout_s
        self._process: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._connection: Any = None
        try:
            self._wait(self._connect(), _CONNECT_S)
            self.folder = self._wait(self._bring_runner(), _CONNECT_S)
            self._start()
        except BaseException:
            self.close()
            raise

    async def _connect(self) -> None:
        try:
            import asyncssh
        except ImportError as error:
            raise TargetUnavailable("asyncssh is not installed", hint=INSTALL) from error
        address = self.address
        given: dict[str, Any] = {"password": None, "kbdint_auth": False, "password_auth": False}
        given |= {"username": address.user} if address.user else {}
        given |= {"port": address.port} if address.port else {}
        try:
            self._connection = await asyncssh.connect(address.host, keepalive_interval=10, **given)
        except asyncssh.HostKeyNotVerifiable as error:
            hint = f"Check its fingerprint and add it: {address.command}"
            raise TargetUnavailable(f"the host key of {address} is not known: {error}", hint=hint) from error
        except asyncssh.PermissionDenied as error:
            raise TargetUnavailable(f"{address} refused every key: {error}", hint="ssh-copy-id USER@HOST") from error
        except (OSError, asyncssh.Error) as error:
            raise TargetUnavailable(f"cannot connect to {address}: {error}", hint="Is the device on?") from error

    async def _bring_runner(self) -> str:
        """Write the runner under its digest; returns the folder on the device."""
        content = RUNNER.read_bytes()
        name = f"runner-{hashlib.sha256(content).hexdigest()[:16]}.py"
        async with self._connection.start_sftp_client() as sftp:
            folder = str(PurePosixPath(await sftp.realpath(".")) / FOLDER)
            await sftp.makedirs(folder, exist_ok=True)
            async with sftp.open(f"{folder}/{name}", "wb") as file:
                await file.write(content)
        self._command = f"{_quoted(self.address.python)} {_quoted(f'{folder}/{name}')}"
        return folder

    def _start(self) -> None:
        self._process = self._wait(self._create(), _CONNECT_S)

    async def _create(self) -> Any:
        return await self._connection.create_process(self._command, encoding=None)

    def __str__(self) -> str:
        return str(self.address)

    def exchange(self, frame: bytes) -> bytes:
        return self._wait(self._exchange(frame), self._timeout_s)

    async def _exchange(self, frame: bytes) -> bytes:
        process = self._process
        process.stdin.write(frame)
        await process.stdin.drain()
        try:
            (size,) = struct.unpack("<Q", await process.stdout.readexactly(8))
            reply: bytes = await process.stdout.readexactly(size)
        except asyncio.IncompleteReadError:
            raise await self._ended() from None
        return reply

    async def _ended(self) -> Exception:
        """Why there is no reply: the runner went (its own words), or the connection."""
        said = b""
        with contextlib.suppress(TimeoutError, OSError):
            said = await asyncio.wait_for(self._process.stderr.read(), 2)
        text = said.decode("utf-8", "replace").strip()
        if text or self._process.exit_status is not None:
            end = text.splitlines()[-1] if text else f"exit status {self._process.exit_status}"
            return TargetUnavailable(f"the runner on {self.address} ended: {end}", hint=NEEDS)
        return DeviceLost(f"the connection to {self.address} was lost", hint=RESUMES)

    def restart(self) -> None:
        if self._process is not None:
            self._process.close()
        self._start()

    def send(self, pairs: Sequence[tuple[Path, str]]) -> None:
        self._wait(self._send(pairs), self._timeout_s)

    async def _send(self, pairs: Sequence[tuple[Path, str]]) -> None:
        async with self._connection.start_sftp_client() as sftp:
            for local, remote in pairs:
                await sftp.makedirs(str(PurePosixPath(remote).parent), exist_ok=True)
                await sftp.put(str(local), f"{remote}.part")
                await sftp.posix_rename(f"{remote}.part", remote)

    def _wait(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        import concurrent.futures

        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        except (concurrent.futures.TimeoutError, TimeoutError):
            future.cancel()
            raise DeviceLost(f"{self.address} did not answer within {seconds:g} s", hint=RESUMES) from None
        except Exception as error:
            raise self._typed(error) from error

    def _typed(self, error: Exception) -> Exception:
        from compressor.errors import CompressError

        if isinstance(error, CompressError):
            return error
        what = f"the connection to {self.address} was lost: {type(error).__name__}: {error}"
        return DeviceLost(what, hint=RESUMES)

    def close(self) -> None:
        for part in (self._process, self._connection):
            if part is not None:
                self._loop.call_soon_threadsafe(part.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)


def _quoted(word: str) -> str:
    import shlex

    return shlex.quote(word)
