"""Deterministic augmentation: what a sample looks like depends on (seed, sample, view) and nothing else.

So a teacher's outputs can be cached per view, and a resumed run sees what an undisturbed one sees. Vectorised over the
batch; random numbers come from a counter-based generator (SplitMix64, Steele et al. 2014), one stream a sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from compressor.types import Array

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 0xFFFFFFFFFFFFFFFF
SMALL_PIXELS = 16  # pictures up to this size (8x8 digits) shift by one pixel, larger ones by two
ERASED_SIDE = 3  # an erased square has a third of the picture's shorter side
ERASE_PROBABILITY = 0.5
DROP_PROBABILITY = 0.1  # of a token
MASK_PROBABILITY = 0.15  # of a token


def augment(
    inputs: Mapping[str, Tensor],
    names: Sequence[str],
    positions: Array,
    view: int,
    seed: int,
    mask_id: int | None = None,
) -> dict[str, Tensor]:
    """Apply the named augmentations to a batch of model inputs.

    Args:
        inputs: pictures float (B, C, H, W) or (B, H, W, C); tokens int64 (B, T) with an ``attention_mask``.
        names: of ``flip shift erase token-drop mask``; those that do not fit an input leave it alone.
        positions: int64 (B,), position of each sample in the training set.
        view: which fixed view.
        seed: of the augmentation.
        mask_id: the token that stands for a hidden one, for ``mask``.
    """
    found = dict(inputs)
    if not names:
        return found
    for name, tensor in inputs.items():
        if tensor.dim() == 4 and tensor.is_floating_point():
            found[name] = _picture(tensor, names, uniforms(seed, positions, view, 6))
    if "token-drop" in names and "attention_mask" in inputs:
        found.update(_drop_tokens(inputs, positions, view, seed))
    if "mask" in names and mask_id is not None and "attention_mask" in inputs:
        u = uniforms(seed ^ 0x6D61736B, positions, view, inputs["attention_mask"].shape[1])
        hide = torch.from_numpy((u < MASK_PROBABILITY) & ~_special(inputs))
        found["input_ids"] = torch.where(hide, mask_id, inputs["input_ids"])
    return found


def uniforms(seed: int, positions: Array, view: int, count: int) -> Array:
    """float32 (B, count) in [0, 1): the first ``count`` numbers of each sample's stream for this view."""
    start = _mix_scalar((seed * _GOLDEN + view * 0xD1B54A32D192ED03 + 1) & _WORD)
    stream = _mix(positions.astype(np.uint64) + np.uint64(start))
    counters = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    bits = _mix(stream[:, None] + counters[None])
    return ((bits >> np.uint64(40)).astype(np.float32)) * np.float32(2**-24)


def _mix(x: Array) -> Array:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = x ^ (x >> np.uint64(31))
    return mixed


def _mix_scalar(x: int) -> int:
    return int(_mix(np.array([x], dtype=np.uint64))[0])


def _picture(pictures: Tensor, names: Sequence[str], u: Array) -> Tensor:
    """Flip and shift by one gather of rows and columns (the border repeats); erase with the picture's mean."""
    channels_last = pictures.shape[-1] in (1, 3, 4) and pictures.shape[1] not in (1, 3, 4)
    x = pictures.permute(0, 3, 1, 2) if channels_last else pictures
    height, width = int(x.shape[2]), int(x.shape[3])
    rows = np.broadcast_to(np.arange(height), (len(u), height))
    columns = np.broadcast_to(np.arange(width), (len(u), width))
    if "flip" in names:
        columns = np.where(u[:, :1] < 0.5, columns[:, ::-1], columns)
    if "shift" in names:
        reach = 1 if min(height, width) <= SMALL_PIXELS else 2
        steps = np.floor(u[:, 1:3] * (2 * reach + 1)).astype(np.int64) - reach
        # a shift moves the place that is read; clipping repeats the border, whatever its normalised value is
        rows = np.clip(rows + steps[:, :1], 0, height - 1)
        columns = np.take_along_axis(columns, np.clip(np.arange(width) + steps[:, 1:], 0, width - 1), axis=1)
    if "flip" in names or "shift" in names:
        sample = torch.arange(len(u))[:, None, None]
        y, z = torch.from_numpy(rows.copy())[:, :, None], torch.from_numpy(columns.copy())[:, None, :]
        x = x.permute(0, 2, 3, 1)[sample, y, z].permute(0, 3, 1, 2)
    if "erase" in names:
        x = _erase(x, u[:, 3:6])
    x = x.permute(0, 2, 3, 1) if channels_last else x
    return x.contiguous()


