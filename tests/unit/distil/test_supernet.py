"""Super-nets: sub-nets are slices of shared weights, trained in turn, judged with what they inherit, and cut out."""

from __future__ import annotations

import copy
from collections import Counter

import pytest

torch = pytest.importorskip("torch")

from compressor.distil.loop import distil  # noqa: E402
from compressor.distil.masks import mask_problems  # noqa: E402
from compressor.distil.objectives.base import Step  # noqa: E402
from compressor.distil.objectives.features import relation_divergence, relation_logits  # noqa: E402
from compressor.distil.supernet import SharedWeights  # noqa: E402
from compressor.distil.supernet.subnets import SubNets  # noqa: E402
from compressor.errors import StageError  # noqa: E402
from compressor.models.cost import count_macs, count_parameters  # noqa: E402
from compressor.models.rebuild import apply, replay  # noqa: E402
from compressor.models.signals import SignalTap  # noqa: E402
from compressor.models.structure.blocks import drop_steps  # noqa: E402
from compressor.models.structure.sizes import cuts_of  # noqa: E402
from compressor.models.structure.surgery import mask  # noqa: E402
from compressor.recipe import DistilStage  # noqa: E402
from compressor.search import SuperNet  # noqa: E402
from tests.unit.distil.toy import Sentences, bundle, convnet, transformer  # noqa: E402
from tests.unit.prune.conftest import bert, tokens  # noqa: E402, F401

pytestmark = pytest.mark.train
LAYERS = "model.bert.encoder.layer"
SPACE = SuperNet(
    keep_layers=((0, 2, 3), 2), hidden_size=(24, 32), heads=(1, 2), neurons=(40, 64), budget={"macs": 10**9}
)
SMALL = {"keep_layers": (0, 2, 3), "hidden_size": 24, "heads": 2, "neurons": 40}


def nets_of(module, example, space=SPACE, names=("logits",)):
    made = SubNets(module, space, example, [example])
    made.listen(names)
    return made


def shared(module):
    return dict(module.named_parameters(remove_duplicate=False))


def test_a_sub_net_computes_what_its_record_cuts_out_and_costs_what_that_costs(bert, tokens):  # noqa: F811
    net = nets_of(bert, tokens)(SMALL)
    trained = copy.deepcopy(bert)
    with torch.no_grad():
        for parameter in trained.parameters():  # the weights have moved since the structure was made
            parameter.add_(torch.randn_like(parameter) * 0.05)
    cut = replay(trained, net.record).eval()
    found = net.signals(shared(trained), tokens, training=False)["logits"]
    assert torch.allclose(found, cut(**tokens), atol=1e-5)
    assert net.parameters_count == count_parameters(cut) < count_parameters(bert)
    assert net.macs == count_macs(cut, tokens)
    assert all(parameter.is_meta for parameter in net.parameters())


def test_without_a_narrower_stream_it_is_the_masked_super_net(bert, tokens):  # noqa: F811
    nets = nets_of(bert, tokens)
    wanted = {"heads": 2, "neurons": 40}
    zeroed = mask(bert, cuts_of(bert, nets.groups, nets.scores, wanted))
    apply(zeroed, drop_steps(zeroed, LAYERS, (0, 2, 3)))
    found = nets({"keep_layers": (0, 2, 3), **wanted}).signals(shared(bert), tokens, training=False)["logits"]
    assert torch.allclose(found, zeroed.eval()(**tokens), atol=1e-4)


def test_gradients_reach_the_slices_and_nothing_else(bert, tokens):  # noqa: F811
    nets = nets_of(bert, tokens)
    nets(SMALL).signals(shared(bert), tokens, training=True)["logits"].square().sum().backward()
    weights = shared(bert)
    assert weights[f"{LAYERS}.1.output.dense.weight"].grad is None
    grad = weights[f"{LAYERS}.2.intermediate.dense.weight"].grad
    assert int(grad.any(1).sum()) == 40
    assert int(grad.any(0).sum()) == 24
    assert int(weights[f"{LAYERS}.3.attention.self.query.weight"].grad.any(1).sum()) == 2 * 8


