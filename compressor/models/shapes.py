"""Layers with weights as their kernels see them: what a table of layer costs is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class LayerShape:
    """A layer as its kernel sees it: ``size`` is the output's (height, width), or (positions,) of a linear layer."""

    outputs: int
    inputs: int  # of one group of channels
    kernel: tuple[int, ...]  # () for a linear layer
    groups: int
    size: tuple[int, ...]

    @property
    def macs(self) -> int:
        return self.outputs * self.inputs * math.prod(self.kernel) * math.prod(self.size)


def axis_of(layer: nn.Module, axis: int) -> int:
    """0 for outputs, 1 for inputs, whichever way the layer keeps its weight."""
    turned = bool(getattr(layer, "transposed", False)) or (hasattr(layer, "nx") and hasattr(layer, "nf"))
    return 1 - axis if turned else axis


def layer_shapes(module: nn.Module, example: Mapping[str, Tensor]) -> dict[str, LayerShape]:
    """Shapes of all linear and convolution layers that one sample runs through, by name."""
    from torch import nn

    from compressor.models.structure.trace import evaluating, few_samples, run

    found: dict[str, LayerShape] = {}

    def watch(name: str, layer: Any) -> Any:
        def hook(_: Any, __: Any, output: Tensor) -> None:
            rows, columns = (int(layer.weight.shape[axis_of(layer, axis)]) for axis in (0, 1))
            convolution = isinstance(layer, nn.modules.conv._ConvNd)
            size = tuple(output.shape[2:]) if convolution else (output.numel() // output.shape[-1],)
            groups = int(layer.groups) if convolution else 1
            found[name] = LayerShape(rows, columns, tuple(layer.weight.shape[2:]), groups, tuple(map(int, size)))

        return layer.register_forward_hook(hook)

    layers = [(name, part) for name, part in module.named_modules() if _is_layer(part)]
    handles = [watch(name, part) for name, part in layers]
    try:
        with evaluating(module):
            run(module, few_samples(example, 1))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _is_layer(part: nn.Module) -> bool:
    from torch import nn

    linear = isinstance(part, nn.Linear) or (hasattr(part, "nx") and hasattr(part, "nf"))
    return linear or isinstance(part, nn.modules.conv._ConvNd)


__all__ = ["LayerShape", "axis_of", "layer_shapes"]
