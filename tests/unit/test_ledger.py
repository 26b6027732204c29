"""The store: once done is never done twice, half done is never seen, a full disk is said."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from compressor.errors import ConfigError, StageError
from compressor.ledger import EventLog, Ledger, StageOutput, code_digest, digest_of
from compressor.types import LayerFact


def write(text: str, calls: list[str] | None = None):  # type: ignore[no-untyped-def]
    def work(folder: Path) -> StageOutput:
        if calls is not None:
            calls.append(text)
        (folder / "scratch").mkdir(exist_ok=True)
        (folder / "scratch" / "rest").write_text("goes away")
        (folder / "out.txt").write_text(text)
        return StageOutput({"n": 1}, (LayerFact("s", "l", "kept", "a", "b"),))

    return work


def test_a_stage_is_done_once(tmp_path: Path) -> None:
    calls: list[str] = []
    first = Ledger(tmp_path).stage("prune", {"a": 1}, write("x", calls))
    again = Ledger(tmp_path).stage("prune", {"a": 1}, write("y", calls))
    other = Ledger(tmp_path).stage("prune", {"a": 2}, write("z", calls))
    assert calls == ["x", "z"]
    assert (first.reused, again.reused, other.reused) == (False, True, False)
    assert again.folder == first.folder
    assert (again.folder / "out.txt").read_text() == "x"
    assert again.facts == first.facts
    assert again.metrics == {"n": 1}
    assert not (first.folder / "scratch").exists()


def test_a_damaged_result_is_made_again(tmp_path: Path) -> None:
    calls: list[str] = []
    first = Ledger(tmp_path).stage("export", {}, write("x", calls))
    (first.folder / "out.txt").write_text("tampered")
    second = Ledger(tmp_path).stage("export", {}, write("x", calls))
    assert calls == ["x", "x"]
    assert (second.folder / "out.txt").read_text() == "x"


def test_an_interrupted_stage_leaves_no_result_and_a_resumable_one_keeps_its_folder(tmp_path: Path) -> None:
    def broken(folder: Path) -> StageOutput:
        (folder / "checkpoint").write_text("half")
        raise KeyboardInterrupt

    for resumable in (False, True):
        with pytest.raises(KeyboardInterrupt):
            Ledger(tmp_path).stage("distil", {"r": resumable}, broken, resumable=resumable)
    partial = list((tmp_path / "store").glob("*.partial"))
    assert len(partial) == 1
    seen = []

    def resumed(folder: Path) -> StageOutput:
        seen.append((folder / "checkpoint").read_text())
        return StageOutput()

    assert not Ledger(tmp_path).stage("distil", {"r": True}, resumed, resumable=True).reused
    assert seen == ["half"]


def test_a_full_disk_is_a_stage_error_with_a_hint(tmp_path: Path) -> None:
    def full(folder: Path) -> StageOutput:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StageError, match="disk is full") as caught:
        Ledger(tmp_path).stage("export", {}, full)
    assert "resumes" in caught.value.hint
    assert not list((tmp_path / "store").glob("export*.partial"))


def test_a_really_full_disk() -> None:
    """/dev/full is Linux's device that is always full."""
    from compressor.ledger import disk_errors

    full = Path("/dev/full")
    with pytest.raises(StageError, match="disk is full"), disk_errors("export"), full.open("wb", buffering=0) as stream:
        stream.write(b"x")


def test_an_unwritable_output_folder_is_a_config_error(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("")
    with pytest.raises(ConfigError, match="not writable"):
        Ledger(target / "out")


def slow_stage(root: str, marker: str) -> None:
    def work(folder: Path) -> StageOutput:
        with Path(marker).open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        (folder / "out.txt").write_text("done")
        return StageOutput()

    result = Ledger(Path(root)).stage("distil", {"same": 1}, work, resumable=True)
    assert (result.folder / "out.txt").read_text() == "done"


def test_two_processes_do_a_shared_stage_once(tmp_path: Path) -> None:
    marker = tmp_path / "calls"
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=slow_stage, args=(str(tmp_path / "out"), str(marker))) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(20)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(marker.read_text().split()) == 1


def test_the_event_log_has_one_json_object_a_line(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "run" / "log.jsonl")
    log("a", {"x": 1})
    log("b", {"path": tmp_path})
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["a", "b"]


def test_digests_do_not_depend_on_the_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert code_digest("ledger") != code_digest("types")
