"""Before a module rounds: batch norm folded into the layers before it, and where its tensors come from and go to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compressor.errors import StageError
from compressor.models.fakequant import KINDS
from compressor.models.structure.trace import evaluating, run

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TOLERANCE = 1e-4  # of max(1, largest output): folding reorders sums, nothing else
# What lets a layer's output reach the rounding of its reader unchanged in kind: runtimes fuse these, or move the
# quantization across them. After anything else (a sum, a mean) the layer's own output has to be rounded.
PASSING = frozenset(
    {
        "relu", "relu_", "hardtanh", "hardtanh_", "max_pool2d_with_indices", "max_pool2d", "max_pool1d", "view",
        "_unsafe_view", "reshape", "flatten", "alias", "detach", "clone", "squeeze", "unsqueeze", "transpose",
        "permute", "slice", "lift_fresh", "contiguous",
    }
)  # fmt: skip


def fold_norms(module: nn.Module, example: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Fold every batch norm that follows a layer directly into that layer, in place; the record steps that do the same.

    w' = w g / sqrt(v + eps), b' = beta + (b - m) g / sqrt(v + eps), with the running statistics m, v.

    Raises:
        StageError: the folded module computes something else (the layer's output is read elsewhere too).
    """
    pairs = _pairs(module, example)
    if not pairs:
        return []
    before = _outputs(module, example)
    steps = []
    for layer, norm in pairs:
        scale, shift = _affine(module.get_submodule(norm))
        step = {"op": "fold", "module": layer, "norm": norm}
        fold(module, layer, norm)
        with torch.no_grad():
            made: Any = module.get_submodule(layer)
            made.weight.mul_(scale.reshape(-1, *([1] * (made.weight.dim() - 1))))
            made.bias.mul_(scale).add_(shift)
        steps.append(step)
    for old, new in zip(before, _outputs(module, example), strict=True):
        if float((old - new).abs().max()) > TOLERANCE * max(1.0, float(old.abs().max())):
            raise StageError(
                "batch norm cannot be folded: the model computes something else afterwards",
                hint="Is a convolution's output read by more than its batch norm? `qat.protect` keeps layers float.",
            )
    return steps


def fold(module: nn.Module, layer: str, norm: str) -> None:
    """The structure of a folded pair, in place: the layer has a bias, the norm is gone. Values are not touched."""
    part: Any = module.get_submodule(layer)
    if part.bias is None:
        part.bias = nn.Parameter(part.weight.new_zeros(len(part.weight)))
    parent, _, name = norm.rpartition(".")
    setattr(module.get_submodule(parent), name, nn.Identity())


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """What a batch norm does to its input in evaluation: scale and shift, (C) each."""
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var + norm.eps)
        scale = scale * norm.weight if norm.weight is not None else scale
        shift = -norm.running_mean * scale
        return scale, shift + norm.bias if norm.bias is not None else shift


def _pairs(module: nn.Module, example: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    made: dict[int, tuple[Tensor, str]] = {}  # tensors are held so that their ids stay theirs
    calls: Counter[str] = Counter()
    found: list[tuple[str, str]] = []

    def after(name: str, output: Any) -> None:
        calls[name] += 1
        if isinstance(output, Tensor):
            made[id(output)] = (output, name)

    def before(name: str, args: Any) -> None:
        calls[name] += 1
        known = made.get(id(args[0])) if args else None
        if known is not None:
            found.append((known[1], name))

    with evaluating(module), _hooks(module, before, after, (*KINDS, *NORMS)):
        run(module, example)
    parts = dict(module.named_modules())
    return [
        (layer, norm)
        for layer, norm in found
        if type(parts[norm]) in NORMS
        and type(parts[layer]) in KINDS
        and parts[norm].running_mean is not None
        and calls[layer] == 2  # once before, once after
        and calls[norm] == 2
        and not (isinstance(parts[layer], nn.Linear) and _dims(made, layer) != 2)
    ]


def _dims(made: Mapping[int, tuple[Tensor, str]], layer: str) -> int:
    """Dimensions of the output of ``layer``."""
    return next(int(tensor.dim()) for tensor, name in made.values() if name == layer)


@contextmanager
def _hooks(module: nn.Module, before: Any, after: Any, kinds: tuple[type[nn.Module], ...]) -> Iterator[None]:
    handles = []
    for name, part in module.named_modules():
        if type(part) in kinds:
            handles.append(part.register_forward_pre_hook(lambda _layer, args, name=name: before(name, args)))
            handles.append(part.register_forward_hook(lambda _layer, _args, output, name=name: after(name, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _outputs(module: nn.Module, example: Mapping[str, Tensor]) -> list[Tensor]:
    with evaluating(module):
        output = run(module, example)
    leaves = tree_leaves(list(output.values()) if isinstance(output, Mapping) else output)
    return [leaf.clone() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@dataclass
class Traffic:
    """How the layers of one forward pass are connected."""

    first: dict[str, str] = field(default_factory=dict)  # layer -> the layer that read the same tensor first
    dims: dict[str, int] = field(default_factory=dict)  # layer -> dimensions of what it reads
    exposed: set[str] = field(default_factory=set)  # layers whose output is read by something that does not round


class _Follower(TorchDispatchMode):  # type: ignore[misc]
    """Follows the outputs of layers through operations to whatever reads them."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """As in :mod:`compressor.models.structure.trace`: True would import all of dynamo."""
        return False

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic, self.inside = traffic, 0
        self.origin: dict[int, tuple[Tensor, frozenset[str]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.inside:
            return output
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        layers = frozenset[str]().union(*(self.origin[id(t)][1] for t in read if id(t) in self.origin))
        if not layers:
            return output
        if func._schema.name.removeprefix("aten::") in PASSING:
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor):
                    self.origin[id(leaf)] = (leaf, layers)
        else:
            self.traffic.exposed |= layers
        return output


def traffic_of(module: nn.Module, example: Mapping[str, Tensor]) -> Traffic:
    """Follow one forward pass. Layers that do not run in it are in no field."""
    traffic = Traffic()
    follower = _Follower(traffic)
    readers: dict[int, tuple[Tensor, str]] = {}

    def before(name: str, args: Any) -> None:
        follower.inside += 1
        if args and isinstance(args[0], Tensor):
            traffic.first.setdefault(name, readers.setdefault(id(args[0]), (args[0], name))[1])
            traffic.dims.setdefault(name, args[0].dim())

    def after(name: str, output: Any) -> None:
        follower.inside -= 1
        if isinstance(output, Tensor):
            follower.origin[id(output)] = (output, frozenset({name}))

    with evaluating(module), _hooks(module, before, after, tuple(KINDS)), follower:
        run(module, example)
    return traffic
