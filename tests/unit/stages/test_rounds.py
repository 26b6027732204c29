"""Self-distillation in rounds and the estimated weight of the labels: exact on kernel ridge, then in real stages."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from compressor.stages.rounds import label_weight, weighed

N, RIDGE = 40, 1e-2


def kernel() -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and targets in the eigenbasis of a Gaussian kernel on noisy sine data."""
    random = np.random.default_rng(0)
    x = np.sort(random.uniform(0, 2 * np.pi, N))
    y = np.sin(x) + random.normal(0, 0.3, N)
    values, vectors = np.linalg.eigh(np.exp(-((x[:, None] - x[None]) ** 2)))
    return np.clip(values, 1e-6, None), vectors.T @ y


def fits(alpha: float, rounds: int) -> list[np.ndarray]:
    """Training predictions of each round in the eigenbasis: targets alpha y + (1 - alpha) f of the round before."""
    values, target = kernel()
    shrink, found, wanted = values / (values + RIDGE), [], target
    for _ in range(rounds):
        found.append(shrink * wanted)
        wanted = alpha * target + (1 - alpha) * found[-1]
    return found


def test_without_labels_every_round_regularises_more_and_the_small_eigenvalues_go_first() -> None:
    values, target = kernel()
    rounds = fits(0.0, 6)
    ridge = [values * (target / fit - 1) for fit in rounds]  # the ridge that one fit to y would need, by direction
    for before, after in pairwise(ridge):
        assert (after > before).all()
    assert np.allclose(ridge[0], RIDGE)
    closed = values * ((1 + RIDGE / values) ** 6 - 1)  # six rounds are one fit with this ridge in each direction
    assert np.allclose(ridge[5], closed, rtol=1e-6)
    kept = rounds[-1] / target
    assert (np.diff(kept) >= -1e-12).all()  # eigenvalues ascend: the smoothest directions keep most


def test_with_labels_the_rounds_are_bounded_by_one_fit_with_a_larger_ridge() -> None:
    values, target = kernel()
    rounds, alpha = fits(0.5, 60), 0.5
    ridge = [values * (target / fit - 1) for fit in rounds]
    assert all((ridge_ < RIDGE / alpha + 1e-9).all() for ridge_ in ridge)
    assert np.allclose(rounds[-1], values / (values + RIDGE / alpha) * target)  # infinitely many rounds


def test_the_estimate_is_the_least_squares_mixture() -> None:
    random = np.random.default_rng(1)
    wanted = np.eye(3)[random.integers(0, 3, 200)]
    first, second = (random.dirichlet(np.ones(3), 200) for _ in range(2))
    first = 0.6 * first + 0.4 * wanted
    alpha, errors = label_weight(first, second, wanted)
    grid = np.linspace(0, 1, 1001)
    mse = [((a * first + (1 - a) * second - wanted) ** 2).mean() for a in grid]
    assert alpha == pytest.approx(grid[int(np.argmin(mse))], abs=1e-3)
    assert errors == pytest.approx([min(mse), mse[-1], mse[0]], abs=1e-6)


@pytest.mark.train
def test_three_rounds_with_an_estimated_weight_are_stored_stages_and_share_the_null_twin(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from copy import deepcopy

    from compressor.ledger import Ledger
    from compressor.recipe import DistilStage, Recipe
    from compressor.stages.run import Line, Run
    from compressor.stages.training import distil
    from tests.unit.distil.test_panel import loaded
    from tests.unit.distil.toy import bundle, convnet

    teacher, start = convnet(4, 6), convnet(4, 5)
    stage = DistilStage.model_validate(
        {
            "kind": "distil", "epochs": 1, "batch": 32, "labels": "estimate", "rounds": 2, "precision": "fp32",
            "objective": [{"use": "kd", "options": {"temperature": 1.0}}],
        }
    )  # fmt: skip
    recipe = Recipe.model_validate({"stage": [stage.model_dump(mode="json")]})

    def trained(folder: str) -> tuple[Run, Line]:
        run = Run(recipe, loaded(teacher, "t"), bundle(), Ledger(tmp_path / folder), 1)
        return run, distil(run, Line("student", "start", lambda: deepcopy(start)), stage, labels_only=False)

    run, found = trained("a")
    names = [result.stage for result in run.ledger.results]
    assert names == ["null-twin", "distil", "label-weight", "distil", "distil", "label-weight", "distil"]
    alphas = [result.metrics["alpha"] for result in run.ledger.results if result.stage == "label-weight"]
    assert all(0 <= float(alpha) <= 1 for alpha in alphas)
    twin = distil(run, Line("null-twin", "start", lambda: deepcopy(start)), stage, labels_only=True)
    assert twin.key == run.ledger.results[0].key  # the twin is the fit on labels, and no further one is made
    again, same = trained("a")
    assert all(result.reused for result in again.ledger.results)
    _, once = trained("b")
    assert found.key == same.key == once.key
    weights = found.load().state_dict(), once.load().state_dict()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    history = json.loads((run.ledger.results[-1].folder / "history.json").read_text())
    assert set(history[0]["terms"]) <= {"labels", "kd"}


def test_the_estimate_shares_the_weight_between_labels_and_objectives() -> None:
    from compressor.recipe import DistilStage

    table = {"use": "kd", "weight": {"kind": "linear", "from": 1.0, "to": 0.5}}
    stage = DistilStage.model_validate({"kind": "distil", "labels": "estimate", "objective": [table, {"use": "tvd"}]})
    found = weighed(stage, 0.25)
    assert found.labels == 0.25
    assert (found.objective[0].weight.first, found.objective[0].weight.final) == (0.75, 0.375)
    assert found.objective[1].weight == 0.75
    assert weighed(stage, 1.0).objective == ()
