"""Fewer heads and feed-forward neurons in every layer, by count: the most important ones stay, with their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compressor.errors import Problem
from compressor.recipe import StudentStage
from compressor.types import LayerFact

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compressor.models.structure.groups import Cut, Group

Batch = Mapping[str, "Tensor"]
STAGE = "student"


def wanted(config: StudentStage) -> dict[str, int]:
    """The keys that are given, with their counts."""
    given = {"heads": config.heads, "neurons": config.neurons}
    return {key: count for key, count in given.items() if count is not None}


def problems_of(module: nn.Module, groups: Sequence[Group], config: StudentStage) -> list[Problem]:
    """What keeps layers from having so few units."""
    from compressor.models.structure.sizes import problem_of

    found = ((key, problem_of(module, groups, key, count)) for key, count in wanted(config).items())
    return [Problem(key, text) for key, text in found if text is not None]


def fewer_units(
    student: nn.Module, config: StudentStage, example: Batch, calibration: Iterable[Batch] | None
) -> tuple[nn.Module, list[dict[str, Any]], list[LayerFact]]:
    """A copy whose layers have at most as many units as ``config`` says; it computes what the masked one does."""
    from compressor.models.structure.sizes import cuts_of, ranking, resize
    from compressor.models.structure.units import find_groups

    sizes = wanted(config)
    if not sizes:
        return student, [], []
    groups = find_groups(student, example)
    scores = ranking(student, groups, sizes, calibration or ())
    cuts = cuts_of(student, groups, scores, sizes)
    made, record, refused = resize(student, cuts, example)
    return made, record, rows_of(cuts, refused, f"the most important by {scores.method}")


def rows_of(cuts: Sequence[Cut], refused: Mapping[str, str], reason: str) -> list[LayerFact]:
    """What became of every layer that makes the units of a cut."""
    facts = []
    for cut in cuts:
        refusal = refused.get(cut.group.name)
        units = cut.group.units if refusal else len(cut.keep)
        before, after = (f"{count * cut.group.width} {cut.group.kind}" for count in (cut.group.units, units))
        action = "kept" if before == after else "narrowed"
        facts += [LayerFact(STAGE, name, action, before, after, refusal or reason) for name in cut.group.modules]
    return facts


__all__ = ["fewer_units", "problems_of", "rows_of", "wanted"]
