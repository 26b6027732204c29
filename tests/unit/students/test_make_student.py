"""Students by layer copy, by hidden width and by channel width."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from compressor.errors import PlanError  # noqa: E402
from compressor.models.rebuild import replay  # noqa: E402
from compressor.models.structure.blocks import spread_evenly  # noqa: E402
from compressor.recipe import StudentStage  # noqa: E402
from compressor.students import check, make_student  # noqa: E402
from examples.fashion_mnist.model import ResNet9  # noqa: E402

pytestmark = pytest.mark.train


class Text(nn.Module):
    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        config = transformers.BertConfig(
            hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=48, vocab_size=50
        )
        self.model = transformers.BertForSequenceClassification(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(0)
    return Text().eval()


@pytest.fixture
def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(24).reshape(3, 8), "attention_mask": torch.ones(3, 8, dtype=torch.long)}


def stage(**keys: object) -> StudentStage:
    return StudentStage(kind="student", **keys)  # type: ignore[arg-type]


def test_even_spread_is_distilberts() -> None:
    assert spread_evenly(12, 6) == (0, 2, 4, 7, 9, 11)
    assert spread_evenly(6, 6) == (0, 1, 2, 3, 4, 5)
    assert spread_evenly(6, 1) == (0,)


@pytest.mark.parametrize(("keep", "expected"), [(3, (0, 2, 5)), ((1, 4), (1, 4))])
def test_kept_layers_are_the_teachers(
    teacher: nn.Module, tokens: dict[str, Tensor], keep: object, expected: tuple[int, ...]
) -> None:
    made = make_student(teacher, stage(keep_layers=keep), tokens, seed=0)
    layers = made.module.model.bert.encoder.layer
    assert len(layers) == len(expected)
    for layer, source in zip(layers, expected, strict=True):
        original = teacher.model.bert.encoder.layer[source].state_dict()
        assert all(torch.equal(value, original[key]) for key, value in layer.state_dict().items())
    assert sum(fact.action == "copied" for fact in made.facts) == len(expected)
    by_hand = copy.deepcopy(teacher)
    by_hand.model.bert.encoder.layer = nn.ModuleList([teacher.model.bert.encoder.layer[i] for i in expected])
    assert torch.equal(made.module(**tokens), by_hand(**tokens))


def test_narrow_hidden_size(teacher: nn.Module, tokens: dict[str, Tensor]) -> None:
    made = make_student(teacher, stage(hidden_size=24, keep_layers=2), tokens, seed=0, calibration=[tokens])
    bert = made.module.model.bert
    assert bert.embeddings.word_embeddings.weight.shape == (50, 24)
    assert bert.embeddings.LayerNorm.normalized_shape == (24,)
    attention = bert.encoder.layer[1].attention
    assert (attention.self.query.in_features, attention.self.query.out_features) == (24, 32)
    assert (attention.output.dense.in_features, attention.output.dense.out_features) == (32, 24)
    assert made.module.model.classifier.out_features == 2
    assert made.module(**tokens).shape == (3, 2)
    assert made.parameters_after < 0.45 * made.parameters_before
    assert str(replay(teacher, made.record)) == str(made.module)


def test_hidden_units_that_say_nothing_go_first(teacher: nn.Module, tokens: dict[str, Tensor]) -> None:
    """Units whose layer-norm outputs are zero everywhere are the ones that are cut; the weights are slices."""
    silent = [3, 7, 11, 12, 20, 21, 22, 31]
    for part in teacher.modules():
        if isinstance(part, nn.LayerNorm):
            part.weight.data[silent] = part.bias.data[silent] = 0
    made = make_student(teacher, stage(hidden_size=24), tokens, seed=0, calibration=[tokens])
    kept = [index for index in range(32) if index not in silent]
    words = teacher.model.bert.embeddings.word_embeddings.weight
    assert torch.equal(made.module.model.bert.embeddings.word_embeddings.weight, words[:, kept])


def test_hidden_size_of_an_embedding_model_is_its_output(tokens: dict[str, Tensor]) -> None:
    class Embedder(Text):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.model.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]

    problems = check(Embedder(2).eval(), tokens, stage(hidden_size=24))
    assert [problem.where for problem in problems] == ["hidden_size"]
    assert "is the model's output" in problems[0].what


def test_width_scales_every_stage_and_draws_new_weights() -> None:
    teacher = ResNet9()
    batch = {"image": torch.randn(2, 1, 28, 28)}
    made = make_student(teacher, stage(width=0.25), batch, seed=3)
    fresh = ResNet9(6, (12, 24, 48))
    assert str(made.module) == str(fresh)
    assert {k: v.shape for k, v in made.module.state_dict().items()} == {
        k: v.shape for k, v in fresh.state_dict().items()
    }
    assert not torch.equal(made.module.stem[0].weight, teacher.stem[0].weight[:6])
    again, other = (make_student(teacher, stage(width=0.25), batch, seed=seed).module for seed in (3, 4))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in made.module.state_dict().items())
    assert not torch.equal(other.head.weight, again.head.weight)


def test_making_a_student_leaves_the_random_state_alone() -> None:
    module = ResNet9(8, (8, 8, 8))
    state = torch.get_rng_state()
    make_student(module, stage(width=0.5), {"image": torch.zeros(2, 1, 28, 28)}, seed=0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        ({"keep_layers": 7}, "keep_layers"),
        ({"keep_layers": (0, 6)}, "keep_layers"),
        ({"keep_layers": (2, 1)}, "keep_layers"),
        ({"hidden_size": 40}, "hidden_size"),
        ({"width": 0.5}, "width"),
    ],
)
def test_requests_that_do_not_fit(
    teacher: nn.Module, tokens: dict[str, Tensor], keys: dict[str, object], where: str
) -> None:
    assert [problem.where for problem in check(teacher, tokens, stage(**keys))] == [where]
    with pytest.raises(PlanError):
        make_student(teacher, stage(**keys), tokens, seed=0)


def test_convolutional_model_has_no_layers_or_hidden_size() -> None:
    batch = {"image": torch.randn(2, 1, 28, 28)}
    problems = check(ResNet9(8, (8, 8, 8)), batch, stage(keep_layers=2, hidden_size=8))
    assert [problem.where for problem in problems] == ["keep_layers", "hidden_size"]
