"""Tool chains: lock files, a real installation from a wheel made here, hashes, and how its worker may end."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import zipfile
from pathlib import Path

import pytest

from compressor.errors import CompileError, ConfigError, RunError, TargetUnavailable
from targets import toolchain
from targets.isolation import Limits
from targets.toolchain_session import open_worker

LIMITS = Limits(seconds=20, memory_mib=2048)
PACKAGE = "tinychain"
WORKER = """
import os, signal, sys, time

def answer(request):
    import tinychain
    if request["action"] == "smoke":
        print("this goes to stderr")
        return {"value": tinychain.VALUE}
    if request["action"] == "paths":
        return {"paths": sys.path, "variable": os.environ.get("PYTHONPATH", "")}
    if request["action"] == "own":
        import importlib.util
        import targets.clock
        return {"file": targets.clock.__file__, "others": importlib.util.find_spec("pydantic") is not None}
    if request["action"] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if request["action"] == "sleep":
        time.sleep(60)
    raise ValueError("no such action")
"""


def write_wheel(folder: Path, version: str = "1.0") -> Path:
    """A wheel of one module, as pip wants it."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{PACKAGE}-{version}.dist-info"
    files = {
        f"{PACKAGE}/__init__.py": "VALUE = 42\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{PACKAGE}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        rows = [f"{name},sha256={record_digest(text)},{len(text)}\n" for name, text in files.items()]
        archive.writestr(f"{info}/RECORD", "".join([*rows, f"{info}/RECORD,,\n"]))
    return path


def record_digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def write_lock(folder: Path, name: str, digest: str, version: str = "1.0") -> None:
    (folder / f"{name}.lock").write_text(f"{PACKAGE}=={version} \\\n    --hash=sha256:{digest}\n")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The catalogue with one more tool chain, really installed, without a network."""
    base = tmp_path_factory.mktemp("chains")
    wheel = write_wheel(base / "wheels")
    write_lock(base, "tiny", hashlib.sha256(wheel.read_bytes()).hexdigest())
    (base / "worker.py").write_text(WORKER)
    item = toolchain.Toolchain("tiny", "a test's own", "none", base / "worker.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toolchain, "LOCKS", base)
        patch.setattr(toolchain, "CATALOGUE", {"tiny": item})
        patch.setenv("XDG_CACHE_HOME", str(base / "cache"))
        assert toolchain.status("tiny").state is toolchain.State.ABSENT
        assert toolchain.verify("tiny") == ("it is not installed",)
        with pytest.raises(TargetUnavailable) as caught:
            toolchain.call("tiny", {"action": "smoke"}, LIMITS, "the smoke call")
        assert caught.value.hint == "compress-for-device toolchain install tiny"
        done = toolchain.install("tiny", wheels=base / "wheels")
        assert done.state is toolchain.State.READY
        yield item, base


def test_every_package_of_our_lock_files_is_pinned_and_hashed():
    for item in toolchain.CATALOGUE.values():
        text = item.lock.read_text()
        pins = item.pins()
        assert pins
        if item.npm:
            packages = json.loads(text)["packages"]
            assert set(pins.items()) <= {
                (key.removeprefix("node_modules/"), entry.get("version")) for key, entry in packages.items()
            }
            assert all(entry["integrity"].startswith("sha512-") for key, entry in packages.items() if key)
            continue
        assert item.emulated or item.worker.is_file()
        blocks = re.findall(r"^\S+==\S+ \\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", text, re.MULTILINE)
        assert len(blocks) == len(pins), "every requirement has at least one sha256"


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match="ethos-u"):
        toolchain.find("ethosu")


def test_it_answers_and_is_cut_off_from_our_environment(installed, monkeypatch):
    _item, base = installed
    monkeypatch.setenv("PYTHONPATH", str(base))
    assert toolchain.call("tiny", {"action": "smoke"}, LIMITS, "smoke")["value"] == 42
    seen = toolchain.call("tiny", {"action": "paths"}, LIMITS, "paths")
    assert seen["variable"] == ""
    ours = {path for path in sys.path if "site-packages" in path}
    assert not ours & set(seen["paths"])
    assert str(base) not in seen["paths"]
    assert toolchain.verify("tiny") == ()


def test_a_worker_may_consist_of_our_own_modules_but_sees_no_package_beside_them(installed):
    seen = toolchain.call("tiny", {"action": "own"}, LIMITS, "own")
    assert Path(seen["file"]).parent == Path(toolchain.__file__).parent
    assert seen["others"] is False


@pytest.mark.parametrize(
    ("action", "words"), [("crash", "SIGSEGV"), ("other", "ValueError: no such action"), ("sleep", "limit of 1 s")]
)
def test_every_end_is_a_typed_error(installed, action, words):
    limits = Limits(seconds=1, memory_mib=2048) if action == "sleep" else LIMITS
    with pytest.raises(CompileError, match=words):
        toolchain.call("tiny", {"action": action}, limits, "the work")
    with open_worker("tiny", limits, "the work") as worker, pytest.raises(RunError, match=words):
        worker.ask({"action": action})


def test_a_worker_that_stays_answers_again_after_an_error(installed):
    with open_worker("tiny", LIMITS, "the work") as worker:
        assert worker.ask({"action": "smoke"})["value"] == 42
        with pytest.raises(RunError, match="no such action"):
            worker.ask({"action": "other"})
        assert worker.ask({"action": "smoke"})["value"] == 42


def test_a_wrong_hash_and_a_missing_wheel_are_refused_with_a_hint(installed, tmp_path, monkeypatch):
    item, base = installed
    monkeypatch.setattr(toolchain, "LOCKS", tmp_path)
    write_wheel(tmp_path / "wheels", "2.0")
    write_lock(tmp_path, "other", "0" * 64, "2.0")
    other = toolchain.Toolchain("other", "", "", item.worker)
    for wheels, words in ((tmp_path / "wheels", "not the file that was pinned"), (tmp_path, "--wheels WHEELS")):
        command = toolchain._pip(other, wheels)
        python = base / "cache" / "compress-for-device" / "toolchains"
        command[0] = str(next(python.glob("tiny-*/bin/python")))
        with pytest.raises(TargetUnavailable) as caught:
            toolchain._run(command, "install")
        assert words in caught.value.hint


def test_what_was_changed_is_found_and_removed(installed):
    item, base = installed
    site = next(item.folder.glob("lib/python*/site-packages"))
    module = site / PACKAGE / "__init__.py"
    kept = module.read_text()
    (site / f"{PACKAGE}-1.0.dist-info" / "METADATA").rename(base / "kept")
    (site / f"{PACKAGE}-1.0.dist-info" / "METADATA").write_text((base / "kept").read_text().replace("1.0", "1.1"))
    assert any("the lock file says 1.0" in problem for problem in toolchain.verify("tiny"))
    module.write_text("VALUE = 7\n")
    assert any("changed after it was installed" in problem for problem in toolchain.verify("tiny"))
    module.write_text(kept)
    write_lock(base, "tiny", "1" * 64)  # a new lock file
    assert toolchain.status("tiny").state is toolchain.State.OLD
    assert len(toolchain.remove("tiny")) == 1
    assert toolchain.status("tiny").state is toolchain.State.ABSENT
