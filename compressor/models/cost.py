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
    counter = FlopCounterMode(display=False, custom_mapping=_MORE)
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    try:
        for weight in trained:  # the counter cannot take a weight that wants a gradient as a layer's input
            weight.requires_grad_(False)
        with evaluating(module), counter:
            run(module, few_samples(example, 1))
    finally:
        for weight in trained:
            weight.requires_grad_(True)
    counts = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}
    root = type(module).__name__
    named = {name.removeprefix(f"{root}."): count for name, count in counts.items() if name.startswith(f"{root}.")}
    return {"": counts.get("Global", 0), **named}


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Both products of (B, heads, T, size) attention; the counter that ships with torch leaves out the CPU kernel."""
    batch, heads, length, size = query
    return 2 * batch * heads * length * key[2] * (size + value[3])


def _grouped_flops(rows: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Each row times the matrix of one expert, weights (experts, inputs, outputs)."""
    return 2 * rows[0] * weight[-2] * weight[-1]


_MORE = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._grouped_mm: _grouped_flops,
}
