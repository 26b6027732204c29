"""The packaged runner on an emulated Arm processor. What is missing is said; the emulation itself is opt-in."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from compressor.cli.verify import emulation_of
from compressor.errors import ConfigError
from targets import toolchain, toolchain_arm64
from targets.package import write_package
from targets.package.emulation import check_emulated, compared
from targets.package.verify import Verdict, read_manifest


def test_unknown_processors_and_options_are_refused(pictures, build, tmp_path: Path) -> None:
    folder = build(pictures).with_suffix("")
    manifest = read_manifest(folder)
    for architecture, cpu in (("mips", "cortex-a72"), ("arm64", "cortex-x9")):
        with pytest.raises(ConfigError, match=r"unknown|not emulated"):
            check_emulated(folder, manifest, architecture, cpu, ())
    with pytest.raises(ConfigError, match="needed"):
        emulation_of(None, "cortex-a72", ())
    with pytest.raises(ConfigError, match="no such file"):
        emulation_of("arm64", None, (tmp_path / "none.npy",))


def test_an_absent_tool_chain_is_not_here(pictures, build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    folder = build(pictures).with_suffix("")
    (check,) = check_emulated(folder, read_manifest(folder), "arm64", "cortex-a72", ())
    assert check.verdict is Verdict.NOT_HERE
    assert "toolchain install arm64" in check.text


def test_answers_are_compared_by_their_largest_output() -> None:
    here = {"y": np.array([[1.0, 2.0], [3.0, 0.0]])}
    assert compared({"y": here["y"] + 1e-3}, here)[0] is Verdict.PASSED
    verdict, text = compared({"y": here["y"][:, ::-1]}, here)
    assert verdict is Verdict.FAILED
    assert "0 of 2" in text


def test_each_processor_has_a_cpuinfo_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "root" / "usr").mkdir(parents=True)
    for cpu in toolchain_arm64.CPUS:
        toolchain_arm64._make_root(tmp_path, cpu)
        assert (tmp_path / "roots" / cpu / "usr").resolve() == tmp_path / "root" / "usr"
    texts = [(tmp_path / "roots" / cpu / "proc" / "cpuinfo").read_text() for cpu in ("cortex-a72", "cortex-a76")]
    assert "asimddp" not in texts[0]  # int8 dot products: other kernels are chosen
    assert "asimddp" in texts[1]


@pytest.mark.skipif(
    not toolchain.is_ready("arm64") or not os.environ.get("EMULATED_ARM"),
    reason=f"opt-in, half a minute: set EMULATED_ARM=1, and {toolchain.hint('arm64')}",
)
def test_the_packaged_runner_and_litert_answer_on_arm_as_here(pictures, tmp_path: Path) -> None:
    litert = pytest.importorskip("targets.backends.litert", reason="LiteRT is an extra")
    from compressor.profile import load_profile

    outcome, summary, info = pictures
    row = outcome.rows[0]
    backend, profile = litert.LiteRt(), load_profile("pixel-8")
    compiled = backend.compile(row.artifact, profile, tmp_path / "out")
    row = dataclasses.replace(row, compiled=compiled)
    made = dataclasses.replace(outcome, rows=(row,), target="litert", profile="pixel-8")
    archive = write_package(made, summary, info, tmp_path / "run" / "packages")
    folder = archive.with_suffix("")
    np.save(tmp_path / "more.npy", np.random.default_rng(2).integers(0, 256, (5, 20, 20, 3), np.uint8))
    checks = check_emulated(folder, read_manifest(folder), "arm64", "cortex-a76", (tmp_path / "more.npy",))
    assert [check.verdict for check in checks] == [Verdict.PASSED] * 3, checks
    assert all(check.text.startswith("simulated: ") for check in checks)
    assert "in 5 of 5" in checks[1].text
    assert "in 8 of 8" in checks[2].text  # the stored samples, too
