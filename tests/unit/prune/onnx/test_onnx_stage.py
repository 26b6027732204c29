"""The prune stage of an ONNX teacher, as a recipe reaches it, and without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from compressor.ledger import Ledger
from compressor.models.onnx_graph import save_model
from compressor.plan import recipe_problems
from compressor.recipe import Recipe
from compressor.stages.onnx_surgery import onnx_problems
from tests.unit.prune.onnx.graphs import chain


def recipe(*stages: dict[str, object]) -> Recipe:
    return Recipe.model_validate({"name": "cut", "teacher": {"model": "model.onnx"}, "stage": list(stages)})


def test_plan_allows_prune_and_refuses_training() -> None:
    assert recipe_problems(recipe({"kind": "prune", "ratio": 0.2}, {"kind": "quantize"}), "onnx", []) == []
    problems = recipe_problems(recipe({"kind": "distil"}), "onnx", ["kd"])
    assert [problem.where for problem in problems] == ["stage.0.distil"]
    assert "only `prune` and `quantize`" in problems[0].what


def test_plan_names_the_key_of_the_stage(tmp_path: Path) -> None:
    save_model(chain(), tmp_path / "model.onnx")
    example = {"x": np.zeros((2, 3, 8, 8), np.float32)}
    problems = onnx_problems(recipe({"kind": "prune", "heads": 0.5}), tmp_path / "model.onnx", example)
    assert [problem.where for problem in problems] == ["stage.0.prune.heads"]
    assert onnx_problems(recipe({"kind": "prune", "ratio": 0.5}), tmp_path / "model.onnx", example) == []


def test_the_pipeline_builds_a_smaller_student(tmp_path: Path) -> None:
    """Through the user's own session: recipe, plan, ledger, stage, artifact."""
    from compressor.cli.session import Request, open_session
    from compressor.pipeline import Pipeline

    save_model(chain(), tmp_path / "model.onnx")
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=generator.normal(size=(200, 3, 8, 8)).astype(np.float32))
    text = f"""
name = "cut"
[teacher]
model = "{tmp_path / "model.onnx"}"
task = "generic"
[data]
source = "{tmp_path / "data.npz"}"
calibration = 64
[[stage]]
kind = "prune"
ratio = 0.5
"""
    (tmp_path / "cut.toml").write_text(text)
    session = open_session(
        Request(
            recipe=tmp_path / "cut.toml", model=None, data=None, profiles=(), max_drop=None, task=None, out=tmp_path
        )
    )
    ledger = Ledger(tmp_path / "build")
    built = Pipeline(session.recipe, session.model, session.data, ledger, round_to=1).build()
    assert built.student.role == "student"
    assert built.student.parameters < built.teacher.parameters
    assert built.student.path != built.teacher.path
    assert {fact.layer for fact in built.student.facts if fact.action == "pruned"} == {"c1", "c2"}
    (stored,) = ledger.results
    assert stored.metrics["macs_after"] < stored.metrics["macs_before"]  # type: ignore[operator]


def test_no_torch_is_imported(tmp_path: Path) -> None:
    save_model(chain(), tmp_path / "model.onnx")
    code = f"""
import sys
sys.modules["torch"] = None
from pathlib import Path
from compressor.models.onnx_graph import read_model
from compressor.prune.onnx import prune
from compressor.prune.onnx.runtime import random_example
from compressor.recipe import PruneStage
model = read_model(Path({str(tmp_path / "model.onnx")!r}))
done = prune(model, random_example(model), PruneStage(kind="prune", ratio=0.5, importance="magnitude"), [])
print(done.parameters_after)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1100
