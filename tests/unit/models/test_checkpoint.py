"""Hugging Face checkpoint folders."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from compressor.errors import ConfigError, PlanError  # noqa: E402
from compressor.models import ImageInput, TextInput, inspect_model, load_model  # noqa: E402
from compressor.models.checkpoint import find_task  # noqa: E402
from compressor.models.inspection import checkpoint_task  # noqa: E402
from compressor.models.source import Source  # noqa: E402
from compressor.recipe import DataConfig, TeacherConfig  # noqa: E402
from compressor.types import TensorSpec  # noqa: E402

pytestmark = pytest.mark.train


def text_inputs(batch: int = 2, length: int = 7) -> dict[str, object]:
    ids = torch.randint(5, 50, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[-1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def test_text_classification(bert_folder: Path) -> None:
    from transformers import BertForSequenceClassification

    model = load_model(TeacherConfig(model=str(bert_folder)), data=DataConfig(max_length=256))
    assert (model.kind, model.task, model.labels) == ("checkpoint", "text-classification", ("bad", "good"))
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert model.inputs == tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in names)
    assert model.outputs == (TensorSpec("logits", "float32", ("batch", 2)),)
    assert isinstance(model.preprocess, TextInput)
    assert (model.preprocess.max_length, model.preprocess.names) == (48, names)  # the tokenizer's limit, not the wish
    assert model.provenance.licence == "apache-2.0"
    assert not model.module.training
    plain = BertForSequenceClassification.from_pretrained(bert_folder).eval()
    inputs = text_inputs()
    with torch.no_grad():
        torch.testing.assert_close(model.module(**inputs), plain(**inputs).logits)


def test_the_tokenizer_is_bare(bert_folder: Path) -> None:
    from tokenizers import Tokenizer

    model = load_model(TeacherConfig(model=str(bert_folder)))
    tokenizer = Tokenizer.from_str(model.files["tokenizer.json"].decode())
    assert (tokenizer.padding, tokenizer.truncation) == (None, None)
    assert tokenizer.encode("the film").tokens == ["[CLS]", "the", "film", "[SEP]"]


def test_digest_follows_the_weights(bert_folder: Path, tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    first = load_model(TeacherConfig(model=str(bert_folder))).provenance.digest
    assert first == load_model(TeacherConfig(model=str(bert_folder))).provenance.digest
    copy = tmp_path / "copy"
    shutil.copytree(bert_folder, copy)
    other = BertForSequenceClassification.from_pretrained(copy)
    with torch.no_grad():
        other.classifier.bias[0] += 1
    other.save_pretrained(copy)
    assert load_model(TeacherConfig(model=str(copy))).provenance.digest != first


def test_sentence_embedding_of_a_bare_encoder(encoder_folder: Path) -> None:
    from transformers import AutoModel

    model = load_model(TeacherConfig(model=str(encoder_folder)))
    assert (model.task, model.labels) == ("sentence-embedding", ())
    assert model.outputs == (TensorSpec("embedding", "float32", ("batch", 32)),)
    assert not any("pooler" in name for name, _ in model.module.named_parameters())
    inputs = text_inputs()
    with torch.no_grad():
        got = model.module(**inputs)
        hidden = AutoModel.from_pretrained(encoder_folder).eval()(**inputs).last_hidden_state
    torch.testing.assert_close(got.norm(dim=1), torch.ones(2))
    second = torch.nn.functional.normalize(hidden[1, :4].mean(0), dim=0)  # only the real tokens
    torch.testing.assert_close(got[1], second)


def test_sentence_transformers_folder(encoder_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "st"
    shutil.copytree(encoder_folder, folder)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    parts = [
        {"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(parts))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24}))
    (folder / "1_Pooling").mkdir()
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    model = load_model(TeacherConfig(model=str(folder)))
    assert model.module.pooling.mode == "cls"
    assert model.preprocess.max_length == 24
    assert model.provenance.notes == ()
    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(PlanError, match="pooling by max_tokens"):
        load_model(TeacherConfig(model=str(folder)))
    (folder / "modules.json").write_text(
        json.dumps([*parts, {"path": "3_Dense", "type": "sentence_transformers.models.Dense"}])
    )
    with pytest.raises(PlanError, match="Dense module"):
        load_model(TeacherConfig(model=str(folder)))


def test_image_classification(vit_folder: Path) -> None:
    model = load_model(TeacherConfig(model=str(vit_folder)))
    assert (model.task, model.labels) == ("image-classification", ("cat", "dog", "owl"))
    assert model.inputs == (TensorSpec("pixel_values", "float32", ("batch", 3, 16, 16)),)
    assert model.outputs == (TensorSpec("logits", "float32", ("batch", 3)),)
    assert isinstance(model.preprocess, ImageInput)
    assert model.preprocess.settings.std == (0.25, 0.25, 0.25)
    assert model.preprocess.resample == "bicubic"


@pytest.mark.parametrize("fixture", ["bert_folder", "encoder_folder", "vit_folder"])
def test_inspection_agrees_with_loading(fixture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    config = TeacherConfig(model=str(folder))
    facts, model = inspect_model(config), load_model(config)
    settings = json.loads((folder / "config.json").read_text())
    assert facts.problems == ()
    assert (
        facts.task
        == model.task
        == find_task(settings, Source("checkpoint", folder, "x"))
        == checkpoint_task(settings, folder)
    )
    assert facts.labels == model.labels
    assert facts.layers == model.module.model.config.num_hidden_layers
    pooler = {"encoder_folder": 32 * 33}.get(fixture, 0)  # stands in the file but is not loaded
    assert facts.parameters == sum(weights.numel() for weights in model.module.parameters()) + pooler


def test_weights_that_were_never_trained_are_refused(encoder_folder: Path) -> None:
    with pytest.raises(PlanError, match=r"no weights for classifier\.bias"):
        load_model(TeacherConfig(model=str(encoder_folder), task="text-classification"))


def test_other_heads_are_named(encoder_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mlm"
    shutil.copytree(encoder_folder, folder)
    settings = json.loads((folder / "config.json").read_text())
    for name, match in [("BertForMaskedLM", "task fill-mask"), ("NoSuchModel", "does not have")]:
        (folder / "config.json").write_text(json.dumps({**settings, "architectures": [name]}))
        with pytest.raises(PlanError, match=match) as caught:
            load_model(TeacherConfig(model=str(folder)))
        assert caught.value.exit_code == 2
        expected = [] if name == "NoSuchModel" else ["teacher.task"]
        assert [problem.where for problem in inspect_model(TeacherConfig(model=str(folder))).problems] == expected


def test_truncated_and_missing_weights(bert_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(bert_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config = TeacherConfig(model=str(folder))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(config)
    assert "truncated" in str(inspect_model(config).problems[0])
    weights.unlink()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(config)
    assert "no weights" in str(inspect_model(config).problems[0])


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_is_read_safely_or_not_at_all(bert_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(bert_folder, folder)
    state = load_model(TeacherConfig(model=str(bert_folder))).module.model.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    config = TeacherConfig(model=str(folder))
    assert load_model(config).labels == ("bad", "good")
    assert "weights_only" in inspect_model(config).notes[0]
    torch.save({**state, "x": Evil(tmp_path / "executed")}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"cannot be (read safely|loaded)"):
        load_model(config)
    assert not (tmp_path / "executed").exists()


def test_remote_code_needs_the_flag(bert_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "remote"
    shutil.copytree(bert_folder, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForSequenceClassification": "mine.Mine"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "mine.py").write_text(f"import os; os.mkdir({str(tmp_path / 'executed')!r})\n")
    with pytest.raises(ConfigError, match="needs remote code") as caught:
        load_model(TeacherConfig(model=str(folder)))
    assert "--trust-remote-code" in caught.value.hint
    assert not (tmp_path / "executed").exists()
