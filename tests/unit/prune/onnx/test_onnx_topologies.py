"""The smaller graph computes what the masked one does, on every topology, and is really smaller."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from compressor.errors import PlanError
from compressor.models.onnx_facts import describe_model
from compressor.models.onnx_graph import constants
from compressor.prune.onnx import check, prune
from compressor.prune.onnx.graph import find_structure
from compressor.prune.onnx.runtime import Watcher, random_example
from compressor.prune.onnx.trace import prepare
from compressor.recipe import PruneStage
from tests.unit.prune.onnx.graphs import TOPOLOGIES, chain, residual, shared


def stage(**settings: object) -> PruneStage:
    return PruneStage.model_validate({"kind": "prune", "importance": "magnitude", **settings})


def calibration(model: ModelProto, samples: int = 40) -> list[dict[str, np.ndarray]]:
    """One batch of random inputs."""
    example = random_example(model)
    generator = np.random.default_rng(3)
    return [{name: generator.normal(size=(samples, *a.shape[1:])).astype(np.float32) for name, a in example.items()}]


def dims(model: ModelProto, name: str) -> list[int]:
    return list(constants(model.graph)[name].dims)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("importance", ["magnitude", "activation"])
def test_smaller_equals_masked(topology: str, importance: str) -> None:
    model = TOPOLOGIES[topology]()
    data = calibration(model)
    done = prune(model, random_example(model), stage(ratio=0.5, importance=importance), data)
    onnx.checker.check_model(done.model, full_check=True)
    wanted, found = Watcher(done.masked).run(data[0]), Watcher(done.model).run(data[0])
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=1e-4)
    assert done.parameters_after < done.parameters_before
    assert done.macs_before is not None
    assert done.macs_after is not None
    assert done.macs_after < done.macs_before
    assert any(fact.action == "pruned" for fact in done.facts)
    assert "does not compute" not in " ".join(fact.reason for fact in done.facts)


@pytest.mark.parametrize("topology", sorted(set(TOPOLOGIES) - {"shared"}))
def test_nothing_is_refused(topology: str) -> None:
    """Every group that may go is cut: the check after the cut finds nothing to take back."""
    model = TOPOLOGIES[topology]()
    done = prune(model, random_example(model), stage(ratio=0.5), [], repair=False)
    groups = find_structure(prepare(model), random_example(model)).groups
    expected = {name for group in groups if not group.hard for name in group.modules}
    assert expected <= {fact.layer for fact in done.facts if fact.action == "pruned"}


def test_chain_loses_what_was_planned() -> None:
    """8 and 12 channels become 4 and 6; the batch norms and the head follow."""
    model = chain()
    done = prune(model, random_example(model), stage(ratio=0.5), [], repair=False)
    assert dims(done.model, "c1.weight") == [4, 3, 3, 3]
    assert dims(done.model, "c2.weight") == [6, 4, 3, 3]
    assert dims(done.model, "bn2.mean") == [6]
    assert dims(done.model, "head.weight") == [3, 6]
    parameters = 4 * 27 + 4 * 4 + 6 * 36 + 4 * 6 + 3 * 6 + 3
    assert done.parameters_after == parameters == describe_model(done.model, 0).parameters
    assert done.macs_after == 64 * (4 * 27 + 6 * 36) + 18 == describe_model(done.model, 0).macs


def test_constant_nodes_get_smaller_too() -> None:
    done = prune(TOPOLOGIES["constant nodes"](), random_example(chain()), stage(ratio=0.5), [])
    assert dims(done.model, "c2.weight") == [6, 4, 3, 3]
    assert not [tensor for tensor in done.model.graph.initializer if "weight" in tensor.name]


def test_depthwise_and_groups() -> None:
    """A depthwise convolution loses groups, a grouped one keeps them and loses the same places in each."""
    thin = prune(TOPOLOGIES["depthwise"](), random_example(chain()), stage(ratio=0.5), []).model
    node = next(node for node in thin.graph.node if node.name == "dw")
    assert {a.name: a.i for a in node.attribute if a.name == "group"} == {"group": 4}
    assert dims(thin, "dw.weight") == [4, 1, 3, 3]
    wide = prune(TOPOLOGIES["grouped"](), random_example(chain()), stage(ratio=0.5), []).model
    assert dims(wide, "g.weight") == [12, 2, 3, 3]


def test_feed_forward_neurons_and_only_they() -> None:
    model = TOPOLOGIES["feed-forward"]()
    done = prune(model, random_example(model), stage(neurons=0.25), calibration(model))
    assert dims(done.model, "up.w") == [12, 24]
    assert dims(done.model, "down.w") == [24, 12]
    assert dims(done.model, "b1.bias") == [24]
    assert dims(done.model, "ln.scale") == [12]


def test_residual_lists_both_layers_with_reasons() -> None:
    facts = prune(residual(), random_example(chain()), stage(ratio=0.5), []).facts
    pruned = {fact.layer: (fact.before, fact.after) for fact in facts if fact.action == "pruned"}
    assert pruned == {name: pruned[name] for name in ("c1", "c3", "c2")}
    assert pruned["c1"] == pruned["c3"] == ("8 channels", "4 channels")
    assert next(fact.reason for fact in facts if fact.layer == "head") == "is the model's output"


def test_shared_weights_stay() -> None:
    done = prune(shared(), random_example(chain()), stage(ratio=0.5), [])
    kept = {fact.layer: fact.reason for fact in done.facts if fact.action == "kept"}
    assert "shared by 2 nodes" in kept["one"]
    assert dims(done.model, "twice") == [8, 8, 3, 3]
    assert dims(done.model, "c2.weight") == [6, 8, 3, 3]


def test_equal_vectors_do_not_tie_layers_together() -> None:
    """Exporters store equal biases once."""
    model = residual()
    for node in model.graph.node:
        if node.name == "c3":
            node.input[2] = "c1.bias"
    done = prune(model, random_example(model), stage(ratio=0.5), [])
    assert {fact.after for fact in done.facts if fact.action == "pruned"} == {"4 channels", "6 channels"}


@pytest.mark.parametrize(
    ("settings", "where", "what"),
    [
        ({"heads": 0.5}, "heads", "no heads"),
        ({"neurons": 0.5}, "neurons", "model's output"),
        ({"ratio": 0.5, "layers": 1}, "layers", "cannot be dropped from an ONNX file"),
        ({"ratio": 0.5, "protect": ["nowhere*"]}, "protect.0", "matches no"),
        ({"ratio": 0.5, "protect": ["c*"]}, "ratio", "matches nothing"),
        ({"ratio": 0.97}, "ratio", "would empty"),
    ],
)
def test_impossible_requests_are_plan_errors(settings: dict[str, object], where: str, what: str) -> None:
    config = stage(**settings)
    problems = check(chain(), random_example(chain()), config)
    assert any(problem.where == where and what in problem.what for problem in problems), problems
    with pytest.raises(PlanError):
        prune(chain(), random_example(chain()), config, [])


def test_channel_multiple_and_protection() -> None:
    done = prune(chain(), random_example(chain()), stage(ratio=0.5, protect=["c1"]), [], round_to=4)
    assert dims(done.model, "c1.weight")[0] == 8
    assert dims(done.model, "c2.weight")[0] == 8  # 6 is rounded to a multiple of 4
    assert math.prod(dims(done.model, "head.weight")) == 24


def test_the_given_model_is_not_changed() -> None:
    model = chain()
    before = model.SerializeToString(deterministic=True)
    prune(model, random_example(model), stage(ratio=0.5), calibration(model))
    assert model.SerializeToString(deterministic=True) == before
