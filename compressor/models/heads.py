"""Heads that the tool puts into a student, and how a record rebuilds them. Needs torch.

A head is installed by a record step (``head`` or ``exits``), trained where it stands, and either stays for good or is
taken out again. One that exists for training only says so (``training_only``), and the export refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = 100.0  # of the normalised head (Kang et al., DHO, 2025, methods D1: repository default)


class Head(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """A part that the tool made. ``signals`` names what can be read of it: signal -> path inside ("" is its output)."""

    training_only = False

    def signals(self) -> Mapping[str, str]:
        return {}


class SubclassHead(Head):
    """C classes of S subclasses each: (B, d) -> (B, C), the log of the summed subclass weights.

    Signal ``subclasses``: (B, C * S). ``softmax`` of the output is the sum of the subclasses' softmax.
    """

    def __init__(self, width: int, classes: int, subclasses: int) -> None:
        super().__init__()
        self.classes, self.subclasses = classes, subclasses
        self.outputs = nn.Linear(width, classes * subclasses)

    @classmethod
    def of(cls, plain: nn.Linear, subclasses: int) -> Self:
        """A head with the same output as ``plain``: equal subclasses, each with 1/S of its class's weight."""
        classes, width = plain.weight.shape  # the layer's own numbers may be stale while a record is replayed
        made = cls(width, classes, subclasses)
        with torch.no_grad():
            made.outputs.weight.copy_(plain.weight.repeat_interleave(subclasses, 0))
            bias = plain.bias if plain.bias is not None else plain.weight.new_zeros(classes)
            made.outputs.bias.copy_((bias - torch.tensor(float(subclasses)).log()).repeat_interleave(subclasses))
        made.to(plain.weight)
        return made

    def signals(self) -> Mapping[str, str]:
        return {"subclasses": "outputs"}

    def forward(self, feature: Tensor) -> Tensor:
        found = self.outputs(feature)
        return found if self.subclasses == 1 else torch.logsumexp(found.unflatten(-1, (self.classes, -1)), dim=-1)


class DualHead(Head):
    """A head for the labels and one for the teacher, mixed: (B, d) -> (B, C) log probabilities.

    ``log(mix * softmax(labelled(f)) + (1 - mix) * softmax(100 * taught(f / |f|) / temperature))``. Signals
    ``labelled`` and ``taught``: the two heads' logits (B, C).
    """

    mix: Tensor
    temperature: Tensor

    def __init__(self, width: int, classes: int, bias: bool) -> None:
        super().__init__()
        self.taught = Normalised(width, classes)
        self.labelled = nn.Linear(width, classes, bias=bias)  # last, so that `pooled` is what it reads
        self.register_buffer("mix", torch.tensor(0.5))
        self.register_buffer("temperature", torch.tensor(0.5))

    @classmethod
    def of(cls, plain: nn.Linear) -> Self:
        """Both heads start from ``plain``: the second gives its outputs for features of root mean square 1."""
        classes, width = plain.weight.shape  # as above
        made = cls(width, classes, plain.bias is not None)
        made.labelled = plain
        with torch.no_grad():
            made.taught.weight.copy_(plain.weight * width**0.5 / SCALE)
        made.to(plain.weight)
        return made

    def signals(self) -> Mapping[str, str]:
        return {"labelled": "labelled", "taught": "taught"}

    def forward(self, feature: Tensor) -> Tensor:
        return self.mixed(self.labelled(feature), self.taught(feature), self.mix, self.temperature)

    @staticmethod
    def mixed(labelled: Tensor, taught: Tensor, mix: Tensor, temperature: Tensor) -> Tensor:
        """Log of the mixed probabilities."""
        tiny = torch.finfo(torch.float32).tiny
        first = F.log_softmax(labelled, dim=-1) + mix.clamp_min(tiny).log()
        second = F.log_softmax(taught / temperature, dim=-1) + (1 - mix).clamp_min(tiny).log()
        return torch.logsumexp(torch.stack([first, second]), dim=0)