def test_smaller_sub_nets_lie_inside_larger_ones(bert, tokens):  # noqa: F811
    nets = nets_of(bert, tokens, SuperNet(neurons=(16, 40), heads=(1, 3), budget={"macs": 10**9}))
    small, large = (nets({"neurons": n, "heads": h}).sources for n, h in ((16, 1), (40, 3)))
    for name in (f"{LAYERS}.0.intermediate.dense.bias", f"{LAYERS}.0.attention.self.value.weight"):
        inner, outer = (set(sources[name].cuts[0][1].tolist()) for sources in (small, large))
        assert inner < outer


def test_signals_have_the_names_and_the_width_of_the_student(bert, tokens):  # noqa: F811
    names = ("hidden[0]", "hidden[2]", "hidden[-1]", "qkv[-1]", "q[1]", "logits")
    net = nets_of(bert, tokens, names=names)(SMALL)
    found = net.signals(shared(bert), tokens, training=False)
    cut = replay(bert, net.record).eval()
    with SignalTap(cut, ["hidden[1]", "hidden[3]", "qkv[2]", "q[0]"]) as tap:
        own = tap(tokens)
    assert list(found) == list(names)
    kept = found["hidden[-1]"].abs().sum((0, 1)) > 0
    assert found["hidden[-1]"].shape[-1] == 32
    assert int(kept.sum()) == 24
    assert torch.equal(found["hidden[-1]"][..., kept], own["hidden[3]"])
    assert torch.equal(found["hidden[2]"][..., kept], own["hidden[1]"])  # layer 1 is gone: what layer 0 gave
    assert torch.equal(found["qkv[-1]"], own["qkv[2]"])
    assert torch.equal(found["q[1]"], own["q[0]"])


def test_every_step_draws_one_sub_net_uniformly(bert, tokens):  # noqa: F811
    nets = nets_of(bert, tokens)
    made = SharedWeights(bert, nets, 5, None)
    drawn = []
    for index in range(1600):
        made.begin(Step(index, 1600, 0))
        drawn.append(str(made._candidate))
    counts = Counter(drawn)
    assert len(counts) == SPACE.size == 16
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 37.7  # chi-squared of 15 at 0.1 %
    again = SharedWeights(bert, nets, 5, None)
    again.begin(Step(77, 1600, 0))
    assert str(again._candidate) == drawn[77]


def stage(**settings):
    plain = {
        "kind": "distil",
        "epochs": 4,
        "batch": 16,
        "labels": 0.0,
        "precision": "fp32",
        "objective": [
            {"use": "soft-ce"},
            {"use": "hidden", "match": {"student": "hidden[-1]", "teacher": "hidden[-1]"}},
            {"use": "minilm-relations", "options": {"compare": "mse"}},
        ],
        "supernet": {"keep_layers": [1, 2, 3], "neurons": [8, 32], "budget": {"parameters": 5000}},
    }
    return DistilStage.model_validate(plain | settings)


def run(folder, config, name="work", **more):
    student, teacher = transformer(3, 4, 16, 2), transformer(3, 4, 16, 2)
    settings = {"seed": 3, "teacher_digest": "t", "signals": {}} | more
    data = bundle(Sentences, train=64)
    return distil(student, teacher, data, config, work=folder / name, bank=folder / "bank", **settings), student


class StopError(Exception):
    """Raised in the middle of a run."""


