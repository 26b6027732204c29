"""A layer that gives zeros: what is left of a sublayer that went. It has no weights and reads nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Silent(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """(..., any) -> zeros (1, ..., 1, features), which broadcast where they are added.

    Its output does not depend on its input, so that an exporter drops all that only fed it.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("zeros", torch.zeros(features))

    def forward(self, data: Tensor) -> Tensor:
        return self.zeros.view(*(1,) * (data.dim() - 1), -1)


def silence(module: nn.Module, name: str) -> None:
    """Replace the linear layer ``name`` of ``module``, in place.

    Raises:
        ValueError: it is not a linear layer.
    """
    layer = module.get_submodule(name)
    transposed = hasattr(layer, "nx") and hasattr(layer, "nf")  # transformers' Conv1D keeps (inputs, outputs)
    if not isinstance(layer, nn.Linear) and not transposed:
        raise ValueError(f"`{name}` is not a linear layer")
    features = layer.weight.shape[1 if transposed else 0]
    parent, _, local = name.rpartition(".")
    module.get_submodule(parent)._modules[local] = Silent(features).to(layer.weight.device)
