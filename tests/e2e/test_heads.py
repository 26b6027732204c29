"""A recipe whose objectives leave heads and exits in the student: the file computes what the module does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.train, pytest.mark.slow]
RECIPE = """
name = "heads"
null_twin = false
[teacher]
task = "image-classification"
[data.preprocess]
scale = 0.00392156862745098
[[stage]]
kind = "prune"
ratio = 0.6
importance = "magnitude"
[[stage]]
kind = "distil"
epochs = 2
learning_rate = 3e-3
precision = "fp32"
[[stage.objective]]
use = "HEAD"
[[stage.objective]]
use = "multi-exit"
options = { export = "outputs", blocks = "1" }
"""


@pytest.mark.parametrize("head", ["lelp", "dual-head"])
def test_the_file_equals_the_rebuilt_student(head: str, tmp_path: Path) -> None:
    import onnxruntime

    from compressor.cli.session import Request, open_session
    from compressor.ledger import Ledger
    from compressor.pipeline import Pipeline
    from compressor.types import Artifact

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("HEAD", head))
    words: dict[str, Any] = {"profiles": (), "max_drop": None, "task": None, "out": tmp_path}
    session = open_session(Request(recipe, "examples.digits.model:teacher", "examples.digits:load", **words))
    ledger = Ledger(tmp_path)
    built = Pipeline(session.recipe, session.model, session.data, ledger, round_to=1).build()
    student: Artifact = built.student
    assert [spec.name for spec in student.outputs] == [session.model.outputs[0].name, "exit_0"]
    assert all(row.passed for row in built.parity)

    stage = next(result for result in ledger.results if result.stage == "distil")
    assert {fact.action for fact in stage.facts} == {"kept", "widened" if head == "lelp" else "fused"}
    from compressor.models.rebuild import load_student

    assert session.model.module is not None
    module = load_student(stage.folder, session.model.module)
    inputs = session.data.splits["validation"].batch(np.arange(16))
    found = onnxruntime.InferenceSession(student.path).run(None, dict(inputs))
    with torch.no_grad():
        wanted = module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    for made, expected in zip(found, wanted, strict=True):
        np.testing.assert_allclose(made, expected.numpy(), atol=1e-4, rtol=1e-4)
