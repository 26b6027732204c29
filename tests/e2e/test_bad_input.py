"""Bad input ends in a clear error on stderr, exit code 2, and nothing half-written."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

Command = Callable[..., "subprocess.CompletedProcess[str]"]
MODEL = ["--model", "tests.e2e.nets:teacher"]
DATA = ["--data", "tests.e2e.nets:load"]


def refused(result: subprocess.CompletedProcess[str], *texts: str, code: int = 2) -> None:
    assert result.returncode == code, result.stdout + result.stderr
    for text in texts:
        assert text in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith((".partial", ".tmp")) or "report" in path.name]


def changed(recipe: Path, old: str, new: str) -> str:
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))
    return str(recipe)


@pytest.mark.parametrize(
    ("old", "new", "texts"),
    [
        ('kind = "prune"', 'kind = "pruen"', ["unknown kind `pruen`", "did you mean `prune`?"]),
        ("ratio = 0.5", "ratoi = 0.5", ["unknown key", "did you mean `ratio`?"]),
        ("ratio = 0.5", "ratio = 1.5", ["stage.0.prune.ratio", "less than 1"]),
        ('"this-machine"', '"this-machin"', ["unknown profile", "did you mean `this-machine`?"]),
        ("max_drop = 0.2", 'max_drop = "much"', ["accept.max_drop"]),
        ("validation = 80", "validation = 5000", ["data"]),
    ],
)
def test_a_wrong_recipe(command: Command, recipe: Path, old: str, new: str, texts: list[str]) -> None:
    result = command("run", changed(recipe, old, new), *MODEL, *DATA)
    refused(result, *texts)
    assert not unfinished(recipe.parent)


@pytest.mark.train
def test_an_unknown_objective(command: Command, recipe: Path) -> None:
    refused(
        command("plan", changed(recipe, 'use = "kd"', 'use = "kdd"'), *MODEL, *DATA),
        "unknown objective `kdd`",
        "did you mean `kd`?",
    )


def test_an_unknown_target(command: Command, recipe: Path, tmp_path: Path) -> None:
    profile = tmp_path / "device.toml"
    profile.write_text(
        'name = "d"\ntitle = "d"\ntarget = "tensort"\n[compute]\nprocessor = "x"\narchitecture = "none"\n'
    )
    refused(
        command("plan", str(recipe), *MODEL, *DATA, "--profile", str(profile)),
        "unknown target `tensort`",
        "did you mean `tensorrt`?",
    )


@pytest.mark.train
@pytest.mark.parametrize(
    ("model", "texts"),
    [
        ("./no-such-folder", ["no-such-folder"]),
        ("weights.pt", ["pickle"]),
        ("tests.e2e.nets:nothing", ["nothing"]),
        ("tests.e2e.nets:not_a_module", ["Module"]),
        ("no_such_package.mod:factory", ["no_such_package"]),
    ],
)
def test_a_model_that_cannot_be_had(command: Command, recipe: Path, model: str, texts: list[str]) -> None:
    (recipe.parent / "weights.pt").write_bytes(b"\x80\x04.")
    refused(command("run", str(recipe), "--model", model, *DATA), *texts)
    assert not unfinished(recipe.parent)


@pytest.mark.train
def test_a_checkpoint_that_needs_remote_code(command: Command, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "odd", "auto_map": {"AutoModel": "modeling_odd.Odd"}}')
    (folder / "modeling_odd.py").write_text("raise SystemExit('this code must never run')")
    refused(command("run", str(recipe), "--model", str(folder), *DATA), "remote code")


@pytest.mark.train
@pytest.mark.parametrize(
    ("loader", "texts"),
    [
        ("overlapping", ["test", "3"]),
        ("too_many_classes", ["label"]),
        ("empty_test", ["test", "empty"]),
    ],
)
def test_data_that_does_not_fit(command: Command, recipe: Path, loader: str, texts: list[str]) -> None:
    refused(command("run", str(recipe), *MODEL, "--data", f"tests.e2e.nets:{loader}"), *texts)
    assert not unfinished(recipe.parent)


@pytest.mark.train
def test_nan_in_the_loss_stops_with_the_step(command: Command, recipe: Path) -> None:
    result = command("run", str(recipe), "--model", "tests.e2e.nets:exploding", *DATA)
    refused(result, "step", code=1)
    assert not list(recipe.parent.rglob("report.*"))


@pytest.mark.train
def test_an_output_folder_that_is_not_writable(command: Command, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(command("run", str(recipe), *MODEL, *DATA, "--out", str(tmp_path / "file" / "out")), "not writable")


def tiny_onnx(path: Path, operator: str = "Relu", domain: str = "") -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    node = helper.make_node(operator, ["x"], ["y"], domain=domain)
    imports = [helper.make_opsetid("", 17)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    onnx.save(helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=imports), str(path))
    return path


def test_onnx_files_that_are_broken(command: Command, tmp_path: Path) -> None:
    whole = tiny_onnx(tmp_path / "m.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name in ("cut.onnx", "empty.onnx", "absent.onnx"):
        refused(command("profile", name), name)
    tiny_onnx(tmp_path / "odd.onnx", "Whatever", "com.example")
    refused(command("profile", "odd.onnx"), "Whatever", "com.example")


def test_onnx_weights_outside_the_folder(command: Command, tmp_path: Path) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.zeros(4, np.float32).tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    path = tiny_onnx(folder / "m.onnx", "Relu")
    model = onnx.load(str(path))
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret.bin")
    model.graph.initializer.append(tensor)
    path.write_bytes(model.SerializeToString())
    refused(command("profile", str(path)), "outside")


def test_wrong_words_on_the_command_line(command: Command) -> None:
    for words in (["rnu"], ["run", "--modle", "x"], ["run"], ["methods", "show", "kdd"], ["profiles", "show", "nope"]):
        result = command(*words)
        assert result.returncode == 2, (words, result.stderr)
        assert "error:" in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.train
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk(command: Command, recipe: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(small)], check=False, capture_output=True
    ).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        refused(command("run", str(recipe), *MODEL, *DATA, "--out", str(small / "out")), "disk is full", code=1)
    finally:
        subprocess.run(["umount", str(small)], check=False)
