"""Where a model is, and what is refused before it is read. No torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compressor.errors import ConfigError
from compressor.models import inspect_model
from compressor.models.entry import check_entry, import_entry, is_entry
from compressor.models.preprocessing import bare_tokenizer, image_input, labels_of, text_input
from compressor.models.source import licence_of, locate
from compressor.recipe import TeacherConfig


def refused(name: str, match: str) -> ConfigError:
    with pytest.raises(ConfigError, match=match) as caught:
        locate(TeacherConfig(model=name))
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "~/no-such-folder", "a/b/c", "model.onnx", "folder/"])
def test_a_missing_path_does_not_exist(name: str) -> None:
    refused(name, "does not exist")


def test_a_missing_path_beside_a_like_one_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    assert "teacher`?" in refused(str(tmp_path / "teachr"), "does not exist").hint


@pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.pkl", "pytorch_model.bin", "model.joblib"])
def test_pickles_are_refused_whether_they_exist_or_not(name: str, tmp_path: Path) -> None:
    assert "factory" in refused(name, "is a pickle").hint
    (tmp_path / name).write_bytes(b"\x80\x04.")
    refused(str(tmp_path / name), "is a pickle")


def test_offline_hub_id_is_named_as_such(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("some-owner/some-model-that-is-not-cached", "HF_HUB_OFFLINE is set")
    facts = inspect_model(TeacherConfig(model="some-owner/some-model-that-is-not-cached"))
    assert "HF_HUB_OFFLINE" in str(facts.problems[0])


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    refused(str(tmp_path), "has no config.json")
    (tmp_path / "weights.pt").write_bytes(b"x")
    refused(str(tmp_path), "only a pickle")
    (tmp_path / "m.onnx").write_bytes(b"x")
    assert "m.onnx" in refused(str(tmp_path), "has no config.json").hint


def test_remote_code_is_refused_without_the_flag(tmp_path: Path) -> None:
    settings = {"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoModel": "mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "mine.py").write_text("raise SystemExit('executed')")
    facts = inspect_model(TeacherConfig(model=str(tmp_path)))
    assert "needs remote code" in str(facts.problems[0])


def test_malformed_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "JSON" in str(inspect_model(TeacherConfig(model=str(tmp_path))).problems[0])


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ('---\nlanguage: en\nlicense: "cc-by-4.0"\n---\n', "cc-by-4.0"),
        ("---\nlicense:\n- apache-2.0\n---\n", "apache-2.0"),
        ("# licence: mit\n", None),
        ("---\ntags: x\n---\nlicense: mit\n", None),
    ],
)
def test_licence_of_a_model_card(tmp_path: Path, text: str, licence: str | None) -> None:
    (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == licence


def test_labels_are_ordered_by_number() -> None:
    assert labels_of({"id2label": {"10": "k", "2": "c", "0": "a"}}) == ("a", "c", "k")
    assert labels_of({}) == ()


def test_processors_of_the_hub() -> None:
    made, notes = image_input({"size": 224, "image_mean": [0.5], "image_std": [0.25]}, size=None, channels=3)
    assert (made.settings.size, made.settings.mean, made.settings.std, notes) == ((224, 224), (0.5,), (0.25,), [])
    crop = {
        "do_center_crop": True,
        "crop_size": {"height": 200, "width": 208},
        "size": {"shortest_edge": 256},
        "resample": 3,
    }
    made, notes = image_input(crop, size=None, channels=3)
    assert made.settings.size == (200, 208)
    assert made.resample == "bicubic"
    assert "without cropping" in notes[0]
    made, _ = image_input({"do_resize": False, "do_rescale": False, "do_normalize": False}, size=(8, 8), channels=1)
    assert (made.settings.scale, made.settings.size, made.settings.mean) == (1.0, (8, 8), (0.0,))


def test_a_tokenizer_loses_its_padding_and_length() -> None:
    text = json.dumps({"truncation": {"max_length": 3}, "padding": {"strategy": {"Fixed": 128}}, "model": {}})
    assert json.loads(bare_tokenizer(text, "x")) == {"truncation": None, "padding": None, "model": {}}
    assert text_input(("input_ids",), wanted=128, limits=[10**30, 64, None], pad_id=None).max_length == 64


def test_import_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_a.py").write_text("def build():\n    return 3\nnumber = 4\n")
    (tmp_path / "mine_b.py").write_text("import no_such_package_at_all\n")
    (tmp_path / "mine_c.py").write_text("raise RuntimeError('broken')\n")
    assert is_entry("a.b:c")
    assert not is_entry("a/b:c")
    assert not is_entry("C:\\x")
    assert import_entry("mine_a:build", "factory")() == 3
    check_entry("mine_a:build", "factory")
    for entry, match in [
        ("mine_a:biuld", "did you mean `build`"),
        ("mine_a:number", "is a int, not something to call"),
        ("no_such_module_x:f", "no module named `no_such_module_x`"),
        ("mine_b:f", "needs the module `no_such_package_at_all`"),
        ("mine_c:f", "RuntimeError: broken"),
        ("mine_a", "not of the form"),
    ]:
        with pytest.raises(ConfigError, match=match):
            import_entry(entry, "factory")


def test_inspecting_a_factory_does_not_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_d.py").write_text("raise SystemExit('executed')\ndef build(): ...\n")
    assert inspect_model(TeacherConfig(), factory="mine_d:build").problems == ()
    assert "did you mean `build`" in str(inspect_model(TeacherConfig(), factory="mine_d:biuld").problems[0])
    assert "no module named" in str(inspect_model(TeacherConfig(), factory="nowhere_x.model:build").problems[0])
