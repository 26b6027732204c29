"""Batch statistics over all processes: batch norm then sees the batch that one process would see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from compressor.distil.processes import Processes


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The layers whose output depends on the other samples of the batch."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


class SharedNorms:
    """Switch of one student's batch norms; ``shared`` only in steps in which every process has a piece."""

    def __init__(self, module: nn.Module, processes: Processes) -> None:
        self.processes = processes
        self.layers = batch_norms(module) if processes.count > 1 else []
        self.shared = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Training-mode statistics are summed over the processes while ``shared`` is set (torch: GPUs only)."""
        for layer in self.layers:
            layer.forward = self._forward(layer, layer.forward)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward  # the class's own method is seen again

    def _forward(self, layer: _BatchNorm, alone: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if not (self.shared and layer.training and torch.is_grad_enabled()):
                return alone(x)
            return normalise(layer, x, self.processes.add)

        return forward


def normalise(layer: _BatchNorm, x: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
    """Batch norm of ``x`` (B, C, ...) with statistics of all processes' samples; running statistics move as usual.

    Args:
        add: sums a tensor over all processes, in place.
    """
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
    wide = x.float()
    count = add(torch.tensor(float(x.numel() // x.shape[1]), device=x.device))
    mean = _Sum.apply(wide.sum(axes), add) / count
    centred = wide - mean.view(shape)
    variance = _Sum.apply(centred.square().sum(axes), add) / count
    _track(layer, mean.detach(), variance.detach() * (count / (count - 1)))
    found = centred * torch.rsqrt(variance + layer.eps).view(shape)
    if layer.affine:
        found = found * layer.weight.view(shape) + layer.bias.view(shape)
    return found.to(x.dtype)


def _track(layer: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    if not layer.track_running_stats or layer.running_mean is None or layer.running_var is None:
        return
    share = layer.momentum
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        share = 1.0 / float(layer.num_batches_tracked) if share is None else share
    with torch.no_grad():
        layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), share or 0.0)
        layer.running_var.lerp_(variance.to(layer.running_var.dtype), share or 0.0)


class _Sum(torch.autograd.Function):  # type: ignore[misc]
    """Sum over the processes. Each one's loss reads the sum, so the gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.add = add
        return add(x.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.add(grads[0].clone()), None
