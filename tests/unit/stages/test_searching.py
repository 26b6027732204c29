"""A student stage with a search, as a stored stage: chosen once, read back, and never mixed with another cost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from compressor.ledger import Ledger  # noqa: E402
from compressor.recipe import Recipe, StudentStage  # noqa: E402
from compressor.stages.run import Line, Run  # noqa: E402
from compressor.stages.searching import FILE  # noqa: E402
from compressor.stages.surgery import surgery  # noqa: E402
from tests.unit.distil.test_panel import loaded  # noqa: E402
from tests.unit.distil.toy import Pictures, bundle, convnet  # noqa: E402

pytestmark = pytest.mark.train


def test_a_search_is_a_stored_stage_with_its_rows_and_a_student_that_loads(tmp_path: Path) -> None:
    teacher, data = convnet(6, 4), bundle(train=8)
    data = replace(
        data,
        splits={**data.splits, "calibration": Pictures("calibration", 24, 5)},
        digests={**data.digests, "calibration": "calibration"},
    )
    search = {"space": {"width": [0.25, 0.5, 1.0]}, "budget": {"latency_ms": 0.4}, "samples": 16}
    stage = StudentStage.model_validate({"kind": "student", "search": search})
    asked: list[Any] = []

    def cost(shape: Any) -> float:
        asked.append(shape)
        return 0.02 * float(shape.outputs)

    def searched(name: str) -> tuple[Run, Line]:
        run = Run(Recipe(stage=(stage,)), loaded(teacher, "t"), data, Ledger(tmp_path), 1, cost=cost, cost_name=name)
        return run, surgery(run, Line("student", "start", lambda: teacher), stage)

    run, line = searched("a clock")
    (result,) = run.ledger.results
    told = json.loads((result.folder / FILE).read_text())
    assert [each["candidate"]["width"] for each in told["tried"] if each["score"] is None] == [1.0]
    assert result.metrics["chosen"] == f"width {told['chosen']['width']}"
    assert result.metrics["candidates"] == 3
    assert result.metrics["within_budget"] == 2
    assert sum(parameter.numel() for parameter in line.load().parameters()) == result.metrics["parameters_after"]
    rows = [fact for fact in result.facts if fact.layer.startswith("candidate: ")]
    assert [row.action for row in rows] == ["chosen", "scored", "left out"]
    before = len(asked)
    again, same = searched("a clock")
    assert again.ledger.results[0].reused
    assert same.key == line.key
    assert len(asked) == before
    assert searched("another clock")[1].key != line.key
