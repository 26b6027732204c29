"""Two small layers in place of one large: W of rank r is B A, with A (r, in) and B (out, r). Needs torch.

Source: the singular value decomposition gives the best approximation of a rank (Eckart and Young, 1936); with the
second moment S = L L^T of the layer's inputs, the decomposition of W L gives the best of its outputs (SVD-LLM, Wang et
al., 2024, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from compressor.models.structure.trace import evaluating, run

DAMPING = 1e-6  # of the mean of the diagonal: the second moment of few samples is singular


class LowRankLinear(nn.Sequential):  # type: ignore[misc]  # torch is not followed by mypy
    """(..., in) -> (..., out) through ``rank`` values. ``in_features`` and ``out_features`` are those of the pair."""

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool) -> None:
        super().__init__(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))

    @property
    def in_features(self) -> int:
        return int(self[0].in_features)

    @property
    def out_features(self) -> int:
        return int(self[1].out_features)


class LowRankEmbedding(nn.Sequential):  # type: ignore[misc]  # torch is not followed by mypy
    """Ids (...) -> (..., width) through ``rank`` values."""

    def __init__(self, rows: int, width: int, rank: int, padding: int | None) -> None:
        super().__init__(nn.Embedding(rows, rank, padding_idx=padding), nn.Linear(rank, width, bias=False))

    @property
    def num_embeddings(self) -> int:
        return int(self[0].num_embeddings)

    @property
    def embedding_dim(self) -> int:
        return int(self[1].out_features)


def is_transposed(layer: nn.Module) -> bool:
    """Transformers' Conv1D keeps its weight as (in, out)."""
    return hasattr(layer, "nx") and hasattr(layer, "nf")


def matrix_of(layer: nn.Module) -> Tensor:
    """The weight as (out, in); of an embedding (width, rows)."""
    weight: Tensor = layer.weight.detach()
    return weight.T if isinstance(layer, nn.Embedding) or is_transposed(layer) else weight


def largest_saving_rank(rows: int, columns: int) -> int:
    """The largest rank with fewer weights than the whole matrix.

    >>> largest_saving_rank(384, 1536)
    307
    """
    return math.ceil(rows * columns / (rows + columns)) - 1


def factorise(module: nn.Module, path: str, rank: int, moment: Tensor | None = None) -> None:
    """Replace the layer at ``path`` in place by two of rank ``rank``; ``moment`` (in, in) is that of its inputs."""
    layer = module.get_submodule(path)
    matrix = matrix_of(layer)
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"`{path}` has rank {min(matrix.shape)} at most, not {rank}")
    first, second = factors(matrix, rank, moment)
    made: nn.Sequential
    if isinstance(layer, nn.Embedding):
        width, rows = matrix.shape  # not the attributes: a cut of the same record may not have told them yet
        made = LowRankEmbedding(rows, width, rank, layer.padding_idx)
        first = first.T
    else:
        outputs, inputs = matrix.shape
        made = LowRankLinear(inputs, outputs, rank, layer.bias is not None)
        if layer.bias is not None:
            made[1].bias.data.copy_(layer.bias.detach())
    made.to(layer.weight)
    made[0].weight.data.copy_(first)
    made[1].weight.data.copy_(second)
    holder, _, local = path.rpartition(".")
    module.get_submodule(holder)._modules[local] = made.train(layer.training)


def factors(matrix: Tensor, rank: int, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(rank, in) and (out, rank) whose product is the best approximation of ``matrix`` (out, in)."""
    whole = matrix.double()
    root = _root(moment) if moment is not None else None
    left, values, right = torch.linalg.svd(whole if root is None else whole @ root, full_matrices=False)
    scale = values[:rank].sqrt()
    second, first = left[:, :rank] * scale, scale[:, None] * right[:rank]
    if root is not None:
        first = torch.linalg.solve_triangular(root, first, upper=False, left=False)
    return first.to(matrix.dtype), second.to(matrix.dtype)


def _root(moment: Tensor) -> Tensor:
    """Lower triangular L with L L^T = moment."""
    whole = moment.double()
    damping = DAMPING * whole.diagonal().mean().clamp_min(1e-12)
    return torch.linalg.cholesky(whole + damping * torch.eye(len(whole), dtype=whole.dtype))


def energies(layer: nn.Module, moment: Tensor | None = None) -> Tensor:
    """Share of the squared singular values that the first r hold, for r = 1 ... (min(out, in),)."""
    matrix = matrix_of(layer).double()
    values = torch.linalg.svdvals(matrix if moment is None else matrix @ _root(moment)).square()
    return values.cumsum(0) / values.sum().clamp_min(1e-30)


def second_moments(
    module: nn.Module, paths: Iterable[str], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Mean of x x^T over the inputs of each linear layer, (in, in), without padding. Memory does not grow with the
    batches."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    mask: list[Tensor | None] = [None]

    def watch(path: str) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            data, real = args[0].detach(), mask[0]
            fits = real is not None and data.dim() == 3 and real.shape == data.shape[:2]
            rows = (data[real.bool()] if real is not None and fits else data.flatten(0, -2)).double()
            sums[path] = sums[path] + rows.T @ rows if path in sums else rows.T @ rows
            counts[path] = counts.get(path, 0) + len(rows)

        return module.get_submodule(path).register_forward_pre_hook(hook)

    handles = [watch(path) for path in paths]
    try:
        with evaluating(module):
            for batch in batches:
                mask[0] = batch.get("attention_mask")
                run(module, batch)
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
    return {path: total / max(counts[path], 1) for path, total in sums.items()}
