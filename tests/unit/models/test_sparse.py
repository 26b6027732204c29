"""Masks beside the weights: stored with the student, replayed, dropped for the export; why a layer stays dense."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from compressor.config import validate  # noqa: E402
from compressor.errors import ConfigError, PlanError  # noqa: E402
from compressor.masks import Zeros  # noqa: E402
from compressor.models import sparse  # noqa: E402
from compressor.models.rebuild import load_student, save_student  # noqa: E402
from compressor.prune.sparsity import check, sparsify  # noqa: E402
from compressor.recipe import PruneStage  # noqa: E402

pytestmark = pytest.mark.train


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.stem = nn.Embedding(12, 8), nn.Linear(8, 6)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.body(torch.relu(self.stem(self.embed(ids)))))


def made():
    torch.manual_seed(0)
    return Tied()


def stage(**keys):
    return PruneStage(kind="prune", **keys)


def test_zeros_are_exact_recorded_and_come_back_with_the_student(tmp_path):
    teacher = made()
    done = sparsify(teacher, stage(sparsity=0.75))
    assert float((done.module.stem.weight == 0).float().mean()) == 0.75
    assert (done.weights, done.zeros) == (96, 72)
    assert bool((teacher.stem.weight != 0).all())  # the teacher is not touched
    save_student(tmp_path, done.module, done.record)
    back = load_student(tmp_path, teacher)
    masks = {name: mask for name, _, mask in sparse.masked(back)}
    assert set(masks) == {"stem.weight", "body.weight"}
    for name, weight, mask in sparse.masked(done.module):
        assert torch.equal(masks[name], mask)
        assert torch.equal(back.get_parameter(name), weight)
    assert not [name for name in sparse.drop_masks(back).state_dict() if name.endswith(sparse.SUFFIX)]


def test_rows_of_the_report_name_the_sparsity_before_and_after_and_why_a_layer_stays():
    facts = {fact.layer: fact for fact in sparsify(made(), stage(pattern="2:4")).facts}
    assert set(facts) == {"stem", "body", "head"}
    assert facts["body"].reason == "6 inputs are no multiple of 4"
    assert facts["head"].reason == "its weight is used twice (tied)"
    facts = {fact.layer: fact for fact in sparsify(made(), stage(sparsity=0.5, protect=["body"])).facts}
    assert facts["body"].reason == "protected by `body`"
    row = facts["stem"]
    assert (row.action, row.before, row.after) == ("sparsified", "0.0% zeros", "50.0% zeros")
    assert row.reason == "magnitude, uniform, 50 % unstructured"


def test_what_cannot_be_made_is_said_before():
    problems = check(made(), stage(pattern="3:7", protect=["nothing"]))
    assert [item.where for item in problems] == ["protect.0", "pattern"]
    with pytest.raises(PlanError, match="matches nothing"):
        sparsify(made(), stage(pattern="3:7"))


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"pattern": "4:2"}, "is no pattern"),
        ({"pattern": "block"}, "needs `sparsity`"),
        ({"pattern": "2:4", "sparsity": 0.8}, "means a sparsity of 0.5"),
        ({"sparsity": 0.8, "heads": 0.5}, "cut nothing"),
        ({"sparsity": 0.8, "importance": "taylor"}, "magnitude"),
        ({"sparsity": 1.0}, "less than 1"),
    ],
)
def test_keys_that_contradict_each_other(keys, text):
    with pytest.raises(ConfigError, match=text):
        validate(PruneStage, {"kind": "prune"} | keys, "recipe")


def test_a_pattern_is_shown_in_words():
    assert Zeros(0.5, "2:4").shown == "2:4"
    assert Zeros(0.7, "block", (1, 4)).shown == "70 % in blocks of 1x4"
