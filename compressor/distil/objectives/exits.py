"""Exits inside a student that answer before its end: E1 of the methods catalogue."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from compressor.config import Frozen
from compressor.distil.objectives import divergence
from compressor.distil.objectives.base import (
    Batch,
    Committed,
    Counts,
    Needs,
    Pass,
    SignalObjective,
    Signals,
    Step,
    Steps,
    Term,
)
from compressor.distil.objectives.rows import UNLABELLED
from compressor.errors import StageError
from compressor.models import heads
from compressor.models.signals import structure_of
from compressor.recipe import Positive
from compressor.types import LayerFact


class MultiExit(SignalObjective):
    """Exits at several depths of one student: each learns the labels and the exit after it.

    Formula: mean over exits k of [ `labels` * CE(z_k, y) on labelled samples + tau^2 KL(p_(k+1) || p_k) ], mean over
    samples; p_(k+1) the next deeper exit (the student's own output for the last), without gradient.
    z_k = W_k pool(h_k) + b_k; pool: mean over space, or over real tokens.

    Shapes: exit[k] (B, C) and logits (B, C) of the student; labels (B,). No teacher signals.
    Paper: Gurioli et al., "One Model to Train them All: Hierarchical Self-Distillation for Enhanced Early Layer
    Embeddings" (ModularStarEncoder), 2025; the KL between exits as in sentence-transformers' AdaptiveLayerLoss (methods
    E1).
    Defaults: `blocks` empty: an exit after every block but the last; or their numbers, from 0, as "0 2". temperature 1,
    labels 1. `export`: `none` drops the exits (deep supervision), `outputs` ships each as a further output `exit_<k>`,
    `exit` makes exit number `exit` the student's only output, and the file ends there. `threshold` makes files beside
    the whole student that stop at the first exit whose largest softmax probability reaches `threshold`; left out, it
    is chosen on validation within `accept.max_drop`.
    When: one training for several sizes; easy samples that need not go all the way.
    Worked number: an exit equal to the output, no labels: 0.
    """

    class Options(Frozen):
        blocks: Annotated[str, Field(pattern=r"^(\d+( \d+)*)?$")] = ""
        temperature: Positive = 1.0
        labels: Annotated[float, Field(ge=0)] = 1.0
        export: Literal["none", "outputs", "exit", "threshold"] = "none"
        exit: Annotated[int, Field(ge=0)] = 0
        threshold: Annotated[float, Field(gt=0, le=1)] | None = None

        @model_validator(mode="after")
        def _threshold_is_used(self) -> Self:
            if self.threshold is not None and self.export != "threshold":
                raise ValueError('`threshold` needs `export = "threshold"`')
            return self

    place: ClassVar[str] = "exits"

    def bind(self, student: Counts, teacher: Counts) -> list[str]:
        first = 1 if "qkv" in student else 0  # hidden[0] of a transformer is its embeddings' output
        blocks = student.get("hidden", 0) - first
        numbers = [int(word) for word in self.options.blocks.split()] or list(range(max(0, blocks - 1)))
        self.numbers = sorted(set(numbers))
        self.names = [f"exit[{i}]" for i in range(len(self.numbers))]
        fields = frozenset({"labels"}) if self.options.labels else frozenset()
        self.needs = Needs(frozenset({"logits", *self.names}), frozenset(), fields, same_vocab=False)
        if not self.numbers or self.numbers[-1] >= blocks:
            return [f"the student has {blocks} blocks; exits after {self.numbers or 'none'} are impossible"]
        if self.options.export == "exit" and self.options.exit >= len(self.numbers):
            return [f"there are {len(self.numbers)} exits; `exit` is a number from 0"]
        return []

    def unfit(self, student: nn.Module) -> list[str]:
        if any(isinstance(part, heads.Exits) for part in student.modules()):
            return ["the student has exits already"]
        return ["the student has a part called `exits`"] if hasattr(student, "exits") else []

    def install(self, student: nn.Module, example: Signals) -> Steps:
        blocks = structure_of(student).blocks
        paths = [blocks[number][0] for number in self.numbers]
        widths: dict[str, int] = {}
        handles = [student.get_submodule(path).register_forward_hook(_width_into(widths, path)) for path in paths]
        with torch.no_grad():
            classes = int(student(**example).shape[-1])
        for handle in handles:
            handle.remove()
        step = {"op": "exits", "blocks": paths, "widths": [widths[path] for path in paths], "classes": classes}
        step |= {"mode": "training"}
        heads.add_exits(student, step).to(next(iter(example.values())).device)
        return (step,)

    def commit(self, student: nn.Module, steps: Steps, validation: Pass | None) -> Committed:
        (step,) = steps
        exits: Any = student.get_submodule("exits")
        kept, why = self.options.export, "exits are for training only"
        if kept == "none":
            heads.remove_exits(student)
            return Committed(
                (), tuple(LayerFact("distil", path, "dropped", "exit", "-", why) for path in step["blocks"])
            )
        if kept in ("outputs", "threshold"):
            exits.mode = "outputs"
            why = "its exit is a further output" if kept == "outputs" else "samples may leave here"
            facts = [LayerFact("distil", path, "kept", "exit", "output", why) for path in step["blocks"]]
        else:
            exits.mode = self.options.exit
            why = f"exit {self.options.exit} is the student's output"
            facts = [LayerFact("distil", step["blocks"][self.options.exit], "cut", "whole", "ends here", why)]
        return Committed(({**step, "mode": exits.mode},), tuple(facts))

    def __call__(self, s: Signals, t: Signals, batch: Batch, step: Step) -> Term:
        chain = [s[name] for name in self.names] + [s["logits"]]
        total = chain[0].new_zeros((), dtype=torch.float32)
        tau = self.options.temperature
        for own, deeper in pairwise(chain):
            total = total + divergence.forward_kl(deeper.detach(), own, tau).sum() * tau**2
            if self.options.labels:
                total = total + self.options.labels * _labelled(own, batch)
        total = total / len(self.names)
        return Term(total, float(len(chain[0])), {"exits": total.detach()})


def _labelled(logits: Tensor, batch: Batch) -> Tensor:
    if batch.labels is None or batch.labels.dim() != 1:
        raise StageError("multi-exit needs one class a sample", hint="Without such labels set its `labels` to 0.")
    return F.cross_entropy(logits.float(), batch.labels, ignore_index=UNLABELLED, reduction="sum")


def _width_into(widths: dict[str, int], path: str) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        widths[path] = int(heads.pooled(hidden, None).shape[-1])

    return hook
