"""Accumulation, activation checkpointing, unfreezing, schedules and strategies in the loop; resume under all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from compressor.distil import activations  # noqa: E402
from compressor.distil.loop import distil  # noqa: E402
from compressor.distil.step import Forecast  # noqa: E402
from compressor.distil.terms import check  # noqa: E402
from compressor.errors import StageError  # noqa: E402
from compressor.recipe import DistilStage  # noqa: E402
from tests.unit.distil import toy  # noqa: E402
from tests.unit.distil.toy import Sentences, bundle, convnet, transformer  # noqa: E402

pytestmark = pytest.mark.train
ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("toy.py")
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TERMS = {"objective": [{"use": "kd"}, {"use": "hidden", "weight": 0.2}], "labels": 0.5}


def stage(**settings):
    return DistilStage.model_validate({"kind": "distil", "epochs": 1, "batch": 16, "precision": "fp32"} | settings)


def run(folder, config, *, text=True, name="work", **more):
    """Ragged text with unlabelled samples, so that every term has another count in every piece."""
    data = bundle(Sentences, transfer=24) if text else bundle()
    student = transformer(2, 1, 8) if text else convnet(3, 5)
    teacher = transformer(4, 2) if text else convnet(8, 6)
    settings = {"seed": 3, "teacher_digest": "t", "signals": {}} | more
    result = distil(student, teacher, data, config, work=folder / name, bank=folder / "bank", **settings)
    return result, student


def gap(a, b):
    return max(
        float((x - y).abs().max()) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_pieces_give_the_gradient_of_the_whole_batch(tmp_path):
    """One step of plain SGD on all samples: what moved the weights is the gradient."""
    plain = {
        "optimiser": "sgd",
        "schedule": "constant",
        "warmup": 0.0,
        "clip": None,
        "learning_rate": 0.5,
        "batch": 120,
    }
    whole, one = run(tmp_path, stage(**TERMS, **plain), name="one")
    for pieces in (2, 3, 5):
        cut, many = run(tmp_path, stage(**TERMS, **plain, accumulate=pieces), name=f"cut-{pieces}")
        assert cut.steps == whole.steps == 1
        assert gap(one, many) < 1e-6
        assert cut.history[0].loss == pytest.approx(whole.history[0].loss, abs=1e-5)
        assert cut.history[0].terms == pytest.approx(dict(whole.history[0].terms), abs=1e-5)


def test_dividing_each_piece_by_its_own_count_would_be_wrong(tmp_path):
    """The pieces really are ragged: labels and tokens per piece differ."""
    data = bundle(Sentences, transfer=24)
    from compressor.distil.setup import seed_of
    from compressor.distil.stream import TrainingSet

    found = TrainingSet.of(data)
    order = found.order(0, 16, seed_of(3, "order"))
    known = [[int((found.labels[part] >= 0).sum()) for part in np.array_split(batch, 3)] for batch in order]
    assert any(len(set(counts)) > 1 for counts in known)


def test_the_forecast_learns_what_is_counted_and_never_guesses_wrong():
    forecast = Forecast()
    facts = [torch.tensor([1.0, 4, 4, 30], dtype=torch.float64), torch.tensor([1.0, 4, 4, 20], dtype=torch.float64)]
    assert forecast.divisors(facts[0]) is None
    forecast.learn(facts, [torch.tensor([4.0, 60.0]), torch.tensor([4.0, 40.0])])
    assert forecast.divisors(facts[0] + facts[1]).tolist() == [8.0, 100.0]
    forecast.learn([torch.tensor([1.0, 4, 2, 9])], [torch.tensor([2.0, 18.0])])  # it was the labels, not the samples
    assert forecast.divisors(torch.tensor([2.0, 8, 5, 7])).tolist() == [5.0, 14.0]
    forecast.learn([torch.tensor([1.0, 4, 2, 9])], [torch.tensor([3.0, 18.0])])  # nothing explains 3: always two passes
    assert forecast.divisors(torch.tensor([2.0, 8, 5, 7])) is None


def test_objectives_of_the_whole_batch_refuse_to_be_cut():
    counts = {"logits": 1, "hidden": 4}
    config = stage(accumulate=4, objective=[{"use": "rkd-distance"}, {"use": "kd"}])
    (problem,) = check(config, counts, counts, "stage.1")
    assert problem.where == "stage.1.objective.0.use"
    assert "compares the samples of a whole batch" in problem.what
    (problem,) = check(stage(objective=[{"use": "rkd-distance"}]), counts, counts, "stage.1", processes=2)
    assert "2 processes" in problem.what


def test_accumulation_with_average_patience_and_dropout_resumes_to_the_same_bytes(tmp_path):
    settings = {
        "kind": "distil", "epochs": 2, "batch": 16, "precision": "fp32", "accumulate": 2, "ema": 0.9, "patience": 3,
        "labels": {"kind": "linear", "from": 0.2, "to": 1.0}, "unfreeze": ["head.*", "*"],
        "strategy": [{"use": "subset", "fraction": 0.8}, {"use": "select", "discard": 0.25}],
        "objective": [{"use": "kd", "weight": {"kind": "feedback", "watch": "loss", "when": "falls", "to": 2}}],
    }  # fmt: skip
    toy.main(settings, str(tmp_path / "calm"), -1)
    command = [sys.executable, str(SCRIPT), json.dumps(settings), str(tmp_path / "killed"), "21"]
    assert subprocess.run(command, cwd=ROOT, env=ENV, check=False).returncode == 9
    assert (tmp_path / "killed" / "work" / "checkpoint.pt").exists()
    toy.main(settings, str(tmp_path / "killed"), -1)
    calm, again = (torch.load(tmp_path / name / "student.pt", weights_only=True) for name in ("calm", "killed"))
    assert all(torch.equal(calm[name], again[name]) for name in calm)
    assert (tmp_path / "calm" / "history.json").read_text() == (tmp_path / "killed" / "history.json").read_text()


def test_checkpointed_activations_change_nothing(tmp_path):
    for text in (True, False):
        plain, one = run(tmp_path, stage(**TERMS), text=text, name=f"plain-{text}")
        _, other = run(tmp_path, stage(**TERMS, checkpoint_activations=True), text=text, name=f"again-{text}")
        assert gap(one, other) < 1e-6  # running statistics of the batch norms too
        assert plain.steps > 1


def test_blocks_are_computed_twice_and_put_back():
    module, calls = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(9))), []
    module[4].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 4)
    with activations.checkpointed(module):
        module.train()(x).sum().backward()
        assert len(calls) == 2
        with torch.no_grad():
            module(x)
        assert len(calls) == 3
    assert "forward" not in vars(module)
    with pytest.raises(StageError, match="finds no blocks"), activations.checkpointed(torch.nn.Linear(2, 2)):
        pass


def test_teacher_annealing_is_the_teacher_alone_at_first_and_the_labels_alone_at_the_end(tmp_path):
    """Methods T4: CE is linear in its target, so the mixed target is two terms with mirrored weights."""
    settings = {
        "labels": {"kind": "linear", "from": 0, "to": 1},
        "objective": [{"use": "soft-ce", "weight": {"kind": "linear", "from": 1, "to": 0}}],
    }
    values = []
    from compressor.distil.step import Gradients

    compute = Gradients.compute

    def watched(self, *args):
        found = compute(self, *args)
        values.append((list(args[3]), found[0].tolist()))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gradients, "compute", watched)
        result, _ = run(tmp_path, stage(epochs=2, **settings), text=False)
    assert values[0][0] == [0.0, 1.0]
    assert values[-1][0] == [1.0, 0.0]
    assert values[0][1][0] == 0.0 != values[0][1][1]
    assert values[-1][1][1] == 0.0 != values[-1][1][0]
    assert result.history[-1].values == {"labels.weight": 1.0, "soft-ce.weight": 0.0}


def test_a_scheduled_temperature_reaches_its_objective(tmp_path):
    tau = {"kind": "linear", "from": 4.0, "to": 1.0}
    result, _ = run(tmp_path, stage(objective=[{"use": "kd", "options": {"temperature": tau}}], labels=0), text=False)
    assert result.history[-1].values == {"kd.temperature": 1.0}
    fixed, _ = run(tmp_path, stage(objective=[{"use": "kd"}], labels=0), text=False, name="fixed")
    assert result.history[-1].loss != fixed.history[-1].loss


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_gradual_unfreezing_opens_from_the_first_pattern_on(tmp_path, optimiser):
    before = convnet(3, 5).state_dict()
    seen = []
    config = stage(epochs=3, unfreeze=["head.*", "*"], unfreeze_by=0.9, weight_decay=0.1, optimiser=optimiser)
    _, student = run(
        tmp_path,
        config,
        text=False,
        score=lambda m: seen.append({n: t.clone() for n, t in m.state_dict().items()}) or 0.0,
    )
    closed = [name for name, _ in student.named_parameters() if not name.startswith("head")]
    assert all(torch.equal(seen[0][name], before[name]) for name in closed)
    assert not torch.equal(seen[0]["head.weight"], before["head.weight"])
    assert not any(torch.equal(student.state_dict()[name], before[name]) for name in closed if "weight" in name)
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize(
    "strategy",
    [
        {"use": "filter", "keep": 0.5},
        {"use": "subset", "fraction": 0.5},
        {"use": "query", "budget": 12},
        {"use": "select", "discard": 0.5},
        {"use": "mix"},
    ],
    ids=lambda item: item["use"],
)
def test_the_null_twin_takes_as_many_steps_on_as_many_samples(tmp_path, strategy):
    config = stage(strategy=[strategy])
    student, _ = run(tmp_path, config, name="student")
    twin, _ = run(tmp_path, config, name="twin", labels_only=True)
    assert twin.steps == student.steps
    assert set(twin.history[0].terms) == {"labels"}
    assert (student.choosing_forwards > 0) == (strategy["use"] in {"select", "mix", "query"})
    assert (twin.choosing_forwards > 0) == (strategy["use"] == "query")


def test_mixup_teaches_blends_by_an_online_teacher(tmp_path):
    result, student = run(tmp_path, stage(strategy=[{"use": "mixup"}], epochs=2), text=False)
    assert not result.cached
    assert result.teacher_forwards == 2 * 96
    cut, other = run(tmp_path, stage(strategy=[{"use": "mixup"}], epochs=2), text=False, name="again")
    assert same(student, other)
    assert cut.history == tuple(
        replace(mine, seconds=theirs.seconds) for mine, theirs in zip(result.history, cut.history, strict=True)
    )


def test_a_stage_sees_the_part_it_asks_for(tmp_path):
    result, _ = run(tmp_path, stage(data="transfer", labels=0.0))
    assert result.teacher_forwards == 24
    assert set(result.history[0].terms) == {"kd"}
    result, _ = run(tmp_path, stage(data="train"), name="train")
    assert result.teacher_forwards == 96
    with pytest.raises(StageError, match="no transfer part"):
        run(tmp_path, stage(data="transfer"), text=False, name="none")
