"""A package is unpacked whole or not at all, whatever an archive says of itself."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from compressor.errors import ConfigError
from targets.outcome import ProfileOutcome, RunSummary
from targets.package import PackageInfo, unpack
from targets.package.archive import files_of

Case = tuple[ProfileOutcome, RunSummary, PackageInfo]
Build = Callable[[Case], Path]


def repack(archive: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    with zipfile.ZipFile(archive) as stream:
        content = {name: stream.read(name) for name in stream.namelist()}
    change(content)
    changed = archive.with_name("changed.zip")
    with zipfile.ZipFile(changed, "w") as stream:
        for name, data in content.items():
            stream.writestr(name, data)
    return changed


def test_unpacking_gives_the_folder_back(pictures: Case, build: Build, tmp_path: Path) -> None:
    archive = build(pictures)
    folder = unpack(archive, tmp_path / "there")
    packed = archive.with_suffix("")
    found, wanted = files_of(folder), files_of(packed)
    assert {name: path.read_bytes() for name, path in found.items()} == {
        name: path.read_bytes() for name, path in wanted.items()
    }
    with pytest.raises(ConfigError, match="already there"):
        unpack(archive, tmp_path / "there")


HOSTILE: dict[str, Callable[[dict[str, bytes]], None]] = {
    "absolute": lambda content: content.update({"/tmp/x": b"1"}),
    "parent": lambda content: content.update({"this-machine/../../x": b"1"}),
    "backslash": lambda content: content.update({"this-machine\\..\\x": b"1"}),
    "drive": lambda content: content.update({"C:x/y": b"1"}),
    "bare file": lambda content: content.update({"loose.txt": b"1"}),
    "second top": lambda content: content.update({"other/file": b"1"}),
    "case twin": lambda content: content.update({"this-machine/README.MD": b"1"}),
    "extra file": lambda content: content.update({"this-machine/extra.py": b"1"}),
    "changed file": lambda content: content.update({"this-machine/model.onnx": b"1"}),
    "missing file": lambda content: content.pop("this-machine/model.onnx") and None,
    "missing sums": lambda content: content.pop("this-machine/SHA256SUMS") and None,
    "nothing": lambda content: content.clear(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_leave_nothing_behind(name: str, pictures: Case, build: Build, tmp_path: Path) -> None:
    changed = repack(build(pictures), HOSTILE[name])
    target = tmp_path / "deep" / "there"
    with pytest.raises(ConfigError):
        unpack(changed, target)
    assert list(target.iterdir()) == []
    assert list(target.parent.iterdir()) == [target]


def test_links_and_damaged_archives_are_refused(tmp_path: Path) -> None:
    archive = tmp_path / "link.zip"
    with zipfile.ZipFile(archive, "w") as stream:
        entry = zipfile.ZipInfo("top/link")
        entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        stream.writestr(entry, "/etc/passwd")
    with pytest.raises(ConfigError, match="link"):
        unpack(archive, tmp_path / "there")
    archive.write_bytes(archive.read_bytes()[:-9])
    with pytest.raises(ConfigError, match="cannot be read"):
        unpack(archive, tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []
