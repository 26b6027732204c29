"""Mixtures of experts: which block routes to which experts, how often each is used, and the block without some.

A mixture is found by what it does: something picks the k best of E scores (``topk``), and the smallest module around it
holds the router's rows and E experts, stacked in tensors with E as first axis or listed in a ``ModuleList``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.models.rebuild import ranges_of
from compressor.models.structure.groups import Floats
from compressor.models.structure.trace import evaluating, few_samples, run


@dataclass(frozen=True)
class Mixture:
    """A block with ``count`` experts, ``chosen`` of them for each token."""

    block: str
    count: int
    chosen: int
    routers: tuple[str, ...]  # weights (experts, inputs) of layers that score the experts
    tensors: tuple[str, ...]  # all parameters and buffers with the experts as first axis, the routers included
    lists: tuple[str, ...]  # module lists with one element an expert


class _Watch(TorchDispatchMode):  # type: ignore[misc]
    """Calls ``seen(scores, indices)`` for every ``topk``."""

    def __init__(self, seen: Any) -> None:
        super().__init__()
        self._seen = seen

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """See :class:`compressor.models.structure.trace.Recorder`."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func._schema.name == "aten::topk":
            self._seen(args[0], output[1])
        return output


@contextmanager
def _inside(module: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that are running, outermost first."""
    stack: list[str] = []
    handles = []
    for name, part in module.named_modules():
        handles.append(part.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(part.register_forward_hook(lambda *_: stack.pop() and None))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def find_mixtures(module: nn.Module, example: Mapping[str, Tensor]) -> tuple[Mixture, ...]:
    """Every mixture of experts that two samples of ``example`` run through."""
    found: dict[str, Mixture] = {}

    def seen(scores: Tensor, indices: Tensor) -> None:
        for name in reversed(stack):
            mixture = _mixture(module.get_submodule(name), name, int(scores.shape[-1]), int(indices.shape[-1]))
            if mixture is not None:
                found.setdefault(name, mixture)
                return

    with evaluating(module), _inside(module) as stack, _Watch(seen):
        run(module, few_samples(example))
    return tuple(found.values())


def _mixture(block: nn.Module, name: str, count: int, chosen: int) -> Mixture | None:
    lists = tuple(
        inner for inner, part in block.named_modules() if isinstance(part, nn.ModuleList) and len(part) == count
    )
    named = [*block.named_parameters(), *block.named_buffers()]
    tensors = [
        (inner, tensor)
        for inner, tensor in named
        if tensor.dim() and tensor.shape[0] == count and not any(inner.startswith(f"{each}.") for each in lists)
    ]
    routers = [inner for inner, tensor in tensors if tensor.dim() == 2 and inner.endswith("weight")]
    stacked = any(tensor.dim() > 2 for _, tensor in tensors)
    if count < 2 or not routers or not (lists or stacked):
        return None
    prefix = f"{name}." if name else ""
    return Mixture(
        name,
        count,
        chosen,
        tuple(prefix + inner for inner in routers),
        tuple(prefix + inner for inner, _ in tensors),
        tuple(prefix + inner for inner in lists),
    )


def usage(module: nn.Module, mixtures: Sequence[Mixture], batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Floats]:
    """How many tokens were sent to each expert, by block. Padding is left out where there is an ``attention_mask``."""
    counts = {mixture.block: np.zeros(mixture.count) for mixture in mixtures}
    mask: list[Tensor | None] = [None]

    def seen(_: Tensor, indices: Tensor) -> None:
        block = next((name for name in reversed(stack) if name in counts), None)
        if block is None:
            return
        rows = indices.reshape(-1, indices.shape[-1])
        keep = mask[0].reshape(-1).bool() if mask[0] is not None and mask[0].numel() == len(rows) else None
        chosen = (rows if keep is None else rows[keep]).reshape(-1).numpy()
        counts[block] += np.bincount(chosen, minlength=len(counts[block]))

    with evaluating(module), _inside(module) as stack, _Watch(seen):
        for batch in batches:
            mask[0] = batch.get("attention_mask")
            run(module, batch)
    return counts


def expert_steps(module: nn.Module, mixture: Mixture, keep: Sequence[int]) -> list[dict[str, Any]]:
    """Record steps that leave these experts, their rows of the router, and tell the code how many there are."""
    steps: list[dict[str, Any]] = [
        {"op": "cut", "tensor": name, "axis": 0, "keep": ranges_of(list(keep))} for name in mixture.tensors
    ]
    steps += [{"op": "drop", "container": name, "keep": list(keep)} for name in mixture.lists]
    for name, part in module.get_submodule(mixture.block).named_modules(prefix=mixture.block):
        for attribute, value in vars(part).items():
            if type(value) is int and value == mixture.count and "expert" in attribute.lower():
                steps.append({"op": "set", "module": name, "attribute": attribute, "value": len(keep)})
    return steps


class Without(TorchFunctionMode):  # type: ignore[misc]
    """The module as it is, with routers whose scores for some experts are minus infinity: the masked twin."""

    def __init__(self, module: nn.Module, gone: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        parameters = dict(module.named_parameters())
        self._gone = {id(parameters[name]): list(positions) for name, positions in gone.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.linear and id(args[1]) in self._gone:
            output = output.index_fill(-1, torch.tensor(self._gone[id(args[1])]), float("-inf"))
        return output


__all__ = ["Mixture", "Without", "expert_steps", "find_mixtures", "usage"]
