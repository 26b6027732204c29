"""Orthogonal matching pursuit for many targets at once. Needs torch.

Pati, Rezaiifar, Krishnaprasad, "Orthogonal Matching Pursuit", Asilomar 1993: the atom with the largest absolute inner
product with the residual joins, the residual is projected anew. A QR factorisation of the chosen atoms grows by one
column a step (Gram-Schmidt, twice: once loses orthogonality in float32), coefficients come from one triangular solve.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOATS = 2**25  # at a time, 128 MiB of float32
DEPENDENT = 1e-5  # an atom of which less than this share lies outside the chosen ones adds nothing


@dataclass(frozen=True)
class Sparse:
    """Each target as a combination of few atoms: ``atoms`` (N, k) int64, ``weights`` (N, k), ``norms`` (N, k): of the
    residual after each step; they never grow."""

    atoms: Tensor
    weights: Tensor
    norms: Tensor

    def combine(self, rows: Tensor) -> Tensor:
        """The same combinations of other rows (S, ...) -> (N, ...), batch by batch."""
        width = max(1, rows[0].numel()) * self.atoms.shape[1]
        size = max(1, FLOATS // width)
        parts = []
        for start in range(0, len(self.atoms), size):
            chosen = (
                rows[self.atoms[start : start + size]].flatten(2)
                if rows.dim() > 1
                else rows[self.atoms[start : start + size]][..., None]
            )
            made = torch.einsum("nk,nkd->nd", self.weights[start : start + size].to(rows.dtype), chosen)
            parts.append(made.reshape(-1, *rows.shape[1:]))
        return torch.cat(parts) if parts else rows[:0]


def pursue(targets: Tensor, dictionary: Tensor, count: int) -> Sparse:
    """``count`` atoms for each target: targets (N, d), dictionary (S, d). Memory does not grow with N or S together."""
    count = min(count, len(dictionary))
    size = max(1, FLOATS // (len(dictionary) + count * (targets.shape[1] + count)))
    found = [
        _pursue(targets[start : start + size].float(), dictionary.float(), count)
        for start in range(0, len(targets), size)
    ]
    if not found:
        empty = targets.new_zeros(0, count, dtype=torch.float32)
        return Sparse(empty.long(), empty, empty)
    atoms, weights, norms = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Sparse(atoms, weights, norms)


def _pursue(targets: Tensor, dictionary: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = targets.shape
    q, r = targets.new_zeros(rows, count, width), targets.new_zeros(rows, count, count)
    chosen = torch.zeros(rows, count, dtype=torch.long)
    norms = targets.new_zeros(rows, count)
    residual, each = targets.clone(), torch.arange(rows)
    for step in range(count):
        match = (residual @ dictionary.T).abs_()
        if step:
            match.scatter_(1, chosen[:, :step], -1.0)
        chosen[:, step] = match.argmax(dim=1)
        atom = dictionary[chosen[:, step]]
        rest, inside = atom, r.new_zeros(rows, step)
        for _ in range(2):
            part = torch.einsum("nkd,nd->nk", q[:, :step], rest)
            rest = rest - torch.einsum("nk,nkd->nd", part, q[:, :step])
            inside = inside + part
        length = rest.norm(dim=1)
        new = length > DEPENDENT * atom.norm(dim=1).clamp_min(1e-30)
        q[:, step] = torch.where(new[:, None], rest / length.clamp_min(1e-30)[:, None], 0.0)
        r[each, :step, step] = inside
        r[each, step, step] = torch.where(new, length, 1.0)
        residual = residual - q[:, step] * (q[:, step] * residual).sum(1, keepdim=True)
        norms[:, step] = residual.norm(dim=1)
    right = torch.einsum("nkd,nd->nk", q, targets)
    weights = torch.linalg.solve_triangular(r, right[..., None], upper=True)[..., 0]
    return chosen, weights, norms


__all__ = ["Sparse", "pursue"]
