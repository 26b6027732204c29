"""First-order Taylor importance: how much the loss changes when a unit is set to zero, |sum of activation x gradient|.

Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference" (ICLR 2017), its
criterion by Taylor expansion: the product is summed over positions before the absolute value is taken, which is
averaged over samples.

Nobody needs to label the calibration data: classes are drawn from the model's own soft labels (the gradient of its own
cross-entropy is zero at its own outputs, that for a drawn class is not); language models predict their own next
tokens; of other outputs a random combination of signs is differentiated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compressor.models.structure.groups import Floats, Group, normalised, owner
from compressor.models.structure.scores import Point, _channels_last, _fold, _watched_keys
from compressor.models.structure.trace import run

LARGEST_HEAD = 4096  # outputs up to this width are taken for classes, and only when they are no unit vectors


class TaylorStatistics:
    """Streaming sums of |activation x gradient| per unit; what is held does not depend on the number of samples."""

    def __init__(self, module: nn.Module, groups: Sequence[Group], seed: int = 0) -> None:
        self._module = module
        self._points: dict[str, list[Point]] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._seen: set[str] = set()
        self.samples = 0
        for group in groups:
            for key in _watched_keys(module, group):
                self._points.setdefault(owner(key.tensor), []).append(Point(group, key, np.zeros(group.units)))

    @property
    def floats_held(self) -> int:
        return sum(point.squares.size for points in self._points.values() for point in points)

    def observe(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Run ``batches`` forward and backward, and add what they show. The weights stay as they are."""
        handles = [self._watch(name) for name in self._points]
        training = {name: part.training for name, part in self._module.named_modules()}
        frozen = [weight for weight in self._module.parameters() if weight.requires_grad]
        self._module.eval()
        for weight in frozen:
            weight.requires_grad_(False)
        try:
            with torch.enable_grad():
                for batch in batches:
                    self.samples += int(next(iter(batch.values())).shape[0])
                    self._target(run(self._module, batch), batch).backward()
        finally:
            for handle in handles:
                handle.remove()
            for weight in frozen:
                weight.requires_grad_(True)
            for name, part in self._module.named_modules():
                part.training = training[name]

    def _target(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """What is differentiated."""
        return pseudo_loss(output, batch, self._generator)

    def _fold_positions(self, chosen: Tensor) -> Tensor:
        """(samples, units) of (samples, positions, units, width)."""
        return chosen.sum(dim=(1, 3)).abs()

    def _watch(self, name: str) -> Any:
        layer = self._module.get_submodule(name)
        return layer.register_forward_pre_hook(lambda module, args: self._tap(name, module, args))

    def _tap(self, name: str, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The layer's input as a tensor with a gradient, which tells its product when it comes back."""
        data = args[0] if args[0].requires_grad else args[0].detach().requires_grad_(True)
        kept = data.detach().clone()  # later code may write into it
        data.register_hook(lambda gradient: self._add(name, layer, kept, gradient))
        return (data, *args[1:])

    def _add(self, name: str, layer: nn.Module, data: Tensor, gradient: Tensor) -> None:
        product = _channels_last(layer, data * gradient.detach())
        self._seen.add(name)
        for point in self._points[name]:
            index = _fold(layer, point.group.index[point.key], product.shape[-1])
            chosen = product[..., torch.from_numpy(index.reshape(-1))].reshape(*product.shape[:2], *index.shape)
            point.squares += self._fold_positions(chosen).double().sum(dim=0).numpy()

    def importance(self, group: Group) -> Floats | None:
        """Mean over the places that read the group of its normalised sum; None when none was seen."""
        seen = [
            normalised(point.squares)
            for name, points in self._points.items()
            for point in points
            if point.group is group and name in self._seen
        ]
        return normalised(np.mean(seen, axis=0)) if seen else None


def pseudo_loss(output: Any, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """A scalar whose gradient says what the outputs depend on, summed over samples."""
    outputs = list(output.values()) if isinstance(output, Mapping) else output
    first = next(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    ids = batch.get("input_ids")
    if first.dim() == 3 and ids is not None and first.shape[-1] > int(ids.max()) and first.shape[1] == ids.shape[1]:
        return F.cross_entropy(first[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    if first.dim() == 2 and 1 < first.shape[1] <= LARGEST_HEAD and not _are_unit_vectors(first):
        drawn = torch.multinomial(first.detach().softmax(dim=-1), 1, generator=generator).squeeze(1)
        return F.cross_entropy(first, drawn, reduction="sum")
    signs = torch.randint(0, 2, first.shape, generator=generator).to(first) * 2 - 1
    return (first * signs).sum()


def _are_unit_vectors(output: Tensor) -> bool:
    return bool(torch.allclose(output.detach().norm(dim=-1), torch.ones(len(output)), atol=1e-3))


__all__ = ["TaylorStatistics", "pseudo_loss"]