def test_the_best_sub_net_within_the_budget_is_cut_out_and_a_broken_run_ends_the_same(tmp_path):
    result, calm = run(tmp_path, stage(), "calm")
    rows = {fact.layer: fact for fact in result.facts}
    assert len(rows) == 6
    chosen = [fact for fact in result.facts if fact.action == "chosen"]
    judged = [fact for fact in result.facts if fact.action == "judged"]
    assert len(chosen) == 1
    assert all("are allowed" in fact.reason for fact in result.facts if fact.action == "left out")
    assert len(judged) + 1 + sum(fact.action == "left out" for fact in result.facts) == 6
    assert f"{count_parameters(calm):,} parameters" in chosen[0].after
    assert count_parameters(calm) <= 5000
    loss = [float(fact.reason.split()[1]) for fact in [*chosen, *judged]]
    assert loss == sorted(loss)
    assert all(name in chosen[0].reason for name in ("soft-ce", "hidden", "minilm-relations"))

    def stop(kind, event):
        if kind == "epoch" and event["epoch"] == 1:
            raise StopError

    with pytest.raises(StopError):
        run(tmp_path, stage(), "broken", on_event=stop)
    again, student = run(tmp_path, stage(), "broken")
    assert (again.record, again.facts) == (result.record, result.facts)
    left, right = calm.state_dict(), student.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    replay(transformer(3, 4, 16, 2), result.record).load_state_dict(left, strict=True)


def test_latency_limits_too_and_the_twin_searches_by_labels(tmp_path):
    space = {"keep_layers": [1, 3], "neurons": [8, 32], "budget": {"latency_ms": 1.0}}
    config = stage(epochs=1, accumulate=2, supernet=space)
    result, twin = run(tmp_path, config, labels_only=True, cost=lambda shape: 0.4 if shape.outputs == 32 else 0.01)
    assert result.teacher_forwards == 0
    assert {fact.action for fact in result.facts} == {"chosen", "judged", "left out"}
    assert all(fact.reason.startswith("loss") for fact in result.facts[:3])
    assert "labels" in result.facts[0].reason
    assert len(twin.layers) in (1, 3)
    nothing = stage(epochs=1, supernet={**space, "budget": {"latency_ms": 0.001}})
    with pytest.raises(StageError, match="none of the 4 sub-nets"):
        run(tmp_path, nothing, "none", cost=lambda shape: 1.0)


def test_what_cannot_be_a_super_net_is_a_problem_of_the_plan(bert, tokens):  # noqa: F811
    def wrong(module, example, **settings):
        return [f"{item.where}: {item.what}" for item in mask_problems(stage(**settings), "s", module, example)]

    space = {"keep_layers": [2, 3], "budget": {"macs": 10**9}}
    pictures = {"image": torch.zeros(2, 1, 12, 12)}
    assert "batch norm" in wrong(convnet(4, 0), pictures, objective=[{"use": "kd"}], supernet=space)[0]
    assert wrong(bert, tokens, supernet=space) == []
    (text,) = wrong(bert, tokens, supernet={**space, "budget": {"macs": 10}})
    assert text.startswith("s.supernet.budget: no sub-net meets it; the smallest, keep_layers 2")
    found = wrong(bert, tokens, supernet={"keep_layers": [2, 9], "heads": [9, 2], "budget": {"macs": 10**9}})
    assert [text.partition(":")[0] for text in found] == ["s.supernet.keep_layers.1", "s.supernet.heads.0"]
    exits = {"use": "multi-exit", "options": {}}
    assert "puts a part into the student" in wrong(bert, tokens, supernet=space, objective=[exits])[0]
    assert "s.rounds" in wrong(bert, tokens, supernet=space, rounds=2)[0]
    with pytest.raises(ValueError, match="patience"):
        stage(supernet=space, patience=1)


def test_relations_by_squared_error(tmp_path):
    torch.manual_seed(0)
    teacher, student = torch.randn(3, 2, 4, 5, 6), torch.randn(3, 2, 2, 5, 4)
    found = relation_divergence(teacher, student, 4, None, "mse")
    p, q = (torch.softmax(relation_logits(x, 4), -1) for x in (teacher, student))
    assert torch.allclose(found, (p - q).square().sum() / 4)
    assert float(relation_divergence(teacher, teacher, 4, None, "mse")) == 0.0
