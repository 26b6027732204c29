"""Masked tokens: which are hidden, what the term is, and that a student learns to find them."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from compressor.data.types import DataBundle  # noqa: E402
from compressor.distil.augment import augment  # noqa: E402
from compressor.distil.fit import fit_problems  # noqa: E402
from compressor.distil.loop import distil  # noqa: E402
from compressor.distil.objectives.base import Batch, Context  # noqa: E402
from compressor.distil.objectives.masked import MaskedTokens, hidden_tokens  # noqa: E402
from compressor.distil.terms import check  # noqa: E402
from compressor.models.signals import available  # noqa: E402
from compressor.recipe import DistilStage  # noqa: E402
from tests.unit.distil.objectives.cases import FIRST  # noqa: E402
from tests.unit.distil.toy import Sentences, transformer  # noqa: E402

pytestmark = pytest.mark.train
MASK = 49  # token of the toy vocabulary that stands for a hidden one


class Texts(Sentences):
    """Sentences whose tokens alternate between two that depend on the first: a hidden one can be told."""

    def __init__(self, name: str, count: int, seed: int, labelled: bool = True) -> None:
        super().__init__(name, count, seed, labelled)
        self.store = SimpleNamespace(preprocess=SimpleNamespace(mask_id=MASK))
        for row, tokens in enumerate(self.tokens):
            tokens[1:-1] = 3 + row % 3 * 2 + np.arange(len(tokens) - 2) % 2


def built(student: torch.nn.Module) -> MaskedTokens:
    objective = MaskedTokens()
    assert objective.bind(available(student), {"logits": 1}) == []
    assert objective.unfit(student) == []
    assert objective.install(student, {}) == ()
    signals = {objective.own: torch.zeros(1, 2, 16)}
    objective.prepare(Context(signals, {}, torch.Generator().manual_seed(0), "cpu"))
    return objective


def test_a_table_of_zeros_knows_nothing() -> None:
    student = transformer(1, 0)
    torch.nn.init.zeros_(student.embed.weight)
    objective = built(student)
    batch = Batch(None, torch.ones(1, 3), masked=torch.tensor([[-100, 5, 7]]))
    term = objective({objective.own: torch.randn(1, 3, 16)}, {}, batch, FIRST)
    assert float(term.sum / term.count) == pytest.approx(math.log(50))
    assert int(term.count) == 2


def test_only_hidden_tokens_count_and_shared_weights_predict_them() -> None:
    student = transformer(1, 0)
    objective, states = built(student), torch.randn(2, 3, 16)
    hidden = torch.tensor([[-100, 5, -100], [-100, -100, 8]])
    term = objective({objective.own: states}, {}, Batch(None, torch.ones(2, 3), masked=hidden), FIRST)
    parts = objective.modules()
    rows = parts.norm(torch.nn.functional.gelu(parts.dense(states[[0, 1], [1, 2]])))
    logs = (rows @ student.embed.weight.T + parts.bias).log_softmax(-1)
    assert float(term.sum) == pytest.approx(-float(logs[0, 5] + logs[1, 8]), rel=1e-5)
    term.sum.backward()
    assert student.embed.weight.grad is not None
    assert not {id(p) for p in student.parameters()} & {id(p) for p in objective.parameters()}


def test_about_fifteen_of_a_hundred_tokens_are_hidden_and_never_the_ends() -> None:
    split = Texts("train", 400, 1)
    inputs = {name: torch.from_numpy(array) for name, array in split.batch(np.arange(400)).items()}
    made = augment(inputs, ("mask",), np.arange(400), 0, 3, MASK)
    again, other = (augment(inputs, ("mask",), np.arange(400), view, 3, MASK)["input_ids"] for view in (0, 1))
    hidden = hidden_tokens(made["input_ids"], inputs["input_ids"])
    inner = int((inputs["input_ids"] > 2).sum())
    assert 0.12 < int((hidden >= 0).sum()) / inner < 0.18
    assert bool((made["input_ids"][hidden >= 0] == MASK).all())
    assert hidden.unique().min() == -100
    assert not set(hidden.unique().tolist()) & {0, 1, 2}
    assert torch.equal(again, made["input_ids"])
    assert not torch.equal(other, again)
    assert torch.equal(augment(inputs, ("mask",), np.arange(400), 0, 3)["input_ids"], inputs["input_ids"])


def test_hidden_tokens_of_a_pattern_are_found_again(tmp_path: Path) -> None:
    stage = DistilStage.model_validate(
        {
            "kind": "distil", "epochs": 8, "batch": 16, "labels": 0.0, "learning_rate": 5e-3, "precision": "fp32",
            "augment": ["mask"], "views": 4, "accumulate": 2, "objective": [{"use": "masked-tokens"}],
        }
    )  # fmt: skip
    data = DataBundle({"train": Texts("train", 96, 1)}, (), "toy", {"train": "t"})
    student = transformer(1, 3)
    before = set(student.state_dict())
    result = distil(
        student, transformer(2, 4), data, stage, seed=0, work=tmp_path / "w", bank=tmp_path / "b", teacher_digest="t",
        signals={},
    )  # fmt: skip
    assert result.teacher_forwards == 0
    assert result.history[-1].loss < 0.5 * result.history[0].loss
    assert set(student.state_dict()) == before


def test_what_hides_nothing_is_refused() -> None:
    stage = DistilStage.model_validate({"kind": "distil", "objective": [{"use": "masked-tokens"}]})
    offered = {"logits": 1, "hidden": 3, "qkv": 2}
    assert ['augment = ["mask"]' in problem.what for problem in check(stage, offered, offered)] == [True]
    data = DataBundle({"train": Sentences("train", 8, 1), "validation": Sentences("v", 8, 2)}, ("a", "b"), "toy", {})
    hiding = DistilStage.model_validate({"kind": "distil", "augment": ["mask", "token-drop"]})
    example = {name: torch.from_numpy(array) for name, array in data.splits["train"].batch(np.arange(2)).items()}
    found = fit_problems(hiding, "s", task="text-classification", module=transformer(1, 0), example=example, data=data)
    assert [problem.what for problem in found] == [
        "`mask` needs a tokenizer with a mask token", "`mask` and `token-drop` do not go together",
    ]  # fmt: skip
