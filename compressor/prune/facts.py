"""What pruning did to each layer, and why it left the others alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compressor.models.structure.groups import Cut, Group, Scores, protected_by
from compressor.prune.choose import ratio_for
from compressor.recipe import PruneStage
from compressor.types import LayerFact

STAGE = "prune"


def size_of(group: Group, units: int) -> str:
    """``48 channels``; heads are counted whole, everything else by rows."""
    return f"{units if group.kind == 'heads' else units * group.width} {group.kind}"


def group_facts(
    groups: Sequence[Group], cuts: Sequence[Cut], refused: Mapping[str, str], scores: Scores, config: PruneStage
) -> list[LayerFact]:
    """One row for each layer that makes units."""
    by_name = {cut.group.name: cut for cut in cuts}
    facts = []
    for group in groups:
        cut = by_name.get(group.name)
        before = size_of(group, group.units)
        if cut is not None and group.name not in refused:
            after, action = size_of(group, len(cut.keep)), "pruned"
            method = scores.notes.get(group.name, scores.method)
            how = f"{config.scope} ratio {ratio_for(config, group.kind):g}"
            if config.target_speedup is not None:
                lost = "accuracy on validation" if config.scope == "sensitivity" else "importance"
                how = f"least {lost} lost per saved cost until {config.target_speedup:g}x"
            reason = f"importance: {method}; {how}"
        else:
            after, action = before, "kept"
            reason = refused.get(group.name) or why_kept(group, config)
        facts += [LayerFact(STAGE, module, action, before, after, reason) for module in group.modules]
    return facts


def why_kept(group: Group, config: PruneStage) -> str:
    """The reason a group was not cut, in the order a user would ask."""
    pattern = protected_by(group, config.protect)
    if pattern is not None:
        return f"protected by `{pattern}`"
    if group.hard or group.soft:
        return "; ".join((*group.hard, *group.soft))
    if group.units == 1:
        return "is a single unit: its parts can only go together"
    if not ratio_for(config, group.kind):
        return f"no ratio was asked for {group.kind}"
    if config.target_speedup is not None:
        return "other layers lose less for what they save"
    return "rounding to the device's multiple leaves it whole"
