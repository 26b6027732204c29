"""How many units of each group go, and which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from compressor.errors import Problem, StageError
from compressor.models.structure.groups import Cut, Group, Index, Scores, protected_by
from compressor.recipe import PruneStage

KINDS = ("channels", "heads", "neurons")
FLOOR = 0.1  # global scope leaves at least this share of every group, so that no layer becomes a bottleneck of one unit


def ratio_for(config: PruneStage, kind: str) -> float:
    """The share of units of this kind to remove (with the scope latency: at most); hidden width is not cut here."""
    own: float | None = getattr(config, kind, None) if kind in KINDS else 0.0
    if own is None and config.ratio is None and config.target_speedup is not None:
        return 1 - FLOOR  # the most that may go
    return float(own if own is not None else (config.ratio or 0.0))


def unit_step(group: Group, round_to: int) -> int:
    """Units that make up a multiple of ``round_to`` channels. Heads are not rounded."""
    return 1 if group.kind == "heads" else round_to // math.gcd(round_to, group.width)


def rounded(group: Group, wanted: float, round_to: int) -> int:
    """The nearest multiple of the step, at least one step (one head), at most what is there."""
    step = unit_step(group, round_to)
    return min(group.units, max(step, math.floor(wanted / step + 0.5) * step))


def would_empty(group: Group, ratio: float) -> bool:
    """True when the ratio, taken at its word, leaves less than half a unit. The last head always stays."""
    return group.kind != "heads" and group.units * (1 - ratio) < 0.5


def candidates(groups: Sequence[Group], config: PruneStage) -> list[Group]:
    """Groups that the request names and that may be cut."""
    return [
        group
        for group in groups
        if not group.hard
        and not group.soft
        and ratio_for(config, group.kind) > 0
        and protected_by(group, config.protect) is None
    ]


def choose(
    groups: Sequence[Group],
    scores: Scores,
    config: PruneStage,
    round_to: int,
    widths: Mapping[str, float] | None = None,
) -> list[Cut]:
    """One cut a group; groups that lose nothing are left out. Ties keep the earlier unit.

    ``widths`` (units per group) are those of the scopes that have a budget, which need a table of costs.
    """
    wanted = widths
    if wanted is None and config.target_speedup is not None:
        raise StageError(f"the scope `{config.scope}` needs a table of costs, which this kind of model has not here")
    if wanted is None:
        wanted = _uniform(groups, config) if config.scope == "uniform" else _global(groups, scores, config)
    cuts = []
    for group in groups:
        count = rounded(group, wanted[group.name], round_to)
        if count < group.units:
            cuts.append(Cut(group, best(scores.units[group.name], count)))
    return cuts


def best(values: np.typing.NDArray[np.float64], count: int) -> Index:
    """Positions of the ``count`` highest scores, in ascending order."""
    return np.sort(np.argsort(-values, kind="stable")[:count]).astype(np.int64)


def _uniform(groups: Sequence[Group], config: PruneStage) -> dict[str, float]:
    return {group.name: group.units * (1 - ratio_for(config, group.kind)) for group in groups}


def _global(groups: Sequence[Group], scores: Scores, config: PruneStage) -> dict[str, float]:
    """Rank all units of a kind together by their score relative to their layer's mean."""
    wanted: dict[str, float] = {}
    for kind in KINDS:
        same = [group for group in groups if group.kind == kind]
        if not same:
            continue
        pooled = np.sort(np.concatenate([scores.units[group.name] for group in same]))[::-1]
        keep = max(1, round(len(pooled) * (1 - ratio_for(config, kind))))
        threshold = pooled[keep - 1]
        for group in same:
            count = int((scores.units[group.name] >= threshold).sum())
            wanted[group.name] = max(count, math.ceil(FLOOR * group.units))
    return wanted


def problems_of(groups: Sequence[Group], modules: Sequence[str], config: PruneStage) -> list[Problem]:
    """What is wrong with the request for these groups; ``modules`` are all module names (for ``protect``)."""
    problems = [
        Problem(f"protect.{number}", f"`{pattern}` matches no module; one of {', '.join(sorted(modules)[:8])} ...")
        for number, pattern in enumerate(config.protect)
        if not any(fnmatchcase(name, pattern) for name in modules if name)
    ]
    chosen = candidates(groups, config)
    kinds = {group.kind for group in chosen}
    for kind in KINDS:
        if getattr(config, kind) and kind not in kinds:
            problems.append(Problem(kind, f"matches nothing: {_why_none(groups, kind)}"))
    if config.ratio and not chosen:
        problems.append(Problem("ratio", f"matches nothing: {_why_none(groups, None)}"))
    for group in chosen:
        ratio = ratio_for(config, group.kind)
        if config.target_speedup is None and would_empty(group, ratio):
            where = group.kind if getattr(config, group.kind) is not None else "ratio"
            what = f"{ratio:g} would empty `{group.name}`, which has {group.units} {group.kind}; lower it or protect it"
            problems.append(Problem(where, what))
    return problems


def _why_none(groups: Sequence[Group], kind: str | None) -> str:
    same = [group for group in groups if kind is None or group.kind == kind]
    if not same:
        return f"the model has no {kind or 'units'} that can be cut"
    reasons = sorted({reason for group in same for reason in (*group.hard, *group.soft)})
    return "every candidate must stay (" + ("; ".join(reasons) or "protected, or its ratio is 0") + ")"
