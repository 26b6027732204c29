"""What is mended after a cut without any training: biases and batch-norm statistics."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compressor.models.structure.groups import Cut, Floats, Key, owner, removed_positions
from compressor.models.structure.trace import evaluating, run

ENOUGH_SAMPLES = 32  # fewer make batch-norm statistics worse than the teacher's own


def compensate(module: nn.Module, cuts: Sequence[Cut], means: Mapping[Key, Floats]) -> list[str]:
    """Add to each reading layer's bias what the removed units gave it on average: ``b += W[:, gone] @ mean(x[gone])``.

    In place, before the cut. Exact for units that are constant over the data (dead neurons); for a padded convolution
    exact away from the border. Layers without a bias are left alone (where batch norm follows, its mended mean
    does the same). Returns the names of the layers that were changed.
    """
    changed = []
    for key, gone in removed_positions(cuts).items():
        layer = module.get_submodule(owner(key.tensor))
        bias = getattr(layer, "bias", None)
        if key not in means or bias is None or not _is_plain(layer, key):
            continue
        weight = getattr(layer, key.tensor.rpartition(".")[2]).detach()
        average = torch.from_numpy(means[key][gone]).to(weight.dtype)
        columns = weight.index_select(key.axis, torch.from_numpy(gone))
        columns = columns.movedim(key.axis, 1).flatten(2).sum(dim=2) if weight.dim() > 2 else columns
        columns = columns.T if weight.dim() == 2 and key.axis == 0 else columns
        with torch.no_grad():
            bias += columns @ average
        changed.append(owner(key.tensor))
    return changed


def _is_plain(layer: nn.Module, key: Key) -> bool:
    """A linear layer or an ungrouped convolution, read along its input axis."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.groups == 1 and not layer.transposed and key.axis == 1
    transposed = hasattr(layer, "nx") and hasattr(layer, "nf")  # transformers' Conv1D keeps (inputs, outputs)
    return (isinstance(layer, nn.Linear) and key.axis == 1) or (transposed and key.axis == 0)


def mend_batch_norm(
    module: nn.Module,
    masked: nn.Module,
    student: nn.Module,
    cuts: Sequence[Cut],
    batches: Iterable[Mapping[str, Tensor]],
) -> tuple[list[str], str]:
    """Mend the running statistics of ``masked`` and ``student`` (in place) in the way that suits the data.

    Statistics taken from the calibration data alone ruin even an uncut network when the teacher was trained on other
    data. So there are three ways: the teacher's own statistics; these moved by what the cut changed (each channel's
    mean by the difference of the means that teacher and masked twin see on the data, its variance by the quotient);
    and those of the data. The one whose outputs are nearest to the teacher's wins. ``batches`` are read six times.

    Returns the names of the layers that were changed and how; nothing is done with fewer than 32 samples.
    """
    norms = _norms(masked)
    if not norms or sum(_samples(batch) for batch in batches) < ENOUGH_SAMPLES:
        return [], ""
    before, after = (statistics_on(each, batches) for each in (module, masked))
    own = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}
    moved = {
        name: (
            own[name][0] + after[name][0] - before[name][0],
            own[name][1] * (after[name][1] + norm.eps) / (before[name][1] + norm.eps),
        )
        for name, norm in norms.items()
    }
    ways = {"": own, "moved by what the cut changed": moved, "estimated again on calibration data": after}
    distances = {}
    for way, values in ways.items():
        _set_statistics(norms, values)
        distances[way] = _distance(module, masked, batches)
    best = min(distances, key=lambda way: distances[way])
    _set_statistics(norms, ways[best])
    _copy_statistics(masked, student, cuts)
    return (list(norms) if best else []), best


def _set_statistics(norms: Mapping[str, Any], values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, norm in norms.items():
        norm.running_mean.copy_(values[name][0])
        norm.running_var.copy_(values[name][1])


def statistics_on(module: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance that every batch norm sees over ``batches``, by name; ``module`` is left as it was.

    Every norm normalises by its batch's own statistics meanwhile, as in training; dropout stays off.
    """
    work = copy.deepcopy(module)
    norms = _norms(work)
    with evaluating(work):
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        for batch in batches:
            if _samples(batch) > 1:  # the variance of one value is not defined
                run(work, batch)
    return {name: (norm.running_mean, norm.running_var) for name, norm in norms.items()}


def _norms(module: nn.Module) -> dict[str, Any]:
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats
    }


def _distance(module: nn.Module, masked: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Mean squared difference of the two modules' floating-point outputs."""
    total, count = 0.0, 0
    with evaluating(module), evaluating(masked):
        for batch in batches:
            pairs = zip(tree_leaves(run(module, batch)), tree_leaves(run(masked, batch)), strict=True)
            for wanted, got in pairs:
                if isinstance(wanted, Tensor) and wanted.is_floating_point():
                    total += float((wanted - got).square().sum())
                    count += wanted.numel()
    return total / max(count, 1)


def _samples(batch: Mapping[str, Tensor]) -> int:
    return int(next(iter(batch.values())).shape[0])


def _copy_statistics(masked: nn.Module, student: nn.Module, cuts: Sequence[Cut]) -> None:
    """Put the statistics of the masked twin into the committed module, at the positions that were kept."""
    gone = removed_positions(cuts)
    for name, norm in _norms(student).items():
        wide = masked.get_submodule(name)
        for buffer in ("running_mean", "running_var"):
            values = getattr(wide, buffer)
            removed = gone.get(Key(f"{name}.{buffer}", 0), np.empty(0, dtype=np.int64))
            kept = np.setdiff1d(np.arange(values.shape[0]), removed)
            getattr(norm, buffer).copy_(values[torch.from_numpy(kept)])
