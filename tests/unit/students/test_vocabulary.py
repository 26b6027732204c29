"""The vocabulary of a corpus: same outputs, really smaller tables, one stream of ids for teacher and student."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

import transformers  # noqa: E402
from torch import nn  # noqa: E402

from compressor.data import load_data, read_raw  # noqa: E402
from compressor.errors import PlanError  # noqa: E402
from compressor.models import load_model  # noqa: E402
from compressor.models.rebuild import load_student, save_student  # noqa: E402
from compressor.models.vocabulary import kept_ids, read_ids, tables_of, vocabulary_steps  # noqa: E402
from compressor.recipe import Recipe, StudentStage  # noqa: E402
from compressor.students import make_student  # noqa: E402
from compressor.students.vocabulary import Trimmed, trim, unchanged  # noqa: E402
from tests.unit.students.test_tokenizer import STEMS, byte_level, texts, wordpiece  # noqa: E402

pytestmark = pytest.mark.train


def write(path: Path, rows: list[str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([row, number % 2] for number, row in enumerate(rows))
    return path


def checkpoint(folder: Path, kind: str) -> Path:
    """A tiny teacher with a tokenizer of its own."""
    torch.manual_seed(0)
    made = wordpiece() if kind == "bert" else byte_level()
    if kind == "bert":
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        model: Any = transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=made.get_vocab_size() + 4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=32, max_position_embeddings=64, pad_token_id=0,
            )
        )  # fmt: skip
    else:
        special = {"eos_token": "</s>", "bos_token": "<s>"}
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=made.get_vocab_size(), n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=1,
                bos_token_id=0,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **special)
    fast.save_pretrained(folder)
    return folder


def opened(folder: Path, kind: str, **stage: object) -> tuple[Any, Any, Trimmed | None]:
    """A teacher, its data and both in the smaller vocabulary."""
    model = checkpoint(folder / "teacher", kind)
    recipe = Recipe.model_validate(
        {
            "teacher": {"model": str(model), **({"task": "causal-lm"} if kind == "gpt" else {})},
            "data": {
                "source": str(write(folder / "train.csv", texts(120, 1, STEMS[:5]))),
                "test": str(write(folder / "test.csv", texts(30, 2, STEMS[3:]))),
                "text": "text", "label": "label", "max_length": 48, "duplicates": "drop", "validation": 20,
                "calibration": 20,
            },
            "stage": [{"kind": "student", "vocabulary": "corpus", **stage}] if stage.pop("on", True) else [],
        }
    )  # fmt: skip
    raw = read_raw(recipe.data)
    loaded = load_model(recipe.teacher, data=recipe.data, sample=raw.sample)
    data = load_data(recipe.data, loaded, seed=0, raw=raw)
    return loaded, data, trim(loaded, data, raw, recipe)


def tensors(split: Any, count: int = 8) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in split.batch(np.arange(min(count, len(split)))).items()}


@pytest.fixture(scope="module", params=["bert", "gpt"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any, Trimmed]:
    model, data, made = opened(tmp_path_factory.mktemp(request.param), request.param)
    assert made is not None
    return request.param, model, data, made


def student_of(made: Trimmed, **keys: object) -> Any:
    stage = StudentStage(kind="student", vocabulary="corpus", **keys)  # type: ignore[arg-type]
    return make_student(made.model.module, stage, tensors(made.data.splits["calibration"], 2), seed=0)


def test_student_gives_the_teachers_outputs(case: tuple[str, Any, Any, Trimmed]) -> None:
    kind, model, data, made = case
    student = student_of(made).module
    for name in ("train", "validation"):
        old, new = tensors(data.splits[name]), tensors(made.data.splits[name])
        assert made.keep[new["input_ids"]].tolist() == old["input_ids"].tolist()
        with torch.no_grad():
            wanted, mapped, found = model.module(**old), made.model.module(**new), student(**new)
        wanted = wanted[..., made.keep] if kind == "gpt" else wanted
        assert torch.allclose(mapped, wanted, atol=1e-6)
        assert torch.allclose(found, wanted, atol=1e-5)
    assert bool(unchanged(data.splits["validation"], made.data.splits["validation"], made.keep).all())


def test_tables_are_really_smaller(case: tuple[str, Any, Any, Trimmed]) -> None:
    kind, model, _, made = case
    result = student_of(made)
    tables = tables_of(result.module)
    assert tables is not None
    embedding = result.module.get_submodule(tables.embedding)
    assert embedding.weight.shape == (len(made.keep), 16)
    assert embedding.num_embeddings == len(made.keep)
    rows = model.module.get_submodule(tables.embedding).num_embeddings
    assert result.parameters_before - result.parameters_after == (rows - len(made.keep)) * 16
    assert kept_ids(result.module) is None
    assert {fact.action for fact in result.facts} == {"trimmed"}
    if kind == "gpt":
        output = result.module.get_submodule(tables.output or "")
        assert output.weight is embedding.weight
        assert made.model.outputs[0].shape[-1] == len(made.keep)
        assert result.module.model.config.vocab_size == len(made.keep)
        assert made.keep[made.model.preprocess.eos_id] == 1
        assert made.keep[result.module.model.config.eos_token_id] == 1


def test_a_stored_student_is_loaded_again(case: tuple[str, Any, Any, Trimmed], tmp_path: Path) -> None:
    made = case[3]
    result = student_of(made, keep_layers=1, ranks={"*.word_embeddings": 8} if case[0] == "bert" else {})
    save_student(tmp_path, result.module, result.record)
    again = load_student(tmp_path, made.model.module)
    batch = tensors(made.data.splits["validation"])
    assert torch.equal(again(**batch), result.module(**batch))
    json.loads((tmp_path / "record.json").read_text())


def test_teacher_keeps_its_own_weights_and_ids(case: tuple[str, Any, Any, Trimmed]) -> None:
    _, model, data, made = case
    assert kept_ids(model.module) is None
    pairs = zip(model.module.parameters(), made.model.module.parameters(), strict=True)
    assert all(own is shared for own, shared in pairs)
    assert made.data.digests["validation"] != data.digests["validation"]
    assert model.files["tokenizer.json"] != made.model.files["tokenizer.json"]
    if made.data.splits["validation"].labels is not None and case[0] == "bert":
        assert (made.data.splits["test"].labels == data.splits["test"].labels).all()


def test_test_words_are_not_in_the_vocabulary(case: tuple[str, Any, Any, Trimmed]) -> None:
    kind, _, data, made = case
    assert "tokens" in made.text
    if kind == "bert":
        assert not unchanged(data.splits["test"], made.data.splits["test"], made.keep).all()


def test_a_limit_and_more_text(tmp_path: Path) -> None:
    extra = tmp_path / "more.txt"
    extra.write_text("\n".join(texts(60, 5)))
    _, _, plain = opened(tmp_path / "a", "bert")
    _, _, more = opened(tmp_path / "b", "bert", extra_corpus=str(extra))
    assert plain is not None
    assert more is not None
    assert len(more.keep) > len(plain.keep)
    _, _, few = opened(tmp_path / "c", "bert", keep_tokens=len(plain.keep) - 10)
    assert few is not None
    assert len(few.keep) <= len(plain.keep) - 10
    assert few.model.module(**tensors(few.data.splits["validation"])).shape == (8, 2)


def test_nothing_happens_unasked(tmp_path: Path) -> None:
    assert opened(tmp_path, "bert", on=False)[2] is None


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()


@pytest.mark.parametrize(("keys", "where"), [({"keep_tokens": 5}, "keep_tokens"), ({"extra_corpus": "no"}, "extra")])
def test_what_cannot_be_done_names_its_key(tmp_path: Path, keys: dict[str, object], where: str) -> None:
    with pytest.raises(PlanError, match=where) as caught:
        opened(tmp_path, "bert", **keys)
    assert caught.value.problems[0].where.startswith("stage.0.student.")


def test_models_without_one_table_are_refused() -> None:
    with pytest.raises(PlanError, match="matches nothing"):
        read_ids(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), [0, 1])
    assert vocabulary_steps(nn.Sequential(nn.Embedding(5, 3))) == []


def test_limits_without_a_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        StudentStage(kind="student", keep_tokens=100)
