"""``--seeds``: pairs that are done are not trained again, the teacher answers once, and every pair is scored."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from compressor.ledger import Ledger

pytestmark = pytest.mark.train
RECIPE = """
name = "tiny"
[teacher]
task = "image-classification"
[data]
validation = 80
calibration = 40
[[stage]]
kind = "prune"
ratio = 0.5
[[stage]]
kind = "distil"
epochs = 1
batch = 100
precision = "fp32"
"""


def opened(tmp_path: Path, seeds: int):
    from compressor.cli.session import Request, open_session

    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE)
    names = "tests.e2e.nets:teacher", "tests.e2e.nets:load"
    return open_session(Request(path, *names, ("this-machine",), None, None, tmp_path / "build", seeds=seeds))


def test_pairs_are_trained_once_and_scored_alike(tmp_path: Path) -> None:
    from compressor.cli.run import evaluation_data, run_digest
    from compressor.cli.seeds import compare_pairs, train_pairs
    from compressor.pipeline import Pipeline

    session = opened(tmp_path, 2)
    assert "again with seed 1:" in session.plan.steps[-1]
    alone = dataclasses.replace(session, request=dataclasses.replace(session.request, seeds=1))
    assert run_digest(session) != run_digest(alone)
    events = []

    def trained(seeds: int):
        ledger = Ledger(tmp_path / "build")
        pipeline = Pipeline(session.recipe, session.model, session.data, ledger, round_to=1)
        built = pipeline.build()
        log = lambda name, data: events.append((name, dict(data)))  # noqa: E731
        return built, train_pairs(pipeline, built, session.recipe, ledger, log, seeds)

    built, pairs = trained(2)
    assert [pair.seed for pair in pairs] == [0, 1]
    assert len({file.digest for pair in pairs for file in (pair.student, pair.null_twin)}) == 4
    distilled = [next(stage for stage in pair.stages if stage.stage == "distil") for pair in pairs]
    assert [stage.metrics["teacher_forwards"] for stage in distilled] == [480, 8]  # the second checks the cache
    _, again = trained(2)
    assert [{stage.reused for stage in pair.stages} for pair in again] == [{True}, {True}]
    assert [pair.student.digest for pair in again] == [pair.student.digest for pair in pairs]

    cache: dict = {}
    found = compare_pairs(pairs, built, session.profiles[0], evaluation_data(session), tmp_path, cache, lambda *_: None)
    assert found.split == "test"
    assert found.verdict in {"2/2", "better", "worse", "no difference shown"}
    differences = [row.student_test.value - row.twin_test.value for row in found.rows]
    assert found.mean == pytest.approx(sum(differences) / 2)
    assert len(cache) == 2 * 5  # teacher and four files, on validation and on test
    assert [name for name, _ in events].count("seed") == 2
