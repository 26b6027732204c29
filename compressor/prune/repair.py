"""What is mended after a cut without any training: biases and batch-norm statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from compressor.models.structure.labels import Key
from compressor.models.structure.scores import Floats
from compressor.models.structure.surgery import Cut, removed_positions
from compressor.models.structure.trace import evaluating, run
from compressor.models.structure.units import owner

ENOUGH_SAMPLES = 32  # fewer make batch-norm statistics worse than the teacher's own


def compensate(module: nn.Module, cuts: Sequence[Cut], means: Mapping[Key, Floats]) -> list[str]:
    """Add to each reading layer's bias what the removed units gave it on average: ``b += W[:, gone] @ mean(x[gone])``.

    In place, before the cut. Exact for units that are constant over the data (dead neurons); for a padded convolution
    exact away from the border. Layers without a bias are left alone (where batch norm follows, its re-estimated mean
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


def reestimate_batch_norm(module: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> list[str]:
    """Replace the running statistics by the average over ``batches`` (in place); dropout stays off. They are read
    twice.

    Does nothing when there are fewer than 32 samples. Returns the names of the layers that were changed.
    """
    norms = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats
    }
    if not norms or sum(_samples(batch) for batch in batches) < ENOUGH_SAMPLES:
        return []
    momenta = {name: norm.momentum for name, norm in norms.items()}
    with evaluating(module):
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        for batch in batches:
            if _samples(batch) > 1:  # the variance of one value is not defined
                run(module, batch)
    for name, norm in norms.items():
        norm.momentum = momenta[name]
    return list(norms)


def _samples(batch: Mapping[str, Tensor]) -> int:
    return int(next(iter(batch.values())).shape[0])


def copy_statistics(source: nn.Module, target: nn.Module, cuts: Sequence[Cut], norms: Sequence[str]) -> None:
    """Put the re-estimated statistics of a committed module into its masked twin, at the positions that were kept."""
    gone = removed_positions(cuts)
    for name in norms:
        new, old = source.get_submodule(name), target.get_submodule(name)
        for buffer in ("running_mean", "running_var"):
            values = getattr(old, buffer)
            removed = gone.get(Key(f"{name}.{buffer}", 0), np.empty(0, dtype=np.int64))
            kept = np.setdiff1d(np.arange(values.shape[0]), removed)
            values[torch.from_numpy(kept)] = getattr(new, buffer)
