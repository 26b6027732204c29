"""A super-net: all sub-nets of a space trained together on shared weights, the best of them cut out (methods N2).

Source: Xu et al., "Few-shot Task-agnostic Neural Architecture Search for Distilling Large Language Models", 2022
(AutoDistil): one super-net for a space of layers, heads, hidden width and feed-forward width, a uniformly drawn sub-net
a step, and a search by the distillation loss of sub-nets that nobody trains again. A stage trains one space; AutoDistil
trains three of different size, which are three recipes here. Its loss is `soft-ce`, `hidden` of the last layer and
`minilm-relations`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.distil.masks.settle import plain
from compressor.distil.objectives.base import Committed, Step
from compressor.distil.supernet.judge import Judge, shown
from compressor.distil.supernet.subnets import SubNet, SubNets
from compressor.distil.validation import PLAIN
from compressor.errors import PlanError, StageError
from compressor.models.rebuild import apply
from compressor.models.structure.surgery import agree
from compressor.search import Candidate, named
from compressor.types import LayerFact

if TYPE_CHECKING:
    from compressor.distil.setup import Setup

STAGE = "supernet"
RANKING_SAMPLES = 256  # of the training set, that rank the units
LOOKS = 20  # candidates drawn for each that is to be judged, before the budget is called impossible


@dataclass(frozen=True)
class Judged:
    """A sub-net within the budget, and the weighted terms of its loss; one beyond it, and what is too much."""

    candidate: Candidate
    cost: str
    terms: Mapping[str, float]
    why: str = ""

    @property
    def loss(self) -> float:
        return sum(self.terms.values()) if self.terms else float("inf")


class SharedWeights:
    """Draws a sub-net for every step, and cuts the best one out of the student at the end.

    Implements :class:`compressor.distil.masks.base.Masking`; :meth:`tap` takes the place of the student's own tap.
    """

    def __init__(self, student: nn.Module, nets: SubNets, seed: int, cost: Callable[[Any], float] | None) -> None:
        self.student, self.nets, self.space = student, nets, nets.space
        self._seed, self._cost = seed, cost
        self._known: dict[Any, float] = {}
        self._training = False
        self._candidate = self.space.at(0)
        self.judge: Judge | None = None
        self.judged: tuple[Judged, ...] = ()

    def tap(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Signals of the sub-net of this step."""
        return self.nets(self._candidate).signals(self.shared(), inputs, training=self._training)

    def shared(self) -> dict[str, Tensor]:
        """The student's parameters by all their names."""
        return dict(self.student.named_parameters(remove_duplicate=False))

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    def train(self, training: bool) -> None:
        self._training = training

    def begin(self, step: Step) -> Step:
        number = hashlib.sha256(f"{self._seed}:{step.index}".encode()).digest()
        self._candidate = self.space.at(int.from_bytes(number[:8], "big") % self.space.size)
        return step

    def gradients(self, step: Step) -> None:
        return None

    def end(self, average: Mapping[str, Tensor]) -> None:
        return None

    def complete(self, index: int, total: int) -> bool:
        return False  # the sub-net is chosen at the end of the stage

    def values(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}  # a draw is a function of the step

    def restore(self, state: Mapping[str, Any]) -> None:
        return None

    def commit(self, student: nn.Module, example: Callable[[], Mapping[str, Tensor]]) -> Committed:
        """Judge, choose, cut.

        Raises:
            StageError: no sub-net is within the budget, or the cut does not compute what the shared weights did.
        """
        student.eval()
        self.judged = self._search()
        best = min(self.judged, key=lambda each: (each.loss, named(each.candidate)))
        net = self.nets(best.candidate)
        inputs = dict(example())
        with torch.no_grad():
            wanted = net.signals(self.shared(), inputs, training=False)["logits"]
            device = wanted.device
            apply(student.cpu(), net.record)
            student.to(device)
            found = student(**inputs)
        if not agree([wanted], [found[0] if isinstance(found, tuple) else found]):
            raise StageError(
                "the sub-net that was cut out does not compute what it did inside the super-net",
                hint="Leave `hidden_size` out of the space; if that helps, please report this model.",
            )
        return Committed(tuple(net.record), tuple(self._facts(best)))

    def _search(self) -> tuple[Judged, ...]:
        """Sub-nets within the budget with their loss, and those beyond it, best first."""
        assert self.judge is not None  # `supernet_of` gives one
        inside: list[tuple[Candidate, SubNet, str]] = []
        beyond: list[Judged] = []
        for candidate in self._drawn():
            net = self.nets(candidate)
            latency = self._latency(net)
            cost = _cost(net, latency)
            why = "; ".join(self.space.budget.over(net.macs, net.parameters_count, latency))
            if why:
                beyond.append(Judged(candidate, cost, {}, why))
            else:
                inside.append((candidate, net, cost))
            if len(inside) == self.space.judged:
                break
        if not inside:
            what = f"none of the {len(beyond)} sub-nets that were looked at is within the budget; the last: "
            raise StageError(f"{what}{beyond[-1].why}", hint="Raise `supernet.budget`, or give smaller values.")
        shared = self.shared()
        terms = self.judge([partial(net.signals, shared, training=False) for _, net, _ in inside])
        judged = [Judged(c, cost, t) for (c, _, cost), t in zip(inside, terms, strict=True)]
        return (*sorted(judged, key=lambda each: each.loss), *beyond)

    def _drawn(self) -> list[Candidate]:
        """All candidates of a small space; of a large one some at random, in random order."""
        generator = np.random.default_rng(self._seed)
        found = self.space.some(LOOKS * self.space.judged, generator)
        return found if len(found) <= self.space.judged else [found[at] for at in generator.permutation(len(found))]

    def _latency(self, net: SubNet) -> float | None:
        if self._cost is None or self.space.budget.latency_ms is None:
            return None
        for shape in net.shapes:
            if shape not in self._known:
                self._known[shape] = self._cost(shape)
        return sum(self._known[shape] for shape in net.shapes)

    def _facts(self, best: Judged) -> Iterable[LayerFact]:
        before = _cost(self.nets({}), None)
        for each in self.judged:
            action = "chosen" if each is best else "judged" if each.terms else "left out"
            reason = shown(each.terms) if each.terms else each.why
            yield LayerFact(STAGE, f"sub-net: {named(each.candidate)}", action, before, each.cost, reason)


