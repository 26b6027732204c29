"""Whole blocks: lists of layers that map a hidden state to one of the same shape, so that any can be left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compressor.models.structure.trace import evaluating, few_samples, run

DEPTH_NAMES = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")  # configuration attributes of transformers


@dataclass(frozen=True)
class BlockList:
    """Droppable elements of a container: a chain of equals, or blocks of a Sequential that keep their input's shape.

    ``count`` is the number of elements of the container, ``positions`` those that can go, ``minimum`` how many of
    these must stay (one of a chain; none of the blocks between other layers).
    """

    container: str
    count: int
    positions: tuple[int, ...]
    minimum: int = 1


Seen = Callable[[str, int, Tensor, Tensor], None]


def find_block_lists(module: nn.Module, example: Mapping[str, Tensor]) -> tuple[BlockList, ...]:
    """Every list of droppable blocks, found by running two samples of ``example``.

    A block is a composed module (a transformer layer, a residual block) whose output has the shape of its input. It is
    droppable when it stands in a chain of equals, or in a Sequential, where the next element takes any such tensor.
    """
    calls: dict[str, list[tuple[int, Tensor, Tensor]]] = {}

    def seen(container: str, position: int, before: Tensor, after: Tensor) -> None:
        calls.setdefault(container, []).append((position, before, after))

    with evaluating(module), watching(module, _candidates(module), seen):
        run(module, few_samples(example))
    found = []
    for name, chain in calls.items():
        container = module.get_submodule(name)
        elements = list(container.children())
        if _equal(elements) and _is_chain(chain, len(elements)):
            free = tuple(p for p, element in enumerate(elements) if not shares_bias(element))
            found.append(BlockList(name, len(elements), free))
        elif isinstance(container, nn.Sequential) and len({position for position, _, _ in chain}) == len(chain):
            kept = tuple(p for p, before, after in chain if _composed(elements[p]) and before.shape == after.shape)
            if kept:
                found.append(BlockList(name, len(elements), kept, minimum=0))
    return tuple(found)


def shares_bias(element: nn.Module) -> bool:
    """Does this layer hold the position bias that all layers of its list read (T5's first)? Without it none has any."""
    return any(getattr(part, "has_relative_attention_bias", False) is True for part in element.modules())


def _candidates(module: nn.Module) -> list[str]:
    """Containers with at least two elements, of which one is a composed module."""
    names = []
    for name, part in module.named_modules():
        elements = list(part.children())
        chain = isinstance(part, nn.ModuleList) and _equal(elements)
        if (
            len(elements) >= 2
            and (chain or isinstance(part, nn.Sequential))
            and any(_composed(element) for element in elements)
        ):
            names.append(name)
    return names


def _equal(elements: Sequence[nn.Module]) -> bool:
    return len({type(element) for element in elements}) == 1 and all(_composed(element) for element in elements)


def _composed(element: nn.Module) -> bool:
    """A module with parts of its own that are more than listed layers: a block, not a convolution and its norm."""
    return bool(list(element.children())) and not isinstance(element, nn.Sequential)


def _is_chain(chain: Sequence[tuple[int, Tensor, Tensor]], count: int) -> bool:
    in_order = [position for position, _, _ in chain] == list(range(count))
    same_shape = all(before.shape == after.shape for _, before, after in chain)
    linked = all(a[2].data_ptr() == b[1].data_ptr() for a, b in pairwise(chain))
    return in_order and same_shape and linked


@contextmanager
def watching(module: nn.Module, containers: Iterable[str], seen: Seen) -> Iterator[None]:
    """Report the hidden state that goes into and comes out of every element of ``containers``."""
    handles = []
    for container in containers:
        for position, element in enumerate(module.get_submodule(container).children()):
            hook = _hook(container, position, seen)
            handles.append(element.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(container: str, position: int, seen: Seen) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = next((leaf for leaf in tree_leaves((args, kwargs)) if _is_hidden(leaf)), None)
        after = next((leaf for leaf in tree_leaves(output) if _is_hidden(leaf)), None)
        if before is not None and after is not None:
            seen(container, position, before, after)

    return hook


def _is_hidden(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() >= 2


def block_influence(
    module: nn.Module, lists: Sequence[BlockList], calibration: Iterable[Mapping[str, Tensor]]
) -> dict[tuple[str, int], float]:
    """``1 - cos(input, output)`` of each block, averaged over all tokens (Minitron's depth importance, methods U1).

    Keys are (container, position). Memory does not depend on the number of samples: two numbers a block are kept.
    """
    totals: dict[tuple[str, int], list[float]] = {}
    mask: list[Tensor | None] = [None]
    droppable = {(blocks.container, position) for blocks in lists for position in blocks.positions}

    def seen(container: str, position: int, before: Tensor, after: Tensor) -> None:
        if (container, position) not in droppable:
            return
        axis = -1 if before.dim() == 3 else 1
        cosine = torch.cosine_similarity(before, after, dim=axis)
        weight = mask[0] if mask[0] is not None and mask[0].shape == cosine.shape else torch.ones_like(cosine)
        total = totals.setdefault((container, position), [0.0, 0.0])
        total[0] += float(((1 - cosine) * weight).sum())
        total[1] += float(weight.sum())

    with evaluating(module), watching(module, [blocks.container for blocks in lists], seen):
        for batch in calibration:
            mask[0] = batch.get("attention_mask")
            run(module, batch)
    return {key: total / max(count, 1.0) for key, (total, count) in totals.items()}


def drop_steps(module: nn.Module, container: str, keep: Sequence[int]) -> list[dict[str, Any]]:
    """Record steps that keep these elements of ``container`` and tell the configuration how many there are."""
    count = len(list(module.get_submodule(container).children()))
    steps: list[dict[str, Any]] = [{"op": "drop", "container": container, "keep": list(keep)}]
    told: list[Any] = []
    for name, part in module.named_modules():
        config = getattr(part, "config", None)
        around = container == name or container.startswith(f"{name}." if name else "")
        if not around or any(config is other for other in told):
            continue
        names = _depth_names(config, container)
        attribute = next((depth for depth in names if getattr(config, depth, None) == count), None)
        if attribute is not None:
            steps.append({"op": "set", "module": name, "attribute": f"config.{attribute}", "value": len(keep)})
            told.append(config)
            if not getattr(config, "is_encoder_decoder", False):
                break  # of an encoder-decoder model the side has a configuration of its own, too
    return steps


def _depth_names(config: Any, container: str) -> tuple[str, ...]:
    """The attributes that may say how many layers ``container`` has: a configuration of two sides has one for each."""
    if not getattr(config, "is_encoder_decoder", False):
        return DEPTH_NAMES
    decoder = "decoder" in container.split(".")
    return ("num_decoder_layers", "decoder_layers") if decoder else ("encoder_layers", "num_layers")


def spread_evenly(count: int, keep: int) -> tuple[int, ...]:
    """``keep`` positions out of ``count``, first and last included, as even as rounding allows.

    >>> spread_evenly(6, 3)
    (0, 2, 5)
    >>> spread_evenly(12, 6)  # DistilBERT took (0, 2, 4, 7, 9, 11)
    (0, 2, 4, 7, 9, 11)
    """
    if keep <= 1:
        return (0,)
    return tuple(round(position * (count - 1) / (keep - 1)) for position in range(keep))
