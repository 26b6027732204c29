"""Bring a student's and a teacher's features to one shape: width by a learned projection, map size by pooling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import StageError


def width(feature: Tensor) -> int:
    """Channels of a map (B, C, H, W), otherwise the last axis of tokens (B, T, d) or vectors (B, d)."""
    return int(feature.shape[1] if feature.dim() == 4 else feature.shape[-1])


def projection(student: Tensor, teacher: Tensor, allowed: bool, generator: torch.Generator, what: str) -> nn.Module:
    """A linear map (1x1 convolution for feature maps) from the student's width to the teacher's; identity when equal.

    Weights are drawn from ``generator`` (uniform, +-1/sqrt(inputs)), so that projectors have a seed of their own.
    """
    if (student.dim() == 4) != (teacher.dim() == 4):
        raise StageError(
            f"{what}: a feature map {tuple(student.shape)} cannot be matched with {tuple(teacher.shape)}",
            hint="Match signals of the same kind: maps with maps, tokens with tokens.",
        )
    inputs, outputs = width(student), width(teacher)
    if inputs == outputs:
        return nn.Identity()
    if not allowed:
        raise StageError(
            f"{what}: the student is {inputs} wide and the teacher {outputs}",
            hint='Set proj = "linear" in the match, or choose an objective that does not compare widths.',
        )
    layer = nn.Conv2d(inputs, outputs, 1) if student.dim() == 4 else nn.Linear(inputs, outputs)
    bound = inputs**-0.5
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2 * bound - bound)
    return layer


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Pool the larger of two feature maps to the smaller one's height and width; other shapes pass through."""
    if student.dim() != 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = tuple(min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True))
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)


def pooled(feature: Tensor, mask: Tensor | None) -> Tensor:
    """One float32 vector a sample: spatial mean of maps, mean over real tokens, vectors as they are."""
    feature = feature.float()
    if feature.dim() == 4:
        return feature.mean(dim=(2, 3))
    if feature.dim() != 3:
        return feature
    if mask is None:
        return feature.mean(dim=1)
    keep = (mask != 0).unsqueeze(-1).to(feature.dtype)
    return (feature * keep).sum(1) / keep.sum(1).clamp_min(1)


def sum_over_valid(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """Sum and count of per-token values (B, T) at real tokens, or of per-sample values (B,)."""
    if values.dim() == 2 and mask is not None:
        keep = mask != 0
        return torch.where(keep, values, 0).sum(), keep.sum()
    return values.sum(), float(values.numel())
