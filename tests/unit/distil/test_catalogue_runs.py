"""The catalogue's recipes really run: every pasted stage trains a tiny student for a step or two."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from compressor import students  # noqa: E402
from compressor.config import validate  # noqa: E402
from compressor.data.types import DataBundle  # noqa: E402
from compressor.distil import catalogue, lora  # noqa: E402
from compressor.distil.loop import distil  # noqa: E402
from compressor.distil.objectives import registry  # noqa: E402
from compressor.distil.panel import Panel, Teacher  # noqa: E402
from compressor.recipe import DistilStage, Recipe, StudentStage  # noqa: E402
from compressor.stages.rounds import weighed  # noqa: E402
from tests.unit.distil.objectives.test_masked import Texts  # noqa: E402
from tests.unit.distil.test_panel import loaded  # noqa: E402
from tests.unit.distil.toy import Pictures, convnet, transformer  # noqa: E402

pytestmark = pytest.mark.train
# rows whose stages need transformers; the others are shown pictures
TEXT = {"F1", "F2", "T1", "T3", "N3", "minilm-relations", "masked-tokens"}
LANGUAGE = {"X1", "X3", "X4", "X14", "X17"}
# tested where their files, groups or generations are: two tokenizers, both answers, ranking, domains, rounds
ELSEWHERE = {
    *("X2", "X6", "T5", "T10", "R1c", "alm", "uld", "distillm2", "K6", "T6", "U1", "K1", "N1", "N2"),
    *("vocab-match", "vocab-map"),
    *("adaptive-margin", "additive-margin", "margin-mse", "label-embedding", "homomorphic-projection", "layerwise"),
}
RECIPES = {row.id: row.text for row in catalogue.rows() if row.recipe} | {
    name: catalogue.recipe_of(name) for name in registry.names()
}


def shortened(stage: DistilStage) -> DistilStage:
    """One epoch of two steps; the estimate of the label weight (two more fits) taken as 0.5."""
    small = stage.model_copy(update={"epochs": 1, "batch": 8, "precision": "fp32", "views": 1, "rounds": 1})
    return weighed(small, 0.5) if small.labels == "estimate" else small


def pieces(name: str) -> tuple[Any, Any, DataBundle, tuple[Any, ...]]:
    """Teacher, student, data, and further modules that may teach."""
    if name in TEXT:
        parts = {"train": Texts("train", 16, 1), "validation": Texts("v", 8, 2), "transfer": Texts("t", 16, 3, False)}
        return transformer(12, 0, heads=4), transformer(4, 1, heads=2), DataBundle(parts, ("a", "b"), "toy", {}), ()
    if name in LANGUAGE:
        pytest.importorskip("transformers")
        from tests.unit.distil.test_language import data, gpt

        return gpt(6), gpt(5, layers=1), data(), ()
    parts = {"train": Pictures("train", 16, 1), "validation": Pictures("v", 8, 2), "transfer": Pictures("t", 16, 3)}
    parts["transfer"].labels = None
    width = 6 if name == "squarehead" else 3  # which compares equal widths
    return convnet(6, 6), convnet(width, 5), DataBundle(parts, tuple("abcd"), "toy", {}), (convnet(4, 7), convnet(4, 8))


def student_of(stage: StudentStage, teacher: Any, data: DataBundle) -> Any:
    example = {name: torch.from_numpy(array) for name, array in data.splits["train"].batch(np.arange(2)).items()}
    known = {pattern.replace("word_embeddings", "embed"): 4 for pattern in stage.ranks}  # the toy's own name and width
    return students.make_student(teacher, stage.model_copy(update={"ranks": known}), example, seed=0).module


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ELSEWHERE])
def test_a_recipe_of_the_catalogue_trains(name: str, tmp_path: Path) -> None:
    recipe = validate(
        Recipe,
        tomllib.loads(RECIPES[name].replace("heads = 12", "heads = 4").replace("010 110 001", "01 10 11 00")),
        name,
    )
    teacher, student, data, more = pieces(name)
    panel = None
    if recipe.teacher.more:
        names = ["main", *(item.name for item in recipe.teacher.more)]
        found = [Teacher(n, loaded(m, n), 1.0, False, None) for n, m in zip(names, (teacher, *more), strict=False)]
        panel = Panel(tuple(found), recipe.teacher.weights, recipe.teacher.drop)
    for number, stage in enumerate(recipe.stage):
        if isinstance(stage, StudentStage) and name in TEXT:
            student = student_of(stage, teacher, data)
        if not isinstance(stage, DistilStage):
            continue
        config = shortened(stage)
        if config.rollouts is not None:
            short = {"prompt_tokens": 4, "max_new_tokens": 3}
            config = config.model_copy(update={"rollouts": config.rollouts.model_copy(update=short)})
        if config.lora is not None:
            lora.adapt(student, config.lora, 0)
        result = distil(
            student, teacher, data, config, seed=0, work=tmp_path / str(number), bank=tmp_path / "bank",
            teacher_digest="t", signals={}, panel=panel,
        )  # fmt: skip
        if config.lora is not None:
            lora.merge(student)
        assert result.steps > 0
        assert all(np.isfinite(record.loss) for record in result.history)


def test_nothing_is_left_out_without_a_place_of_its_own() -> None:
    assert set(RECIPES) >= ELSEWHERE
