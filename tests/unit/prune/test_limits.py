"""What must not be cut, what is refused, and what a user is told."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from compressor.errors import PlanError, StageError  # noqa: E402
from compressor.prune import check, prune  # noqa: E402
from compressor.recipe import PruneStage  # noqa: E402
from tests.unit.prune.topologies import Net, build, conv, images  # noqa: E402

pytestmark = pytest.mark.train


def stage(**keys: object) -> PruneStage:
    return PruneStage(kind="prune", **{"importance": "magnitude", **keys})  # type: ignore[arg-type]


class LiteralView(Net):
    """The code says 16, so the stem's 16 channels must stay; the other convolution is free."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = conv(16, 24), conv(24, 16)

    def body(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x)) + x.reshape(-1, 16, 64).reshape(-1, 16, 8, 8)


class ChannelAttention(Net):
    """A softmax and a maximum over the channels themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = conv(16, 16)

    def body(self, x: Tensor) -> Tensor:
        return self.inner(x).softmax(dim=1) * x.amax(dim=1, keepdim=True)


class Strange(Net):
    """Uses an operation that the pruner has no rule for."""

    def body(self, x: Tensor) -> Tensor:
        return torch.cummax(x, dim=1).values


def fact_of(pruned: object, layer: str) -> object:
    return next(fact for fact in pruned.facts if fact.layer == layer)  # type: ignore[attr-defined]


def test_layer_with_a_literal_size_is_left_whole_and_named() -> None:
    torch.manual_seed(0)
    pruned = prune(LiteralView().eval(), images(), stage(ratio=0.5), [])
    assert pruned.module.stem[0].out_channels == 16
    assert pruned.module.inner.out_channels == 12
    kept = fact_of(pruned, "stem.0")
    assert kept.action == "kept"
    assert "forward fails" in kept.reason


def test_units_that_are_compared_with_each_other_stay() -> None:
    problems = check(ChannelAttention().eval(), images(), stage(ratio=0.5))
    assert [problem.where for problem in problems] == ["ratio"]
    assert "_softmax" in problems[0].what
    assert "amax" in problems[0].what


def test_unknown_operation_protects_and_is_named() -> None:
    problems = check(Strange().eval(), images(), stage(channels=0.5))
    assert problems[0].where == "channels"
    assert "`cummax`" in problems[0].what


def test_model_output_stays() -> None:
    pruned = prune(build("chain"), images(), stage(ratio=0.5), [])
    assert fact_of(pruned, "head").reason == "is the model's output"
    assert pruned.module(**images()).shape == (4, 4)


def test_embedding_output_fixes_the_width_that_makes_it() -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    pruned = prune(module.eval(), {"x": torch.randn(4, 6)}, stage(neurons=0.5), [])
    assert [layer.out_features for layer in pruned.module if isinstance(layer, nn.Linear)] == [4, 5]


def test_ratio_that_would_empty_a_layer() -> None:
    problems = check(build("squeeze-excite"), images(), stage(ratio=0.95))
    assert len(problems) == 1
    assert problems[0].where == "ratio"
    assert "would empty `down`, which has 8 channels" in problems[0].what
    with pytest.raises(PlanError, match="would empty"):
        prune(build("squeeze-excite"), images(), stage(ratio=0.95), [])


@pytest.mark.parametrize(
    ("keys", "where"),
    [({"heads": 0.5}, "heads"), ({"neurons": 0.5}, "neurons"), ({"layers": 1}, "layers")],
)
def test_request_that_matches_nothing(keys: dict[str, float], where: str) -> None:
    problems = check(build("grouped"), images(), stage(**keys))
    assert [problem.where for problem in problems] == [where]
    assert "matches nothing" in problems[0].what


def test_protect_pattern() -> None:
    assert check(build("residual"), images(), stage(ratio=0.5, protect=("stm*",)))[0].where == "protect.0"
    pruned = prune(build("residual"), images(), stage(ratio=0.5, protect=("stem", "tw?")), [])
    assert pruned.module.stem[0].out_channels == 16
    assert (pruned.module.one.out_channels, pruned.module.short.out_channels) == (12, 32)
    assert fact_of(pruned, "short").reason == "protected by `tw?`"


def test_counts_are_rounded_to_the_devices_multiple() -> None:
    pruned = prune(build("chain"), images(), stage(ratio=0.4), [], round_to=8)
    assert [layer.out_channels for layer in pruned.module.modules() if isinstance(layer, nn.Conv2d)] == [8, 16, 16]
    whole = prune(build("chain"), images(), stage(ratio=0.4), [], round_to=16)
    assert whole.module.stem[0].out_channels == 16
    assert "multiple" in fact_of(whole, "stem.0").reason


def test_global_scope_takes_more_where_less_matters_and_empties_nothing() -> None:
    module = build("chain")
    with torch.no_grad():
        module.middle[0].weight[4:] *= 1e-3
        module.middle[0].bias[4:] *= 1e-3
        for tensor in (module.middle[1].weight, module.middle[1].bias, module.middle[2].weight):
            tensor[4:] *= 1e-3
        module.middle[4].weight[:, 4:] *= 1e-3
    pruned = prune(module, images(), stage(ratio=28 / 72, scope="global"), [])
    assert pruned.module.middle[0].out_channels == 4
    assert pruned.module.stem[0].out_channels == 16


def test_activation_importance_without_data() -> None:
    with pytest.raises(StageError, match="needs calibration data"):
        prune(build("chain"), images(), stage(ratio=0.5, importance="activation"), [])


def test_broken_example_is_a_problem_not_a_crash() -> None:
    assert check(build("chain"), {"image": torch.randn(2, 5, 8, 8)}, stage(ratio=0.5))[0].where == "model"