def _erase(x: Tensor, u: Array) -> Tensor:
    height, width = int(x.shape[2]), int(x.shape[3])
    side = max(1, min(height, width) // ERASED_SIDE)
    top = np.floor(u[:, :1] * (height - side + 1))
    left = np.floor(u[:, 1:2] * (width - side + 1))
    rows, columns = np.arange(height)[None], np.arange(width)[None]
    inside = ((rows >= top) & (rows < top + side))[:, :, None] & ((columns >= left) & (columns < left + side))[
        :, None, :
    ]
    inside &= (u[:, 2] < ERASE_PROBABILITY)[:, None, None]
    return torch.where(torch.from_numpy(inside)[:, None], x.mean(dim=(2, 3), keepdim=True), x)


def _drop_tokens(inputs: Mapping[str, Tensor], positions: Array, view: int, seed: int) -> dict[str, Tensor]:
    """Delete random tokens and close the gaps.

    The ids of the first and last real token of each sample ([CLS], [SEP]) are special: they stay wherever they occur,
    and so does everything in a sample with fewer than four real tokens.
    """
    mask = inputs["attention_mask"].numpy() != 0
    batch, length = mask.shape
    u = uniforms(seed ^ 0x746F6B656E, positions, view, length)
    keep = u >= DROP_PROBABILITY
    ids = inputs.get("input_ids")
    if ids is not None:
        tokens, rows = ids.numpy(), np.arange(batch)
        first, last = mask.argmax(1), length - 1 - mask[:, ::-1].argmax(1)
        keep |= np.isin(tokens, np.unique(np.concatenate([tokens[rows, first], tokens[rows, last]])))
    keep |= (mask.sum(1) < 4)[:, None]
    keep &= mask
    order = np.argsort(~keep, axis=1, kind="stable")  # kept tokens first, in their order; the rest becomes padding
    longest = max(1, int(keep.sum(1).max()))
    gather = torch.from_numpy(order[:, :longest].copy())
    real = torch.from_numpy(np.arange(longest)[None] < keep.sum(1)[:, None])
    padding = {name: _padding(tensor, mask) for name, tensor in inputs.items()}
    return {
        name: torch.where(real, tensor.gather(1, gather), padding[name])
        for name, tensor in inputs.items()
        if tensor.dim() == 2 and tensor.shape == mask.shape
    }


def _special(inputs: Mapping[str, Tensor]) -> Array:
    """(B, T) true at padding and at tokens like the first or last one of a sample ([CLS], [SEP])."""
    mask, tokens = inputs["attention_mask"].numpy() != 0, inputs["input_ids"].numpy()
    rows, length = np.arange(len(mask)), mask.shape[1]
    first, last = mask.argmax(1), length - 1 - mask[:, ::-1].argmax(1)
    ends = np.unique(np.concatenate([tokens[rows, first], tokens[rows, last]]))
    found: Array = np.isin(tokens, ends) | ~mask
    return found


def _padding(tensor: Tensor, mask: Array) -> Tensor:
    """The value this input has at padding: seen in the batch, otherwise 0."""
    places = np.argwhere(~mask)
    zero = torch.zeros((), dtype=tensor.dtype)
    if len(places) == 0 or tuple(tensor.shape) != mask.shape:
        return zero
    return tensor[int(places[0][0]), int(places[0][1])].clone()
