"""A phone over ADB, tested on a double: an `adb` that runs shell commands on this machine. No phone was ever here."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor.errors import ConfigError, DeviceLost, TargetUnavailable
from compressor.profile import load_profile
from compressor.types import Artifact, Format, Origin, TensorSpec, file_digest
from targets import registry, toolchain, toolchain_arm64
from targets.base import Missing, Ready, SelfTimed
from targets.remote import attach, parse_devices
from targets.remote.adb import FOLDER, AdbAddress, AdbLink, pack_python, parse_adb
from targets.remote.ssh import Address
from targets.site import find_site

DOUBLE = """\
#!{python}
# A double of adb: `shell` runs on this machine, `push` copies. A file `gone` beside it unplugs the phone.
import os, pathlib, shutil, subprocess, sys
here = pathlib.Path(__file__).parent
serial, command, *words = sys.argv[2:]
if (here / "gone").exists() or serial != "emulator-5554":
    sys.exit(f"adb: device '{{serial}}' not found")
if command == "get-state":
    print((here / "state").read_text() if (here / "state").exists() else "device")
elif command == "features":
    print((here / "features").read_text() if (here / "features").exists() else "cmd\\nshell_v2\\nstat_v2")
elif command == "push":
    shutil.copyfile(*words)
    print("1 file pushed")
elif command == "shell":
    line = words[-1].replace("uname -m", "echo aarch64" if (here / "arm").exists() else "uname -m")
    if (here / "arm").exists():
        line = line.replace("{loader}", (here / "arm").read_text() + " {loader}")
    os.execv("/bin/sh", ["sh", "-c", line])
else:
    sys.exit(f"adb: unknown command {{command}}")
"""


needs_arm = pytest.mark.skipif(
    not toolchain.is_ready("arm64") or not os.environ.get("EMULATED_ARM"),
    reason=f"opt-in, half a minute: set EMULATED_ARM=1, and {toolchain.hint('arm64')}",
)


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """Folder of the double (files in it change what it does), and the phone's address."""
    tools, storage = tmp_path / "tools", tmp_path / "storage"
    tools.mkdir()
    name = f"python-{toolchain.find('arm64').folder.name}"
    loader = f"{storage}/{name}/root/lib/ld-linux-aarch64.so.1"
    (tools / "adb").write_text(DOUBLE.format(python=sys.executable, loader=loader))
    (tools / "adb").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return tools, f"adb://emulator-5554?python={sys.executable}&folder={storage}"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    weight = numpy_helper.from_array(np.eye(4, 3, dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [weight],
    )
    path = tmp_path_factory.mktemp("adb") / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    ends = (TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 3)),)
    return Artifact("student/fp32", "student", path, Format.ONNX, "fp32", *ends, file_digest(path), 12)


def test_addresses() -> None:
    assert parse_adb("adb://R58M12ABCDE") == AdbAddress("R58M12ABCDE", "", FOLDER)
    assert parse_adb("adb://192.168.1.7:5555?python=/opt/python") == AdbAddress("192.168.1.7:5555", "/opt/python")
    found = parse_devices(["a=adb://X1", "b=ssh://host"])
    assert found == {"a": AdbAddress("X1"), "b": Address("host")}
    for wrong in ("adb://", "adb://a/b", "adb://-s", "adb://x?shell=1", "adb://x?folder=tmp", "adb://x?folder=/a/../b"):
        with pytest.raises(ConfigError):
            parse_adb(wrong)


def test_the_phone_is_measured_by_the_same_loop(phone: tuple[Path, str], artifact: Artifact, tmp_path: Path) -> None:
    profile = load_profile("raspberry-pi-5")
    target = attach(registry.get("onnxruntime-cpu"), profile, parse_devices([f"{profile.name}={phone[1]}"]))
    ready = target.probe()
    assert isinstance(ready, Ready), ready
    assert ready.attached
    site = find_site(profile, target, ready)
    assert site is not None
    assert site.origin is Origin.MEASURED
    compiled = target.compile(artifact, profile, tmp_path / "out")
    inputs = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}
    with target.open(compiled, profile) as session:
        np.testing.assert_array_equal(session.run(inputs)["y"], inputs["x"][:, :3])
        assert isinstance(session, SelfTimed)
        assert all(value > 0 for value in session.times_ns(inputs, 3))


