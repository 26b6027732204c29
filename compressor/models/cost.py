"""What a module costs: parameters and multiply-accumulate operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from compressor.models.structure.trace import evaluating, few_samples, run


def count_parameters(module: nn.Module) -> int:
    """Elements of all parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_macs(module: nn.Module, example: Mapping[str, Tensor]) -> int:
    """Multiply-accumulates of one forward pass on the first sample of ``example``.

    Convolutions, matrix products and both products of attention count; additions, activations and norms do not.
    """
    return macs_by_layer(module, example).get("", 0)


def macs_by_layer(module: nn.Module, example: Mapping[str, Tensor]) -> dict[str, int]:
    """Multiply-accumulates by module name, inner modules included in outer ones; ``""`` is the whole."""
    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
    with evaluating(module), counter:
        run(module, few_samples(example, 1))
    counts = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    root = type(module).__name__
    named = {name.removeprefix(f"{root}."): count for name, count in counts.items() if name.startswith(f"{root}.")}
    return {"": counts.get("Global", 0), **named}


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Both products of (B, heads, T, size) attention; the counter that ships with torch leaves out the CPU kernel."""
    batch, heads, length, size = query
    return 2 * batch * heads * length * key[2] * (size + value[3])


_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
