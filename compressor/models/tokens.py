"""Tokens that go no further: after a block the k highest-scored tokens stay, the rest leaves the network. Needs torch.

A ``tokens`` step of a record puts one :class:`TokenDrop` into a student and hooks around its blocks. Scores are what
the first token (CLS) attends to, averaged over heads, or the norm of the hidden states; the first token always stays,
and masked tokens (padding) go first. ``k`` is a constant, so that a file has a TopK and a Gather with sizes that a
compiler knows; of a text shorter than ``k`` everything stays.

EET (methods K1) keeps 98, 49 and 12 of 196 patches by what CLS attends to, as
Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations", ICLR 2022.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.models.signals import Attention, structure_of

Path = tuple[str, ...]
NAME = "token_drop"  # of the part in the student
MASKED = -1.0  # below every score: probabilities and norms are not negative


class TokenDrop(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """What the hooks of one student share: how many tokens stay after which block, and the state of a forward pass.

    ``seen`` holds ``mask`` (B, T), the attention mask of the tokens that are left, and ``index`` (B, T): which of the
    model's own tokens these are. No parameters.
    """

    def __init__(self, score: str) -> None:
        super().__init__()
        self.score = score
        self.seen: dict[str, Any] = {}


def cls_attention(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """How much the first token attends to each, mean over heads: (B, heads, T, d) twice, mask (B, T) -> (B, T)."""
    scores = query[:, :, :1] @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None, :] == 0, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1).mean(dim=(1, 2))


def choose(scores: Tensor, mask: Tensor | None, keep: int) -> Tensor:
    """Positions (B, min(keep, T)) of the highest scores (B, T), highest first: the first token, real ones, masked ones.

    >>> choose(torch.tensor([[0.1, 0.5, 0.2, 0.9]]), torch.tensor([[1, 1, 1, 0]]), 3)
    tensor([[0, 1, 2]])
    """
    if mask is not None:
        scores = torch.where(mask != 0, scores, torch.full_like(scores, MASKED))
    first = torch.full_like(scores[:, :1], torch.finfo(scores.dtype).max)
    ranked = torch.cat([first, scores[:, 1:]], dim=1)
    return torch.topk(ranked, torch.sym_min(keep, ranked.shape[1]), dim=1).indices


def take(tensor: Tensor, axis: int, index: Tensor) -> Tensor:
    """Positions ``index`` (B, k) of an axis (not the first), other ones for each sample; a first axis of 1 is repeated.

    Rows of the flattened tensor are selected, which is a plain Gather in ONNX.
    """
    batch, count = index.shape
    moved = tensor.movedim(axis, 1)
    if moved.shape[0] == 1:
        moved = moved.expand(batch, *moved.shape[1:])
    rows, rest = moved.shape[1], moved.shape[2:]
    start = torch.arange(batch, device=index.device)[:, None] * rows
    flat = moved.reshape(batch * rows, *rest).index_select(0, (index + start).reshape(-1))
    return flat.reshape(batch, count, *rest).movedim(1, axis)


class _Begin:
    """Hooks are objects, not closures: a deep copy of the student gets hooks on its own state."""

    def __init__(self, drop: TokenDrop) -> None:
        self.drop = drop

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        self.drop.seen.clear()
        self.drop.seen["mask"] = given.get("attention_mask", kwargs.get("attention_mask"))


class _Projection:
    """Remembers the output of one projection of the block whose tokens are scored."""

    def __init__(self, drop: TokenDrop, key: str) -> None:
        self.drop, self.key = drop, key

    def __call__(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self.drop.seen[self.key] = output


class _After:
    """Drops tokens from a block's output."""

    def __init__(self, drop: TokenDrop, keep: int, attention: Attention | None) -> None:
        self.drop, self.keep, self.attention = drop, keep, attention

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        seen = self.drop.seen
        index = choose(self._scores(hidden), seen["mask"], self.keep)
        if seen["mask"] is not None:
            seen["mask"] = take(seen["mask"], 1, index)
        before = seen.get("index")
        seen["index"] = index if before is None else take(before, 1, index)
        left = take(hidden, 1, index)
        return (left, *output[1:]) if isinstance(output, tuple) else left

    def _scores(self, hidden: Tensor) -> Tensor:
        if self.attention is None:
            return hidden.norm(dim=-1)
        query, key = projected(self.attention, self.drop.seen)
        return cls_attention(query, key, self.drop.seen["mask"])