def test_a_tflite_file_runs_in_litert_over_there(phone: tuple[Path, str], artifact: Artifact, tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert", reason="LiteRT is an extra")
    profile = load_profile("pixel-8")
    target = attach(registry.get("litert"), profile, parse_devices([f"pixel-8={phone[1]}"]))
    ready = target.probe()
    assert isinstance(ready, Ready), ready
    assert "ai-edge-litert" in ready.versions
    compiled = target.compile(artifact, profile, tmp_path / "out")
    inputs = {"x": np.arange(12, dtype=np.float32).reshape(3, 4)}  # the file takes one row
    with target.open(compiled, profile) as session:
        np.testing.assert_allclose(session.run(inputs)["y"], inputs["x"][:, :3], rtol=1e-6)
        assert isinstance(session, SelfTimed)
        assert len(session.times_ns(inputs, 2)) == 2


def test_files_are_checked_and_a_lost_phone_is_an_error_of_its_own(phone: tuple[Path, str], artifact: Artifact) -> None:
    tools, address = phone
    with AdbLink(parse_adb(address)) as link:
        digest = file_digest(artifact.path).removeprefix("sha256:")
        remote = f"{link.folder}/models/with a blank/m.onnx"
        link.bring([(artifact.path, remote, digest)])
        Path(remote).write_bytes(b"damaged")
        link.bring([(artifact.path, remote, digest)])
        assert Path(remote).read_bytes() == artifact.path.read_bytes()
        link.restart()
        link.ask({"action": "hello"})
        (tools / "gone").touch()
        assert link._process is not None
        link._process.kill()
        with pytest.raises(DeviceLost) as lost:
            link.ask({"action": "hello"})
        assert "resumes" in lost.value.hint
    (tools / "gone").unlink()
    with AdbLink(parse_adb(address)) as link:  # the same command again
        link.ask({"action": "hello"})


def test_what_a_phone_lacks_is_said(phone: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools, address = phone
    cases = {"state": ("unauthorized", "unauthorized"), "features": ("cmd", "binary-safe")}
    for file, (content, words) in cases.items():
        (tools / file).write_text(content)
        with pytest.raises(TargetUnavailable, match=words):
            AdbLink(parse_adb(address))
        (tools / file).unlink()
    with pytest.raises(TargetUnavailable, match="not found"):
        AdbLink(parse_adb("adb://OTHER"))
    bare = tmp_path / "bare"
    bare.write_text(textwrap.dedent("#!/bin/sh\necho 'no numpy here' >&2\nexit 3\n"))
    bare.chmod(0o755)
    profile = load_profile("raspberry-pi-5")
    given = {profile.name: AdbAddress("emulator-5554", str(bare), str(tmp_path / "storage"))}
    state = attach(registry.get("onnxruntime-cpu"), profile, given).probe()
    assert isinstance(state, Missing)
    assert "no numpy here" in state.reason
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetUnavailable, match="adb is not here"):
        AdbLink(parse_adb(address))


def test_a_phone_that_is_no_arm_is_not_given_an_arm_python(phone: tuple[Path, str]) -> None:
    folder = parse_adb(phone[1]).folder
    with pytest.raises(TargetUnavailable, match=r"has no Python|is for aarch64"):
        AdbLink(AdbAddress("emulator-5554", "", folder))


@needs_arm
def test_python_is_brought_to_a_phone_that_has_none(phone: tuple[Path, str], tmp_path: Path) -> None:
    """The double runs the pushed loader, Python and ONNX Runtime under qemu-user: Arm code, no phone."""
    tools, address = phone
    source = toolchain.find("arm64").folder
    root = tmp_path / "cpu"  # the emulator sees Arm's /proc/cpuinfo, and otherwise only what was pushed
    (root / "proc").mkdir(parents=True)
    (root / "proc" / "cpuinfo").write_bytes((source / "roots" / "cortex-a72" / "proc" / "cpuinfo").read_bytes())
    (tools / "arm").write_text(f"{toolchain_arm64.emulator(source)} -cpu cortex-a72 -L {root}")
    with AdbLink(AdbAddress("emulator-5554", "", parse_adb(address).folder)) as link:
        facts, _ = link.ask({"action": "hello"})
    assert facts["machine"] == "aarch64"
    assert facts["versions"]["onnxruntime"] == toolchain.find("arm64").pins()["onnxruntime"]
    assert (Path(link.folder) / f"python-{source.name}" / "whole").is_file()


@needs_arm
def test_the_archive_of_python_is_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("targets.remote.adb._python_files", lambda source: [source / "root/usr/bin/python3.11"])
    source = toolchain.find("arm64").folder
    assert pack_python(source, tmp_path / "a.gz") == pack_python(source, tmp_path / "b.gz")