def _cost(net: SubNet, latency: float | None) -> str:
    more = "" if latency is None else f", {latency:.3g} ms in its layers"
    return f"{net.macs:,} multiply-accumulates, {net.parameters_count:,} parameters{more}"


def supernet_of(setup: Setup, names: Iterable[str], objectives: Sequence[Any], teacher: Any) -> SharedWeights:
    """The super-net of a stage, ready to be trained.

    Args:
        setup: of the stage.
        names: signals of the student that the objectives read.
        objectives: with their weights.
        teacher: gives the teacher's signals for inputs; None when nothing reads them.

    Raises:
        PlanError: the student, as it enters the stage, cannot be cut into such sub-nets.
    """
    from compressor.distil.setup import seed_of
    from compressor.distil.supernet.problems import space_problems

    space = setup.config.supernet
    assert space is not None
    cpu = partial(PLAIN.place, device=torch.device("cpu"))
    few = min(RANKING_SAMPLES, len(setup.data))
    data = [cpu(setup.data.batch(np.arange(at, min(at + 32, few)))) for at in range(0, few, 32)]
    student = plain(setup.student).cpu().eval()
    wrong = list(space_problems(space, student, _two(data[0])))
    if wrong:
        raise PlanError("the super-net", wrong)
    nets = SubNets(student, space, _two(data[0]), data, setup.device)
    nets.listen({*names, "logits"})
    made = SharedWeights(setup.student, nets, seed_of(setup.seed, "supernet"), setup.cost)
    held = setup.splits.get("validation")
    source = type(setup.data)([held]) if held is not None and len(held) else setup.data
    place = partial(PLAIN.place, device=setup.device)
    made.judge = Judge(source, space.samples, place, teacher, objectives, setup.label_weight)
    return made


def _two(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[:2] for name, tensor in batch.items()}


__all__ = ["Judged", "SharedWeights", "supernet_of"]