class _Before:
    """Gives a later reader the rows of its other arguments that belong to the tokens that are left."""

    def __init__(self, drop: TokenDrop, axes: Mapping[Path, Sequence[int]], length: int | None) -> None:
        self.drop, self.axes, self.length = drop, dict(axes), length

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        index = self.drop.seen.get("index")
        if index is None:
            return None
        axes = self.axes if self.length is None else of_length(leaves(args, kwargs), self.length)
        found: dict[str, Any] = {**{str(number): value for number, value in enumerate(args)}, **kwargs}
        for path, where in axes.items():
            if path[0] in found:
                found[path[0]] = _replaced(found[path[0]], path[1:], where, index)
        return tuple(found[str(number)] for number in range(len(args))), {name: found[name] for name in kwargs}


def of_length(call: Mapping[Path, Tensor], length: int) -> dict[Path, list[int]]:
    """Axes of this length of a call's tensors, apart from the first tensor (the hidden states) and the first axis."""
    others = list(call.items())[1:]
    return {path: [axis for axis in range(1, x.dim()) if x.shape[axis] == length] for path, x in others}


def _replaced(value: Any, path: Path, axes: Sequence[int], index: Tensor) -> Any:
    if path:
        return type(value)(_replaced(v, path[1:], axes, index) if str(i) == path[0] else v for i, v in enumerate(value))
    if not isinstance(value, Tensor):
        return value
    for axis in axes:
        if value.shape[axis] != 1:  # a mask of rows or columns alone is the same for the axis that it lacks
            value = take(value, axis, index)
    return value


def leaves(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Path, Tensor]:
    """Every tensor of a call by its path: ``("1",)``, ``("attention_mask",)``, ``("position_embeddings", "0")``."""
    found: dict[Path, Tensor] = {}

    def walk(value: Any, path: Path) -> None:
        if isinstance(value, Tensor):
            found[path] = value
        elif isinstance(value, tuple | list):
            for number, part in enumerate(value):
                walk(part, (*path, str(number)))

    walk(args, ())
    for name, value in kwargs.items():
        walk(value, (name,))
    return found


def projected(attention: Attention, seen: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, heads, T, d) from what the projections of an attention gave."""
    outputs = [seen[name] for name in attention.projections[:2]]
    if len(outputs) == 1:
        outputs = list(outputs[0].chunk(3, dim=-1))[:2]
    size = attention.head_size(outputs[0].shape[-1])
    query, key = (output.unflatten(-1, (-1, size)).transpose(1, 2) for output in outputs)
    return query, key


def attention_in(module: nn.Module, block: str) -> Attention | None:
    """The one attention of a block, or None: there is none, or several."""
    inside = [a for a in structure_of(module).attentions if a.path == block or a.path.startswith(f"{block}.")]
    return inside[0] if len(inside) == 1 else None


def add_drops(student: nn.Module, step: Mapping[str, Any]) -> TokenDrop:
    """Carry out a ``tokens`` step.

    ``score``: ``attention`` or ``norm``; ``drops``: ``{"block": path, "keep": k}``, in order; ``readers``: path of a
    module -> which axes of its arguments follow the tokens, ``[{"argument": ["attention_mask"], "axes": [3]}]``;
    ``length``: where every sample has as many tokens, that number, which tells these axes instead.
    """
    if hasattr(student, NAME):
        raise ValueError("the model drops tokens already")
    blocks = [(student.get_submodule(item["block"]), item) for item in step["drops"]]
    readers = {path: student.get_submodule(path) for path in step["readers"]}
    drop = TokenDrop(str(step["score"]))
    attentions = [attention_in(student, item["block"]) if drop.score == "attention" else None for _, item in blocks]
    if drop.score == "attention" and None in attentions:
        raise ValueError("a block has no attention to score tokens by")
    student.add_module(NAME, drop)
    student.register_forward_pre_hook(_Begin(drop), with_kwargs=True)
    for (block, item), attention in zip(blocks, attentions, strict=True):
        if attention is not None:
            for name in attention.projections[:2]:
                getattr(attention.module, name).register_forward_hook(_Projection(drop, name))
        block.register_forward_hook(_After(drop, int(item["keep"]), attention))
    for path, reader in readers.items():
        axes = {tuple(item["argument"]): item["axes"] for item in step["readers"][path]}
        reader.register_forward_pre_hook(_Before(drop, axes, step.get("length")), with_kwargs=True)
    return drop


__all__ = ["NAME", "TokenDrop", "add_drops", "attention_in", "choose", "cls_attention", "leaves", "take"]
