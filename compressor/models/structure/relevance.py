"""Layer-wise relevance of units (LRP): how much of the winning output flows through each, sum of |relevance|.

Source: Yeom et al., "Pruning by Explaining: A Novel Criterion for Deep Neural Network Pruning" (Pattern Recognition
2021, methods U4), whose convolutions use the alpha-beta rule with alpha 1 and beta 0 (z+): R_j = sum_k (x_j w_jk)+ /
sum_j (x_j w_jk)+ R_k. The relevance of a unit is the sum over reference samples and positions of its absolute value,
without any normalisation per layer.

The rules are written as gradients (relevance is input times modified gradient, as in Achtibat et al., "AttnLRP",
ICML 2024): each operation returns what it always does, with a gradient of its own. So sums (residual connections)
share relevance by their parts and nothing has to be known about how the model is put together.

- linear and convolution layers: the z+ rule (biases take none);
- activation functions: relevance passes unchanged; layer norms: the deviation is a constant;
- products of two activations (gates, attention): each side gets half;
- batch norm is folded into the convolution before it; where it cannot be, it passes relevance as a linear map.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from compressor.models.structure.groups import Floats, Group
from compressor.models.structure.taylor import TaylorStatistics
from compressor.models.structure.trace import evaluating, run

TINY = 1e-9
WEIGHTED = {
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, torch.conv1d,
    torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
}  # fmt: skip
ACTIVATIONS = {
    F.gelu, F.silu, F.sigmoid, F.tanh, F.hardswish, F.elu, F.softplus, F.mish, F.selu, F.leaky_relu, F.hardsigmoid,
    torch.sigmoid, torch.tanh, Tensor.sigmoid, Tensor.tanh, torch._C._nn.gelu,
}  # fmt: skip
PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm}


class Rules(TorchFunctionMode):  # type: ignore[misc]
    """Operations as they are, with the gradients that carry relevance."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func in WEIGHTED:
            return _weighted(func, args, kwargs)
        if func in ACTIVATIONS and not kwargs.get("inplace"):
            return _passed(args[0], func(*args, **kwargs))
        if func in PRODUCTS and all(isinstance(side, Tensor) and side.requires_grad for side in args[:2]):
            left, right = args[:2]
            return 0.5 * func(left, right.detach()) + 0.5 * func(left.detach(), right)
        if func is F.layer_norm:
            return _layer_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _weighted(func: Callable[..., Tensor], args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """The z+ rule for inputs of both signs: positive contributions are x+ w+ and x- w-."""
    value = func(*args, **kwargs)
    data, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
    if not isinstance(data, Tensor) or not data.requires_grad or weight.requires_grad:
        return value
    rest = tuple(None if place == 0 else item for place, item in enumerate(args[2:]))  # no bias
    named = {name: item for name, item in kwargs.items() if name not in ("weight", "bias")}
    positive = func(data.clamp(min=0), weight.clamp(min=0), *rest, **named)
    if bool((data.detach() < 0).any()):
        positive = positive + func(data.clamp(max=0), weight.clamp(max=0), *rest, **named)
    share: Tensor = value.detach() / (positive.detach() + TINY)
    return positive * share + (value - positive * share).detach()


def _passed(data: Tensor, value: Tensor) -> Tensor:
    """An activation function as a factor that is a constant, so that what comes out is what went in."""
    if not isinstance(data, Tensor) or not data.requires_grad:
        return value
    safe = torch.where(data.detach().abs() < TINY, torch.ones_like(data), data.detach())
    factor = value.detach() / safe
    return data * factor + (value - data * factor).detach()


def _layer_norm(data: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
    axes = tuple(range(-len(shape), 0))
    centred = data - data.mean(dim=axes, keepdim=True)
    value = centred / (centred.detach().square().mean(dim=axes, keepdim=True) + eps).sqrt()
    value = value * weight if weight is not None else value
    return value + bias if bias is not None else value


class RelevanceStatistics(TaylorStatistics):
    """Streaming sums of |relevance| per unit over samples and positions."""

    def observe(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Run ``batches`` forward and carry the relevance of each sample's winning output back."""
        original, batches = self._module, list(batches) if hasattr(batches, "__next__") else batches
        first = next(iter(batches), None)
        if first is None:
            return
        self._module = folded(original, first)
        try:
            with Rules():
                super().observe(batches)
        finally:
            self._module = original

    def _target(self, output: Any, batch: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        outputs = list(output.values()) if isinstance(output, Mapping) else output
        first = next(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point())
        return first.flatten(0, -2).max(dim=-1).values.sum() if first.dim() > 1 else first.sum()

    def _fold_positions(self, chosen: Tensor) -> Tensor:
        return chosen.abs().sum(dim=(1, 3))

    def importance(self, group: Group) -> Floats | None:
        """Sum over the places that read the group; None when none was seen."""
        seen = [
            point.squares
            for name, points in self._points.items()
            for point in points
            if point.group is group and name in self._seen
        ]
        return sum(seen[1:], seen[0]) if seen else None


def folded(module: nn.Module, example: Mapping[str, Tensor]) -> nn.Module:
    """A copy in which every batch norm that directly follows a convolution (or linear layer) is part of it."""
    work = copy.deepcopy(module).eval()
    makers: dict[int, tuple[str, Tensor]] = {}
    pairs: dict[str, str] = {}
    calls: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(part: nn.Module, args: Any, output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                found = makers.get(id(args[0]))
                pairs[name] = found[0] if found is not None else ""
            else:
                makers[id(output)] = (name, output)

        return hook

    parts = [(n, p) for n, p in work.named_modules() if isinstance(p, _FOLDABLE | nn.modules.batchnorm._BatchNorm)]
    handles = [part.register_forward_hook(watch(name)) for name, part in parts]
    with evaluating(work):
        run(work, example)
    for handle in handles:
        handle.remove()
    sources = list(pairs.values())
    for norm, maker in pairs.items():
        if maker and calls[maker] == 1 and calls[norm] == 1 and sources.count(maker) == 1:
            _fold(work.get_submodule(maker), work.get_submodule(norm))
            parent, _, local = norm.rpartition(".")
            setattr(work.get_submodule(parent), local, nn.Identity())
    return work


_FOLDABLE = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


def _fold(layer: Any, norm: Any) -> None:
    scale = (norm.weight if norm.affine else 1) / (norm.running_var + norm.eps).sqrt()
    shift = (norm.bias if norm.affine else 0) - norm.running_mean * scale
    with torch.no_grad():
        layer.weight.mul_(scale.reshape([-1] + [1] * (layer.weight.dim() - 1)))
        bias = shift + (layer.bias * scale if layer.bias is not None else 0)
    layer.bias = nn.Parameter(bias, requires_grad=False)


__all__ = ["RelevanceStatistics", "Rules", "folded"]
