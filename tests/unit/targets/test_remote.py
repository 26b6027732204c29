"""An attached device: a real sshd on loopback, host keys, checksums, a connection that dies, addresses."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor.errors import ConfigError, DeviceLost, TargetUnavailable
from compressor.profile import load_profile
from compressor.types import Artifact, Format, Origin, TensorSpec, file_digest
from targets import registry
from targets.base import Missing, Ready, SelfTimed
from targets.remote import attach, parse_devices
from targets.remote.ssh import Address, SshLink, parse_address
from targets.site import find_site

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
needs_sshd = pytest.mark.skipif(not Path(SSHD).is_file(), reason="no sshd here (Debian: openssh-server)")
CONFIG = """\
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
Subsystem sftp internal-sftp
"""
HOST = """\
Host board
  HostName 127.0.0.1
  Port {port}
  IdentityFile {folder}/user
  UserKnownHostsFile {folder}/known
"""


@pytest.fixture(scope="module")
def board(tmp_path_factory) -> Iterator[tuple[str, Path, subprocess.Popen]]:
    """Address, folder and process of an sshd on loopback; ``HOME`` holds the client's configuration."""
    pytest.importorskip("asyncssh")
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "conf").write_text(CONFIG.format(folder=folder))
    with contextlib.suppress(PermissionError):  # root's sshd wants this folder, a user's does not
        Path("/run/sshd").mkdir(exist_ok=True)
    key = (folder / "host.pub").read_text().split()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {key[0]} {key[1]}\n")
    (folder / ".ssh").mkdir()
    (folder / ".ssh" / "config").write_text(HOST.format(folder=folder, port=port))
    server = subprocess.Popen(
        [SSHD, "-D", "-e", "-p", str(port), "-f", str(folder / "conf")], stderr=subprocess.DEVNULL
    )
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    home, os.environ["HOME"] = os.environ.get("HOME"), str(folder)
    yield f"ssh://board?python={sys.executable}", folder, server
    if home is not None:
        os.environ["HOME"] = home
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    weight = numpy_helper.from_array(np.eye(4, 3, dtype=np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [weight],
    )
    path = tmp_path_factory.mktemp("remote") / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    ends = (TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 3)),)
    return Artifact("student/fp32", "student", path, Format.ONNX, "fp32", *ends, file_digest(path), 12)


def test_addresses():
    assert parse_address("ssh://pi@host:2022") == Address("host", 2022, "pi")
    assert parse_address("ssh://host?python=/opt/py") == Address("host", python="/opt/py")
    assert parse_address("ssh://pi@host:2022").command == "ssh -p 2022 pi@host"
    for wrong in ("host", "http://host", "ssh://host:x", "ssh://host/path", "ssh://host?shell=1"):
        with pytest.raises(ConfigError):
            parse_address(wrong)
    with pytest.raises(ConfigError, match="password") as refused:
        parse_address("ssh://pi:hunter2@host")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(ConfigError, match="twice"):
        parse_devices(["a=ssh://h", "a=ssh://i"])


def test_a_target_that_the_runner_does_not_speak_is_refused():
    profile = load_profile("geforce-rtx-4070")
    with pytest.raises(ConfigError, match="tensorrt"):
        attach(registry.get("tensorrt"), profile, {profile.name: Address("host")})
    here = registry.get("onnxruntime-cpu")
    assert attach(here, load_profile("this-machine"), {"other": Address("host")}) is here


@needs_sshd
def test_the_device_is_measured_itself(board, artifact, tmp_path):
    address, _, _ = board
    profile = load_profile("raspberry-pi-5")
    target = attach(registry.get("onnxruntime-cpu"), profile, parse_devices([f"{profile.name}={address}"]))
    ready = target.probe()
    assert isinstance(ready, Ready)
    assert ready.attached
    site = find_site(profile, target, ready)
    assert site is not None
    assert (site.origin, site.no_latency) == (Origin.MEASURED, "")
    compiled = target.compile(artifact, profile, tmp_path)
    inputs = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}
    for _ in range(2):  # the second time the file is there already
        with target.open(compiled, profile) as session:
            np.testing.assert_array_equal(session.run(inputs)["y"], inputs["x"][:, :3])
            assert isinstance(session, SelfTimed)
            assert all(value > 0 for value in session.times_ns(inputs, 3))


@needs_sshd
def test_a_damaged_copy_is_sent_again(board, artifact):
    link = SshLink(parse_address(board[0]))
    try:
        digest = file_digest(artifact.path).removeprefix("sha256:")
        remote = f"{link.folder}/models/test/m.onnx"
        link.bring([(artifact.path, remote, digest)])
        Path(remote).write_bytes(b"damaged")
        assert link.ask({"action": "missing", "files": {remote: digest}})[0]["missing"] == [remote]
        link.bring([(artifact.path, remote, digest)])
        assert Path(remote).read_bytes() == artifact.path.read_bytes()
    finally:
        link.close()


@needs_sshd
def test_an_unknown_host_key_is_refused(board):
    _, folder, _ = board
    known = folder / "known"
    kept = known.read_text()
    known.write_text("")
    try:
        with pytest.raises(TargetUnavailable, match="host key") as refused:
            SshLink(parse_address(board[0]))
        assert "fingerprint" in refused.value.hint
    finally:
        known.write_text(kept)


@needs_sshd
def test_a_device_without_the_runtime_says_so(board, tmp_path):
    bare = tmp_path / "bare"
    bare.write_text("#!/bin/sh\necho 'no python here' >&2\nexit 3\n")
    bare.chmod(0o755)
    target = attach(
        registry.get("onnxruntime-cpu"),
        load_profile("raspberry-pi-5"),
        {"raspberry-pi-5": Address("board", python=str(bare))},
    )
    state = target.probe()
    assert isinstance(state, Missing)
    assert "no python here" in state.reason
    assert "onnxruntime" in state.hint


@needs_sshd
def test_a_lost_connection_is_an_error_of_its_own(board):
    _, _, server = board
    link = SshLink(parse_address(board[0]))
    try:
        link.ask({"action": "hello"})
        children = subprocess.run(["pgrep", "-P", str(server.pid)], capture_output=True, text=True, check=True).stdout
        for child in children.split():
            os.kill(int(child), signal.SIGKILL)
        with pytest.raises(DeviceLost) as lost:
            link.ask({"action": "hello"})
        assert "resumes" in lost.value.hint
    finally:
        link.close()
