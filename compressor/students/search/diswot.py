"""DisWOT's score of a student before anything is trained (methods N1): is it like its teacher, both untrained?

score = -(L_ICKD + L_SP) with random Gaussian weights in both networks and one mini-batch:

- L_ICKD compares, class by class, the channel correlation of the class maps; the map of class c is the gradient g_c of
  cross-entropy with respect to row c of the classifier. E_c = g_c g_c^T with rows of unit length, d x d;
  L = sum over classes of ||E_c(S) - E_c(T)||^2 / (C d).
- L_SP compares which samples are alike: G = F F^T with rows of unit length, B x B, F the last feature maps;
  L = ||G(S) - G(T)||^2 / B^2.

Source: Dong et al., "DisWOT: Student Architecture Search for Distillation WithOut Training", 2023. Its weights are N(0,
1); here they are N(0, 2 / inputs), so that softmax and attention of deep networks without batch norm do not saturate:
both losses compare directions, which the scale of a layer does not change. The paper's feature maps come from a network
in training mode; so do these, without dropout.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import PlanError
from compressor.models.signals import SignalTap, available, structure_of
from compressor.models.structure.surgery import outputs_of
from compressor.search import Search

Batch = Mapping[str, Tensor]
NO_CLASSIFIER = '`ickd` needs a linear classifier at the end, and the model has none: give `terms = ["sp"]`'
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Seen:
    """What one untrained network shows on the mini-batch: class maps (C, d) and sample features (B, n)."""

    maps: Tensor | None
    features: Tensor


@dataclass(frozen=True)
class Score:
    """Terms by name, each a loss; the score is minus their sum, higher is better."""

    terms: Mapping[str, float]

    @property
    def value(self) -> float:
        return -sum(self.terms.values())

    @property
    def shown(self) -> str:
        parts = ", ".join(f"{name} {value:.4f}" for name, value in self.terms.items())
        return f"score {self.value:.4f} ({parts})"


def samples_loss(student: Tensor, teacher: Tensor) -> float:
    """L_SP of features (B, n) and (B, m).

    >>> samples_loss(torch.eye(2), torch.eye(2) * 3)
    0.0
    """
    grams = [F.normalize(x.flatten(1) @ x.flatten(1).T, dim=1) for x in (student.double(), teacher.double())]
    return float((grams[0] - grams[1]).square().sum() / len(student) ** 2)


def maps_loss(student: Tensor, teacher: Tensor) -> float:
    """L_ICKD of class maps (C, d), equally wide.

    Row i of a class's correlation is sign(g_i) g / |g|, so that ||E(S) - E(T)||^2 = n(S) + n(T) - 2 cos(g_S, g_T) sum_i
    sign(s_i) sign(t_i), n the channels that are not zero: no d x d matrix is made, and vocabularies fit.

    >>> maps_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]])), maps_loss(torch.eye(2), torch.eye(2))
    (0.4, 0.0)
    """
    student, teacher = student.double(), teacher.double()
    cosine = (F.normalize(student, dim=1) * F.normalize(teacher, dim=1)).sum(1)
    agree = (student.sign() * teacher.sign()).sum(1)
    there = (student != 0).sum(1) + (teacher != 0).sum(1)
    total = (there - 2 * cosine * agree).sum() / student.numel()
    return round(max(0.0, float(total)), 12)


def same_width(student: Tensor, teacher: Tensor, how: str, seed: int) -> tuple[Tensor, Tensor]:
    """Class maps of equal width.

    ``pad``: the narrower gets zeros. ``project``: the wider is multiplied with a random Gaussian matrix, its width by
    the other's, drawn from ``seed``.
    """
    narrow, wide = sorted((student.shape[1], teacher.shape[1]))
    if narrow == wide:
        return student, teacher
    if how == "pad":
        return F.pad(student, (0, wide - student.shape[1])), F.pad(teacher, (0, wide - teacher.shape[1]))
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(wide, narrow, generator=generator) / wide**0.5
    return tuple(x @ matrix if x.shape[1] == wide else x for x in (student, teacher))  # type: ignore[return-value]


def redraw(module: nn.Module, seed: int) -> None:
    """New Gaussian weights in place: N(0, 2 / inputs), N(0, 1) in embeddings, ones in norms, zero biases."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(part.weight) for part in module.modules() if _is_norm(part)}
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0 if id(parameter) in norms else 0.0)
                continue
            inputs = max(1, parameter.numel() // parameter.shape[0])
            scale = 1.0 if id(parameter) in tables else (2 / inputs) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._NormBase):
            part.reset_running_stats()


