"""What each stage did to each layer, gathered from the stages and from the artifacts of all profiles. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from compressor.types import LayerFact
from targets.outcome import RunSummary


@dataclass(frozen=True)
class FactGroup:
    """The facts of one stage, or of one artifact that a stage wrote."""

    title: str
    counts: tuple[tuple[str, int], ...]  # action -> layers, most frequent first
    facts: tuple[LayerFact, ...]


def fact_groups(summary: RunSummary) -> tuple[FactGroup, ...]:
    """Stages in order, then artifacts that know more than their stages did (quantized variants)."""
    seen: set[LayerFact] = set()
    groups = []
    for stage in summary.stages:
        groups.append(_group(stage.stage, stage.facts))
        seen.update(stage.facts)
    titles: set[str] = set()
    for outcome in summary.outcomes:
        for row in outcome.rows:
            fresh = tuple(fact for fact in row.artifact.facts if fact not in seen)
            if fresh and row.artifact.name not in titles:
                titles.add(row.artifact.name)
                groups.append(_group(row.artifact.name, fresh))
    return tuple(group for group in groups if group.facts)


def _group(title: str, facts: tuple[LayerFact, ...]) -> FactGroup:
    return FactGroup(title, tuple(Counter(fact.action for fact in facts).most_common()), facts)
