"""A target of a package outside of the project: one class, one entry point, and it stands in the report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, arguments, environment

pytestmark = [pytest.mark.train, pytest.mark.slow]
EXAMPLE = ROOT / "examples" / "own_target"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """What `pip install ./examples/own_target` leaves in site-packages, without asking an index for setuptools."""
    folder = tmp_path / "site"
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    information = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in found.items())
        for group, found in project["entry-points"].items()
    ]
    (information / "entry_points.txt").write_text("\n".join(points))
    shutil.copy(EXAMPLE / "ort_format.py", folder)
    return folder


def test_a_target_of_another_package_stands_in_the_report(installed: Path, recipe: Path, tmp_path: Path) -> None:
    outside = {**environment(), "PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)])}
    words = ["run", str(recipe), "--model", "examples.digits.model:teacher", "--data", "examples.digits:load"]
    words += ["--profile", str(EXAMPLE / "profile.toml"), "--json"]
    done = subprocess.run(
        arguments(*words), cwd=tmp_path, env=outside, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / json.loads(done.stdout)["run"]
    (outcome,) = [
        item for item in json.loads((folder / "report.json").read_text())["outcomes"] if item["target"] == "ort-format"
    ]
    row = next(row for row in outcome["rows"] if row["shipped"])
    assert outcome["kept"]
    assert row["state"] == "executed"
    assert row["latency"]["origin"] == "measured"
    assert row["compiled"]["path"].endswith(".ort")
    assert row["nearness"]["argmax"] == 1.0, "beside ONNX Runtime on the same ONNX file"
    assert "files in ONNX Runtime's own format" in (folder / "report.md").read_text()
    assert (folder / "packages" / f"{outcome['profile']}.zip").is_file()
    gone = subprocess.run(
        arguments(*words), cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert gone.returncode == 2
    assert "unknown target `ort-format`" in gone.stderr
