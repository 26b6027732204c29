"""A student stage with a search becomes one without: the candidate that was chosen, and what else was tried."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.recipe import StudentStage
from compressor.stages.run import Run
from compressor.types import LayerFact

if TYPE_CHECKING:
    from torch import Tensor, nn

FILE = "search.json"  # every candidate with its costs and scores, and the stage that was chosen


@dataclass(frozen=True)
class Settled:
    """A student stage that says what it makes, and the rows of its search."""

    stage: StudentStage
    facts: tuple[LayerFact, ...] = ()
    metrics: Mapping[str, float | int | str] = field(default_factory=dict)


def settled(run: Run, module: nn.Module, stage: StudentStage, example: Mapping[str, Tensor], folder: Path) -> Settled:
    """Carry the search of ``stage`` out; what came of it is written into ``folder``.

    Raises:
        StageError: no candidate is within the budget.
    """
    from compressor.students import candidate
    from compressor.students.search import Builder, choose
    from compressor.students.search.diswot import Judge

    config = stage.search
    if config is None:
        return Settled(stage)
    batch, labels = _mini_batch(run, module, config.samples)
    build = Builder(module, stage, example, candidate, run.cost)
    found = choose(build, Judge(module, batch, labels, config), config)
    (folder / FILE).write_text(json.dumps(found.as_json(), indent=1))
    best = found.tried[0]
    assert best.score is not None  # `choose` raises where none has one
    metrics: dict[str, float | int | str] = {
        "candidates": len(found.tried),
        "within_budget": sum(each.score is not None for each in found.tried),
        "chosen": best.name,
        "score": round(best.score.value, 6),
        "macs_after": best.macs,
    }
    return Settled(found.chosen, found.facts, metrics)


def _mini_batch(run: Run, module: nn.Module, samples: int) -> tuple[dict[str, Any], Tensor]:
    """Inputs of the first samples of the calibration split, and their classes: the data's, else the teacher's."""
    import torch

    from compressor.students.search.diswot import labels_for

    batch = run.tensors(run.samples("calibration", samples))
    given = run.data.splits["calibration"].labels
    with torch.inference_mode():
        output = module(**batch)
    outputs = output[0] if isinstance(output, tuple) else output
    labels = None if given is None else torch.as_tensor(given[: len(outputs)])
    return batch, labels_for(outputs.clone(), labels)


__all__ = ["FILE", "Settled", "settled"]