class Normalised(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """``100 * W f / |f|``: (B, d) -> (B, C)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, width))

    def forward(self, feature: Tensor) -> Tensor:
        return SCALE * F.linear(F.normalize(feature, dim=-1), self.weight)


class ProjectedPooling(Head):
    """The pooled vector through a dense layer and tanh: (B, T, d) -> (B, k). Signal ``projected``: its output."""

    def __init__(self, pooling: nn.Module, width: int, size: int, tanh: bool) -> None:
        super().__init__()
        self.pooling, self.tanh = pooling, tanh
        self.dense = nn.Linear(width, size)

    def signals(self) -> Mapping[str, str]:
        return {"projected": ""}

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        found = self.dense(self.pooling(hidden, attention_mask))
        return torch.tanh(found) if self.tanh else found


class Exits(Head):
    """Exit heads at blocks of a student; the student carries it as ``exits``. Signals ``exit[i]``: logits (B, C).

    ``mode``: ``training`` (the student still returns its own output alone), ``outputs`` (its output and each exit's),
    or the number of the exit whose output is the student's; what only later blocks compute is then not exported.
    """

    def __init__(self, widths: Sequence[int], classes: int, mode: str | int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, classes) for width in widths)
        self.mode = mode
        self.seen: dict[Any, Any] = {}

    @property
    def training_only(self) -> bool:  # type: ignore[override]
        return self.mode == "training"

    def signals(self) -> Mapping[str, str]:
        return {f"exit[{i}]": f"heads.{i}" for i in range(len(self.heads))}


def pooled(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """(B, d): the spatial mean of maps, the mean over real tokens, vectors as they are."""
    if hidden.dim() == 4:
        return hidden.mean(dim=(2, 3))
    if hidden.dim() != 3:
        return hidden
    if mask is None:
        return hidden.mean(dim=1)
    keep = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * keep).sum(1) / keep.sum(1).clamp(min=1.0)


class _Hook:
    """Hooks are objects, not closures: a deep copy of the student gets hooks on its own exits."""

    def __init__(self, exits: Exits, index: int = 0) -> None:
        self.exits, self.index = exits, index


class _Begin(_Hook):
    def __call__(self, _module: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
        self.exits.seen.clear()
        self.exits.seen["mask"] = kwargs.get("attention_mask")


class _Block(_Hook):
    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen = self.exits.seen
        seen[self.index] = self.exits.heads[self.index](pooled(hidden, seen.get("mask")))


class _End(_Hook):
    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        seen, mode = dict(self.exits.seen), self.exits.mode
        self.exits.seen.clear()
        if mode == "training":
            return None
        if mode == "outputs":
            return (output, *(seen[i] for i in range(len(self.exits.heads))))
        return seen[mode]


def add_exits(student: nn.Module, step: Mapping[str, Any]) -> Exits:
    """Carry out an ``exits`` step: ``blocks`` (module paths), ``widths``, ``classes``, ``mode``."""
    blocks = [student.get_submodule(path) for path in step["blocks"]]
    exits = Exits(step["widths"], int(step["classes"]), step["mode"])
    student.add_module("exits", exits)
    student.register_forward_pre_hook(_Begin(exits), with_kwargs=True)
    for index, block in enumerate(blocks):
        block.register_forward_hook(_Block(exits, index))
    student.register_forward_hook(_End(exits))
    return exits


def remove_exits(student: nn.Module) -> None:
    """Take the exits of a student out, with their hooks."""
    for part in student.modules():
        for table in (part._forward_hooks, part._forward_pre_hooks):
            for key in [key for key, hook in table.items() if isinstance(hook, _Hook)]:
                del table[key]
                part._forward_pre_hooks_with_kwargs.pop(key, None)
    del student._modules["exits"]


def replace_head(student: nn.Module, step: Mapping[str, Any]) -> nn.Module:
    """Carry out a ``head`` step: ``module`` (path), ``kind`` and the kind's own numbers."""
    path, kind = str(step["module"]), step["kind"]
    old = student.get_submodule(path)
    made: nn.Module
    if kind in ("subclass", "dual"):
        if not isinstance(old, nn.Linear):
            raise ValueError(f"`{path}` is a {type(old).__name__}, not a linear head")
        made = SubclassHead.of(old, int(step["subclasses"])) if kind == "subclass" else DualHead.of(old)
    elif kind == "projection":
        made = ProjectedPooling(old, int(step["width"]), int(step["size"]), bool(step["tanh"]))
    else:
        raise ValueError(f"unknown head `{kind}`")
    parent, _, local = path.rpartition(".")
    holder = student.get_submodule(parent)
    holder._modules[local] = made.train(old.training)
    return made


def heads_of(module: nn.Module) -> dict[str, Head]:
    """The parts of a module that the tool made, by path."""
    return {path: part for path, part in module.named_modules() if isinstance(part, Head)}


def head_signals(module: nn.Module) -> dict[str, str]:
    """Signals of these parts: name -> module path."""
    return {
        name: f"{path}.{local}".rstrip(".")
        for path, part in heads_of(module).items()
        for name, local in part.signals().items()
    }


def path_of(module: nn.Module, part: nn.Module) -> str:
    """Where ``part`` stands in ``module``."""
    return next(str(path) for path, found in module.named_modules() if found is part)
