"""Masks beside the weights of a module: a buffer ``weight_mask`` says which elements are zero for good.

A mask is stored with the student's weights, and every later stage keeps it. It is no part of the forward pass: the
weights themselves are zero.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import Problem
from compressor.masks import UNSTRUCTURED, Zeros
from compressor.models.patterns import Axes, kept, why_not
from compressor.types import LayerFact

SUFFIX = "_mask"


def add_mask(module: nn.Module, name: str) -> Tensor:
    """The mask of the parameter ``name``, in place: bool, of its shape, all True where there was none yet.

    Raises:
        ValueError: there is no such parameter.
    """
    path, _, local = name.rpartition(".")
    holder = module.get_submodule(path)
    weight = getattr(holder, local, None)
    if not isinstance(weight, nn.Parameter):
        raise ValueError(f"`{name}` is no parameter")
    if local + SUFFIX not in holder._buffers:
        holder.register_buffer(local + SUFFIX, torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
    return holder._buffers[local + SUFFIX]


def masked(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Name, parameter and mask of every masked weight."""
    for path, holder in module.named_modules():
        for local, mask in holder._buffers.items():
            weight = holder._parameters.get(local.removesuffix(SUFFIX)) if local.endswith(SUFFIX) else None
            if mask is not None and weight is not None and mask.dtype == torch.bool:
                yield f"{path}.{local.removesuffix(SUFFIX)}".lstrip("."), weight, mask


def drop_masks(module: nn.Module) -> nn.Module:
    """Remove all masks, in place: for an export, which needs only the zeros."""
    for holder in module.modules():
        for local in [name for name in holder._buffers if name.endswith(SUFFIX)]:
            if local.removesuffix(SUFFIX) in holder._parameters:
                del holder._buffers[local]
    return module


@dataclass(frozen=True)
class Maskable:
    """The weights of a module that take a pattern of zeros, and why the others stay dense."""

    axes: Mapping[str, Axes]  # parameter -> where its outputs and inputs are
    dense: Mapping[str, str]  # layer -> reason


def maskable(module: nn.Module, zeros: Zeros, protect: Sequence[str] = ()) -> Maskable:
    """Linear layers and convolutions of ``module``; embeddings and norms are never masked."""
    found: dict[str, Axes] = {}
    dense: dict[str, str] = {}
    uses = Counter(id(p) for part in module.modules() for p in part.parameters(recurse=False))
    for path, layer in module.named_modules():
        axes = axes_of(layer)
        weight = getattr(layer, "weight", None)
        if axes is None or not isinstance(weight, nn.Parameter):
            continue
        parents = [path[:end] for end, letter in enumerate(path) if letter == "."]
        pattern = next((p for p in protect if any(fnmatchcase(name, p) for name in (path, *parents))), None)
        if pattern is not None:
            dense[path] = f"protected by `{pattern}`"
        elif uses[id(weight)] > 1:
            dense[path] = "its weight is used twice (tied)"
        elif reason := why_not(tuple(weight.shape), axes, zeros):
            dense[path] = reason
        else:
            found[f"{path}.weight".lstrip(".")] = axes
    return Maskable(found, dense)


def axes_of(layer: nn.Module) -> Axes | None:
    """Where a layer's weight keeps outputs and inputs; None for layers that are not masked."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return Axes(1, 0) if layer.transposed else Axes(0, 1)
    if isinstance(layer, nn.Linear):
        return Axes(0, 1)
    return Axes(1, 0) if hasattr(layer, "nx") and hasattr(layer, "nf") else None  # transformers' Conv1D


def set_zeros(module: nn.Module, found: Maskable, zeros: Zeros, share: float = 1.0) -> None:
    """Compute the masks of all maskable weights from their magnitudes and apply them, in place."""
    weights = {name: module.get_parameter(name).detach().float().cpu().numpy() for name in found.axes}
    for name, mask in kept(weights, found.axes, zeros, share).items():
        add_mask(module, name).copy_(torch.from_numpy(mask))
    apply_masks(module)


def apply_masks(module: nn.Module) -> None:
    """Make every masked element exactly zero."""
    with torch.no_grad():
        for _, weight, mask in masked(module):
            weight.mul_(mask)


def density(weight: Tensor) -> float:
    """Share of the elements that are not zero."""
    return float((weight != 0).float().mean())


def mask_steps(found: Maskable, zeros: Zeros) -> list[dict[str, Any]]:
    """Record steps that give the structure of these masks; their values are stored with the weights."""
    return [{"op": "mask", "tensor": name, "pattern": zeros.pattern} for name in found.axes]


def mask_facts(module: nn.Module, before: Mapping[str, float], found: Maskable, zeros: Zeros) -> list[LayerFact]:
    """A row for every layer; ``before``: the densities of the maskable weights before."""
    facts = [
        LayerFact(
            "prune",
            name.rpartition(".")[0],
            "sparsified",
            f"{1 - before[name]:.1%} zeros",
            f"{1 - density(module.get_parameter(name)):.1%} zeros",
            f"magnitude, {zeros.scope}, {zeros.shown}",
        )
        for name in found.axes
    ]
    return facts + [LayerFact("prune", layer, "kept", "dense", "dense", why) for layer, why in found.dense.items()]


def problems_of(module: nn.Module, zeros: Zeros, protect: Sequence[str]) -> list[Problem]:
    """Why these zeros cannot be made in ``module``; ``where`` is the key inside the stage."""
    names = [name for name, _ in module.named_modules() if name]
    wrong = [
        Problem(f"protect.{number}", f"`{pattern}` matches no module; one of {', '.join(names[:8])} ...")
        for number, pattern in enumerate(protect)
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    found = maskable(module, zeros, protect)
    if not found.axes:
        reasons = "; ".join(sorted(set(found.dense.values()))) or "the model has no linear layer and no convolution"
        wrong.append(Problem("pattern" if zeros.pattern != UNSTRUCTURED else "sparsity", f"matches nothing: {reasons}"))
    return wrong