def _is_norm(part: nn.Module) -> bool:
    named = "norm" in type(part).__name__.lower() and isinstance(getattr(part, "weight", None), nn.Parameter)
    return named or (isinstance(part, NORMS) and part.weight is not None)


def look(module: nn.Module, batch: Batch, labels: Tensor, terms: Sequence[str]) -> Seen:
    """Run ``module`` once on the mini-batch, and backward into its classifier alone.

    ``labels``: int64 (B,), (B, T) for one a token, float (B, C) for several a sample.

    Raises:
        PlanError: `ickd` is wanted and no linear classifier makes the module's output.
    """
    head = structure_of(module).head if "ickd" in terms else None
    if "ickd" in terms and head is None:
        raise PlanError.single("search.terms", NO_CLASSIFIER)
    name = "hidden[-1]" if available(module).get("hidden") else "logits"
    with _untrained(module, head), SignalTap(module, [name, "logits"]) as tap, torch.enable_grad():
        seen = tap(batch)
        features = seen[name].detach().flatten(1)
        if head is None:
            return Seen(None, features)
        loss = _cross_entropy(seen["logits"].float(), labels)
        (gradient,) = torch.autograd.grad(loss, [head.weight], allow_unused=True)
    if gradient is None:
        raise PlanError.single("search.terms", NO_CLASSIFIER)
    # transformers' Conv1D keeps its weight turned: classes are its outputs
    return Seen(gradient.T if hasattr(head, "nf") else gradient, features)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)


@contextmanager
def _untrained(module: nn.Module, head: nn.Module | None) -> Iterator[None]:
    """Training mode without dropout; gradients for the classifier's weight only. Modes and gradients come back."""
    modes = {part: part.training for part in module.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        for parameter in wanted:
            parameter.requires_grad_(head is not None and parameter is head.weight)
        module.train()
        for part in module.modules():
            if isinstance(part, nn.modules.dropout._DropoutNd):
                part.eval()
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        for parameter, want in wanted.items():
            parameter.requires_grad_(want)


class Judge:
    """Scores candidates beside one teacher on one mini-batch. The teacher is redrawn on a copy, once a draw."""

    def __init__(self, teacher: nn.Module, batch: Batch, labels: Tensor, config: Search) -> None:
        self.batch, self.labels, self.config = batch, labels, config
        copied = copy.deepcopy(teacher)
        self._teacher = [self._look(copied, draw) for draw in range(config.draws)]

    def __call__(self, candidate: nn.Module) -> Score:
        """The mean over draws; the candidate's weights are overwritten."""
        totals: dict[str, float] = dict.fromkeys(self.config.terms, 0.0)
        for draw, taught in enumerate(self._teacher):
            own = self._look(candidate, draw)
            for name in totals:
                totals[name] += self._loss(name, own, taught, draw) / self.config.draws
        return Score(totals)

    def _look(self, module: nn.Module, draw: int) -> Seen:
        redraw(module, self._seed(draw))
        return look(module, self.batch, self.labels, self.config.terms)

    def _seed(self, draw: int) -> int:
        return 1000 * self.config.seed + draw

    def _loss(self, name: str, own: Seen, taught: Seen, draw: int) -> float:
        if name == "sp":
            return samples_loss(own.features, taught.features)
        assert own.maps is not None  # `problems_of` refuses models without a classifier
        assert taught.maps is not None
        return maps_loss(*same_width(own.maps, taught.maps, self.config.widths, self._seed(draw)))


def problems_of(module: nn.Module, example: Batch, config: Search) -> list[str]:
    """Why these terms cannot be had of ``module``; two samples of ``example`` are run."""
    if "ickd" not in config.terms:
        return []
    head, outputs = structure_of(module).head, outputs_of(module, example)
    classes = getattr(head, "out_features", getattr(head, "nf", -1))
    return [] if outputs and outputs[0].shape[-1] == classes else [NO_CLASSIFIER]


def labels_for(outputs: Any, given: Tensor | None) -> Tensor:
    """The mini-batch's labels where every sample has one; otherwise what the trained teacher says, its argmax."""
    found: Tensor = outputs.argmax(-1)
    if given is None:
        return found
    if given.dim() == 2 and given.is_floating_point():
        return given if bool((given >= 0).all()) else (outputs > 0).float()
    if given.shape == found.shape and given.dim() == 1 and bool((given >= 0).all()):
        return given.long()
    return found


__all__ = [
    "Judge", "Score", "Seen", "labels_for", "look", "maps_loss", "problems_of", "redraw", "same_width", "samples_loss",
]  # fmt: skip
