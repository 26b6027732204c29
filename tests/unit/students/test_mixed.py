"""Rows learnt in both tokenizations at once: nothing mixed is the teacher itself, mixed rows beat their start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from compressor.errors import PlanError  # noqa: E402
from compressor.students.mixed import Mixture, batch_of, learn, loss_of, mixer_of  # noqa: E402
from compressor.students.transplant import Pair, settle, start_rows, texts_of  # noqa: E402
from tests.unit.students.test_tokenizer import texts  # noqa: E402
from tests.unit.students.test_transplant import folders, opened  # noqa: E402, F401

pytestmark = pytest.mark.train
LINES = texts(24, 9)
NONE, EVERY = np.zeros(1, bool), np.ones(1, bool)


@pytest.fixture(params=["gpt", "bert"])
def scene(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[Any, Any, Any]:  # noqa: F811
    """A model, the same under the other's tokenizer, and the stage."""
    other = "bert" if request.param == "gpt" else "gpt"
    task = "causal-lm" if request.param == "gpt" else "text-classification"
    keys = {"tokenizer": str(folders[other]), "transplant": "mixed", "mixed_steps": 30}
    return opened(folders[request.param], folders["data"], task, **keys)


def test_nothing_mixed_is_the_models_own_loss(scene: tuple[Any, Any, Any]) -> None:
    model, made, _ = scene
    pair = Pair.of(model.files["tokenizer.json"], made.model.files["tokenizer.json"])
    mixture = Mixture(model, start_rows(pair, model, "pieces"))
    mixer = mixer_of(model, made.model.files["tokenizer.json"], mixture.offset)
    plain = [mixer.ids(line, NONE) for line in LINES[:4]]
    special = model.task != "causal-lm"
    for line, row in zip(LINES[:4], plain, strict=True):
        own = mixer.own.encode(line, add_special_tokens=special).ids + ([] if mixer.end is None else [mixer.end])
        assert row == own or len(own) > mixer.length
    batch = batch_of(plain, model)
    with torch.no_grad():
        wanted, found = model.module(**batch), mixture(batch)
        assert torch.allclose(found[..., : wanted.shape[-1]], wanted, atol=1e-6)
        mixed = float(loss_of(model, mixture, plain, plain))
        if model.task != "causal-lm":
            assert mixed == pytest.approx(0.0, abs=1e-6)
            return
        labels = torch.where(batch["attention_mask"][:, 1:] != 0, batch["input_ids"][:, 1:], -100)
        teacher = torch.nn.functional.cross_entropy(wanted[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert mixed == pytest.approx(float(teacher), abs=1e-6)


def test_words_are_cut_by_either_tokenizer(scene: tuple[Any, Any, Any]) -> None:
    model, made, _ = scene
    mixer = mixer_of(model, made.model.files["tokenizer.json"], 1000)
    before, after = mixer._frame()
    inner = mixer.ids("walks talked", EVERY)[len(before) : -len(after) or None]
    assert inner
    assert min(inner) >= 1000
    mixed = mixer.ids("walks talked", np.array([True, False]))[len(before) : -len(after) or None]
    assert mixed[0] >= 1000
    assert mixed[-1] < 1000


def test_learnt_rows_beat_their_start(scene: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.students.mixed.RATE", 0.02)
    model, made, _ = scene
    with torch.no_grad():  # as drawn, these models hardly look at their tokens
        for parameter in model.module.parameters():
            parameter.mul_(10.0 if parameter.dim() > 1 else 1.0)
    pair = Pair.of(model.files["tokenizer.json"], made.model.files["tokenizer.json"])
    content = made.model.files["tokenizer.json"]
    start = start_rows(pair, model, "pieces")
    random = {
        name: torch.randn(table.shape, generator=torch.Generator().manual_seed(0)) for name, table in start.items()
    }
    rows, (first, last) = learn(model, content, random, LINES, steps=60, probability=0.5, seed=0)
    assert last < first
    held, losses = texts(12, 77), {}
    for name, table in (("learnt", rows), ("random", random)):
        mixture = Mixture(model, table)
        mixer = mixer_of(model, content, mixture.offset)
        with torch.no_grad():
            new, plain = ([mixer.ids(line, coins) for line in held] for coins in (EVERY, NONE))
            losses[name] = float(loss_of(model, mixture, new, plain))
    assert losses["learnt"] < losses["random"]


def test_the_stage_starts_the_student_with_them(scene: tuple[Any, Any, Any], folders: dict[str, Path]) -> None:  # noqa: F811
    from compressor.data import load_data
    from compressor.recipe import DataConfig

    model, made, stage = scene
    config = DataConfig(source=str(folders["data"]), text="text", max_length=32, duplicates="drop")
    config = config if model.task == "causal-lm" else config.model_copy(update={"label": "label"})
    lines = texts_of(model, load_data(config, model, seed=0))
    assert lines
    student, facts = settle(made.model.module, model, stage, lines, 0)
    again, _ = settle(made.model.module, model, stage, lines, 0)
    batch = {n: torch.from_numpy(a) for n, a in made.data.splits["train"].batch(np.arange(2)).items()}
    with torch.no_grad():
        assert torch.equal(student(**batch), again(**batch)), "the seed decides"
        assert not torch.equal(student(**batch), made.model.module(**batch))
    assert "30 steps on mixed texts" in facts[0].reason


def test_other_tasks_are_refused(scene: tuple[Any, Any, Any]) -> None:
    from dataclasses import replace

    model = scene[0]
    with pytest.raises(PlanError, match="token-classification"):
        learn(replace(model, task="token-classification"), b"", {}, LINES, steps=1, probability=0.5, seed=0)
