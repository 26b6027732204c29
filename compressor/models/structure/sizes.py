"""Units per layer by count: so many heads, feed-forward neurons, hidden dimensions; the most important ones stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from compressor.models.signals import structure_of
from compressor.models.structure.groups import Cut, Group, Kind, Method, Scores
from compressor.models.structure.scores import score
from compressor.models.structure.surgery import commit

KEYS: Mapping[str, Kind] = {"hidden_size": "hidden", "heads": "heads", "neurons": "neurons"}
Wanted = Mapping[str, int]  # key of KEYS -> units of each layer at most


def resizable(module: nn.Module, groups: Sequence[Group], key: str) -> list[Group]:
    """The groups that a key is about, whether or not they can be cut.

    Of a transformer only heads and neurons of its layers: the pooler is no feed-forward layer.
    """
    found = [group for group in groups if group.kind == KEYS[key]]
    if key == "hidden_size":
        return hidden_groups(groups)
    structure = structure_of(module)
    if not structure.transformer:
        return found
    inside = tuple(f"{path}." for path, _ in structure.blocks)
    return [group for group in found if group.name.startswith(inside)]


def hidden_groups(groups: Sequence[Group]) -> list[Group]:
    """Groups of the model's hidden width: those that a layer norm spans, the widest of them."""
    soft = [group for group in groups if group.soft]
    widest = max((group.units for group in soft), default=0)
    return [group for group in soft if group.units == widest]


def problem_of(module: nn.Module, groups: Sequence[Group], key: str, units: int) -> str | None:
    """Why no layer can have ``units`` units of this key; None when some can."""
    found = resizable(module, groups, key)
    free = [group for group in found if not group.hard]
    if not found:
        return f"matches nothing: the model has no {KEYS[key]} that belong to a layer"
    if not free:
        return f"`{found[0].name}` must keep its {KEYS[key]}: it {'; it '.join(found[0].hard)}"
    most = max(group.units for group in free)
    if units > most:
        return f"{units} is more than the teacher's {most}"
    return None


def ranking(
    module: nn.Module, groups: Sequence[Group], keys: Iterable[str], data: Iterable[Mapping[str, Tensor]]
) -> Scores:
    """Importance of the units of these keys: by activation on ``data``, by weight norm where it is empty."""
    wanted = [group for key in keys for group in resizable(module, groups, key) if not group.hard]
    some = next(iter(data), None) is not None
    method: Method = "activation" if some else "magnitude"
    return score(module, wanted, method, data if some else ())


def cuts_of(module: nn.Module, groups: Sequence[Group], scores: Scores, wanted: Wanted) -> list[Cut]:
    """The most important units of each layer stay: of two wishes the smaller's are among the larger's."""
    cuts = []
    for key, units in wanted.items():
        for group in resizable(module, groups, key):
            if not group.hard and units < group.units:
                best = np.argsort(-scores.units[group.name], kind="stable")[:units]
                cuts.append(Cut(group, np.sort(best).astype(np.int64)))
    return cuts


def resize(
    module: nn.Module, cuts: Sequence[Cut], example: Mapping[str, Tensor]
) -> tuple[nn.Module, list[dict[str, Any]], dict[str, str]]:
    """A smaller copy, the steps that make it, and the groups that had to stay with the reason.

    Heads and neurons first, checked against their masked twin to 1e-4; the hidden width changes what norms see, so that
    nothing masked computes the same.
    """
    inner = [cut for cut in cuts if not cut.group.soft]
    narrow = commit(module, inner, example)
    hidden = [cut for cut in cuts if cut.group.soft]
    made = commit(narrow.module, hidden, example, exact=False)
    return made.module, [*narrow.record, *made.record], {**narrow.refused, **made.refused}


__all__ = ["KEYS", "Wanted", "cuts_of", "hidden_groups", "problem_of", "ranking", "resizable", "resize"]
