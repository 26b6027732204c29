"""The content-addressed store: what was done once is never done twice, and a killed run goes on where it was.

    <out>/store/<stage>-<key>/     result.json and the stage's files; complete, never changed afterwards
    <out>/store/<stage>-<key>.partial/   a stage at work or interrupted; resumable stages go on in it
    <out>/cache/                   teacher outputs and predictions
    <out>/runs/<digest>/           plan.json, stages, artifacts, targets, packages, report.*, log.jsonl

The key of a stage is the digest of everything its result depends on: code, configuration, inputs' digests, seed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from compressor.errors import ConfigError, StageError
from compressor.types import LayerFact, StageResult, file_digest, write_atomic

Event = Callable[[str, Mapping[str, Any]], None]
RESULT = "result.json"
_FACTS = TypeAdapter(tuple[LayerFact, ...])


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-able value in canonical form (hex, 64 characters)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def code_digest(*packages: str) -> str:
    """Digest of the source of sub-packages or modules of ``compressor``: a changed program never reuses old results."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for package in sorted(packages):
        base = root / package
        files = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
        for path in files:
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass
class StageOutput:
    """What a stage's work function returns besides the files it wrote."""

    metrics: Mapping[str, float | int | str] = field(default_factory=dict)
    facts: tuple[LayerFact, ...] = ()


def ignore_event(_name: str, _data: Mapping[str, Any]) -> None:
    """The listener that listens to nothing."""


class Ledger:
    """A store under ``root``. Safe for several processes: each stage is guarded by its own file lock."""

    def __init__(self, root: Path, on_event: Event = ignore_event) -> None:
        self.root = root
        self.on_event = on_event
        self.results: list[StageResult] = []
        self._prepare()

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def run_folder(self, digest: str) -> Path:
        folder = self.root / "runs" / digest[:16]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _prepare(self) -> None:
        try:
            for folder in (self.root / "store", self.cache, self.root / "runs"):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".writable.{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ConfigError.single(
                f"output folder `{self.root}`",
                "--out",
                f"is not writable: {error.strerror}",
                hint="Give another folder with `--out`.",
            ) from error

    def stage(
        self, name: str, key: Mapping[str, Any], work: Callable[[Path], StageOutput], *, resumable: bool = False
    ) -> StageResult:
        """Return the stored result of this stage, or do ``work(folder)`` once and store it.

        ``resumable`` keeps an interrupted folder for the next call; otherwise work starts in an empty one. Whatever
        ``work`` leaves under ``folder/scratch`` is deleted before the result is sealed.
        """
        digest = digest_of({"stage": name, **key})
        final = self.root / "store" / f"{name}-{digest[:16]}"
        result = self._stored(name, digest, final)
        if result is None:
            with self._lock(final, name):
                result = self._stored(name, digest, final) or self._do(name, digest, final, work, resumable)
        if all(known.key != result.key for known in self.results):  # profiles with equal rules share a stage
            self.results.append(result)
        self.on_event(
            "stage-done", {"stage": name, "key": digest[:16], "reused": result.reused, "seconds": result.seconds}
        )
        return result

    def _stored(self, name: str, digest: str, final: Path) -> StageResult | None:
        path = final / RESULT
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text())
            intact = data["digest"] == digest and all(
                file_digest(final / file) == expected for file, expected in data["files"].items()
            )
        except (OSError, ValueError, KeyError):
            intact = False
        if not intact:
            self.on_event("stage-damaged", {"stage": name, "folder": str(final)})
            shutil.rmtree(final, ignore_errors=True)
            return None
        facts = _FACTS.validate_python(data["facts"])
        return StageResult(name, digest, final, data["seconds"], reused=True, metrics=data["metrics"], facts=facts)

    def _do(
        self, name: str, digest: str, final: Path, work: Callable[[Path], StageOutput], resumable: bool
    ) -> StageResult:
        partial = final.with_name(final.name + ".partial")
        if partial.exists() and not resumable:
            shutil.rmtree(partial)
        self.on_event("stage-start", {"stage": name, "key": digest[:16], "resumed": partial.exists()})
        partial.mkdir(exist_ok=True)
        started = time.monotonic()
        with disk_errors(name):
            output = self._work(work, partial, keep=resumable)
            seconds = round(time.monotonic() - started, 3)
            self._seal(partial, final, digest, output, seconds)
        return StageResult(name, digest, final, seconds, reused=False, metrics=output.metrics, facts=output.facts)

    @staticmethod
    def _work(work: Callable[[Path], StageOutput], partial: Path, *, keep: bool) -> StageOutput:
        try:
            return work(partial)
        except BaseException:
            if not keep:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    @staticmethod
    def _seal(partial: Path, final: Path, digest: str, output: StageOutput, seconds: float) -> None:
        shutil.rmtree(partial / "scratch", ignore_errors=True)
        files = sorted(path for path in partial.rglob("*") if path.is_file() and path.name != RESULT)
        record = {
            "digest": digest,
            "seconds": seconds,
            "metrics": dict(output.metrics),
            "facts": _FACTS.dump_python(output.facts, mode="json"),
            "files": {path.relative_to(partial).as_posix(): file_digest(path) for path in files},
        }
        write_atomic(partial / RESULT, json.dumps(record, indent=1, sort_keys=True))
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)

    @contextmanager
    def _lock(self, final: Path, name: str) -> Iterator[None]:
        lock = FileLock(final.with_name(final.name + ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self.on_event("stage-wait", {"stage": name, "reason": "another run is doing this stage"})
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """A full disk becomes a :class:`StageError` that says what to do; finished stages stay."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StageError(
            f"the disk is full while writing stage `{doing}`",
            hint="Free space or give another `--out`; finished stages are kept and the same command resumes.",
        ) from error


class EventLog:
    """``log.jsonl``: one event a line, appended and flushed, so that a killed run leaves whole lines."""

    def __init__(self, path: Path, forward: Event = ignore_event) -> None:
        self.path = path
        self.forward = forward
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, data: Mapping[str, Any]) -> None:
        line = json.dumps({"time": round(time.time(), 3), "event": name, **data}, default=str)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        self.forward(name, data)
