"""``run --seeds N``: student and null twin trained again with further seeds, scored alike, and what that proves."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.distil.probes.paired import weigh
from compressor.errors import Problem
from compressor.evaluate import quality
from compressor.ledger import Event, Ledger
from compressor.pipeline import Built, Pair, Pipeline, trains_twin
from compressor.recipe import DistilStage, Recipe
from compressor.types import Array, Figure, Measurement

if TYPE_CHECKING:
    from compressor.data.types import DataBundle
    from compressor.models.types import LoadedModel
    from compressor.profile import HardwareProfile
    from targets.outcome import PairedSeeds, SeedRow
    from targets.trial import EvaluationData


def seed_problems(seeds: int, recipe: Recipe, model: LoadedModel, data: DataBundle) -> list[Problem]:
    """Why several seeds cannot be compared: without a null twin there are no pairs."""
    if seeds == 1:
        return []
    stages = [stage for stage in recipe.stage if isinstance(stage, DistilStage)]
    if model.module is None:
        why = "an ONNX file is not trained: there is nothing to repeat"
    elif not stages:
        why = "the recipe has no `distil` stage: there is nothing to repeat"
    elif not recipe.null_twin:
        why = "compares student and null twin, and the recipe says `null_twin = false`"
    elif not any(trains_twin(recipe, stage, data) for stage in stages):
        why = "compares student and null twin, and a null twin needs labels to learn from"
    else:
        return []
    return [Problem("--seeds", why)]


def train_pairs(pipeline: Pipeline, built: Built, recipe: Recipe, ledger: Ledger, log: Event, seeds: int) -> list[Pair]:
    """The pair of this run, and one of each further seed; what the store holds is not trained again."""
    assert built.null_twin is not None  # `plan` refuses --seeds without one
    pairs = [Pair(recipe.seed, built.student, built.null_twin, tuple(ledger.results))]
    for number in range(1, seeds):
        log("seed", {"text": f"seed {recipe.seed + number}: pair {number + 1} of {seeds}"})
        pairs.append(pipeline.pair(recipe.seed + number, Ledger(ledger.root, log)))
    return pairs


def compare_pairs(
    pairs: Sequence[Pair],
    built: Built,
    profile: HardwareProfile,
    data: EvaluationData,
    out: Path,
    cache: MutableMapping[str, Array],
    log: Event,
) -> PairedSeeds:
    """All pairs scored through the profile's runtime, and the verdict of their differences."""
    from targets.outcome import PairedSeeds, SeedRow
    from targets.registry import get
    from targets.scores import scores

    files = [built.teacher, *(file for pair in pairs for file in (pair.student, pair.null_twin))]
    log("deploy", {"text": f"{profile.name}: scoring {len(pairs)} pairs of student and null twin"})
    found = scores(profile, get(profile.target), files, data, out, cache=cache, on_event=log)
    rows = []
    for pair in pairs:
        student, twin = found[pair.student.digest], found[pair.null_twin.digest]
        stages = tuple(f"{stage.stage}-{stage.key[:16]}" for stage in pair.stages)
        rows.append(SeedRow(pair.seed, student[0], twin[0], student[1], twin[1], stages))
    teacher = found[built.teacher.digest]
    return _judged(PairedSeeds(profile.name, "test", tuple(rows), *teacher, 0, ""))


def _judged(made: PairedSeeds) -> PairedSeeds:
    """With the verdict on test, or on validation where a test figure is missing."""
    from dataclasses import replace

    for split in ("test", "validation"):
        differences = [_difference(row, split) for row in made.rows]
        known = [value for value in differences if value is not None]
        if len(known) == len(differences):
            found = weigh(known)
            return replace(
                made, split=split, wins=found.wins, verdict=found.verdict,
                mean=found.mean, low=found.low, high=found.high,
            )  # fmt: skip
    return replace(made, verdict="nothing can be said: not every pair could be scored")


def _difference(row: SeedRow, split: str) -> float | None:
    """Student minus twin, growing with the student's quality."""
    student: Figure = getattr(row, f"student_{split}")
    twin: Figure = getattr(row, f"twin_{split}")
    if not isinstance(student, Measurement) or not isinstance(twin, Measurement):
        return None
    return quality(student.value, student.unit) - quality(twin.value, twin.unit)
