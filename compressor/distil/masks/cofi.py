"""Masks that learn which units of the student go (CoFi, methods U2): sampled, trained, and settled at the end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressor.distil.masks import hard_concrete
from compressor.distil.masks.gates import Gate, GatePlan, Use, plan_gates
from compressor.distil.masks.settle import plain, settle
from compressor.distil.objectives.base import Committed, Step
from compressor.errors import StageError
from compressor.masks import CoFi

COARSE, FINE = 10.0, 4.6  # log alpha at the start: layers and hidden dimensions, units (CoFi: 99 % are open)
SPREAD = 0.01  # standard deviation around it
# where the second multiplier starts: CoFi starts both at 0 and trains for tens of thousands of steps; in hundreds they
# would wind up while the target rises and carry the sparsity far beyond it (measured: 0.98 for 0.6; 0.61 with this)
STIFFNESS = 30.0


class LearntMasks(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """The masks of one student while it trains. Implements :class:`compressor.distil.masks.base.Masking`.

    The student's parameters keep their identity; what its layers read is the product with the masks.
    """

    def __init__(
        self, student: nn.Module, example: Mapping[str, Tensor], config: CoFi, seed: int, round_to: int = 1
    ) -> None:
        super().__init__()
        self.config, self.plan, self._seed = config, plan_gates(student, example, config), seed
        self._multiple = config.round_to or round_to
        if not self.plan.counted:
            raise StageError("`cofi` finds nothing that could get a mask", hint=_why(self.plan))
        generator = torch.Generator().manual_seed(seed)
        self._names = {name: f"mask_{number}" for number, name in enumerate(self.plan.gates)}
        for name, gate in self.plan.gates.items():
            start = COARSE if gate.kind in ("layers", "hidden") else FINE
            self.register_parameter(
                self._names[name], nn.Parameter(start + SPREAD * torch.randn(gate.units, generator=generator))
            )
        self.first, self.second = nn.Parameter(torch.zeros(())), nn.Parameter(torch.tensor(STIFFNESS))
        self.to(next(student.parameters()).device)
        self._noise: dict[str, Tensor] = {}
        self._done = (0.0, 0.0)  # expected sparsity and target of the last step
        masks = [self._log_alpha(name) for name in self.plan.gates]
        self._optimiser = torch.optim.Adam(
            [
                {"params": masks, "lr": config.learning_rate},
                {"params": [self.first, self.second], "lr": config.multiplier_rate, "maximize": True},
            ]
        )
        self.eval()
        self._attach(student)

    def _log_alpha(self, name: str) -> nn.Parameter:
        return getattr(self, self._names[name])  # type: ignore[no-any-return]

    def _attach(self, student: nn.Module) -> None:
        by_tensor: dict[str, list[Use]] = {}
        for use in self.plan.uses:
            by_tensor.setdefault(use.tensor, []).append(use)
        for tensor, uses in by_tensor.items():
            path, _, local = tensor.rpartition(".")
            holder = student.get_submodule(path)
            scales = [_scale_of(use, getattr(holder, local), self.value) for use in uses]
            parametrize.register_parametrization(holder, local, Scaled(scales))
        for path, (gate, index) in self.plan.norms.items():
            norm = student.get_submodule(path)
            norm.forward = _norm_of_kept(norm, gate, torch.from_numpy(index.reshape(-1)), self.value)

    def detach(self, student: nn.Module) -> None:
        """Fold the masks as they are into the weights and leave plain layers behind."""
        for tensor in dict.fromkeys(use.tensor for use in self.plan.uses):
            path, _, local = tensor.rpartition(".")
            parametrize.remove_parametrizations(student.get_submodule(path), local, leave_parametrized=True)
        for path in self.plan.norms:
            del student.get_submodule(path).forward  # the class's own method is seen again

    def value(self, name: str) -> Tensor:
        """The mask of a gate: sampled while training, settled otherwise."""
        log_alpha = self._log_alpha(name)
        if self.training and name in self._noise:
            return hard_concrete.sampled(log_alpha, self._noise[name].to(log_alpha.device))
        return hard_concrete.settled(log_alpha, self._step_of(self.plan.gates[name]))

    def _step_of(self, gate: Gate) -> int:
        """Units that make up the multiple that the device wants; heads and layers are not rounded."""
        if gate.kind in ("layers", "heads") or gate.units < self._multiple:
            return 1
        return max(1, self._multiple // gate.group.width)

    def sparsity(self) -> Tensor:
        """Expected share of the counted weights that is zero, with gradient."""
        opened = {name: hard_concrete.open_probability(self._log_alpha(name)) for name in self.plan.gates}
        kept = torch.zeros((), device=self.first.device)
        for item in self.plan.counted:
            share = opened[item.layer].squeeze() if item.layer else torch.ones((), device=self.first.device)
            for _, gate, width, size in item.axes:
                share = share * (1 - (1 - opened[gate]).sum() * width / size)
            kept = kept + item.elements * share
        return 1 - kept / self.plan.total

    def target(self, step: Step) -> float:
        """The sparsity wanted at a step: linear from 0 to the target."""
        done = step.index / max(1, step.total - 1)
        return self.config.target * min(1.0, max(0.0, (done - self.config.start) / max(self.config.ramp, 1e-9)))

    def begin(self, step: Step) -> Step:
        for number, (name, gate) in enumerate(self.plan.gates.items()):
            generator = torch.Generator().manual_seed(_seed(self._seed, step.index, number))
            self._noise[name] = hard_concrete.noise(gate.units, generator)
        return replace(step, alive=self.alive())

    def alive(self) -> tuple[bool, ...]:
        """For each transformer block: does its attention or its feed-forward part do anything now?"""
        found = [False] * self.plan.blocks
        with torch.no_grad():
            for name, gate in self.plan.gates.items():
                if gate.block < 0 or gate.kind == "layers":
                    continue
                layer = f"layer:{name}"
                on = bool(self.value(name).any()) and (layer not in self.plan.gates or bool(self.value(layer).any()))
                found[gate.block] |= on
        return tuple(found)

    def gradients(self, step: Step) -> None:
        expected, wanted = self.sparsity(), self.target(step)
        gap = expected - wanted
        if step.index / max(1, step.total - 1) >= self.config.start:
            (self.first * gap + self.second * gap**2).backward()
        self._done = float(expected.detach()), wanted

    def end(self, average: Mapping[str, Tensor]) -> None:
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)

    def complete(self, index: int, total: int) -> bool:
        return False  # the masks are settled at the end of the stage

    def values(self) -> dict[str, float]:
        return {"cofi.sparsity": self._done[0], "cofi.target": self._done[1]}

    def state(self) -> dict[str, Any]:
        return {"masks": self.state_dict(), "optimiser": self._optimiser.state_dict(), "done": list(self._done)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.load_state_dict(state["masks"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._done = (state["done"][0], state["done"][1])

    def commit(self, student: nn.Module, example: Callable[[], Mapping[str, Tensor]]) -> Committed:
        device = self.first.device
        self.eval().cpu()
        student.cpu()  # cut and compared there, whatever trained it
        with torch.no_grad():
            reached = float(self.sparsity())
            masks = {name: self.value(name) for name in self.plan.gates}
        few = {name: tensor.cpu() for name, tensor in example().items()}
        done = settle(student, self.plan, masks, few, self.detach, (reached, self.config.target))
        student.to(device)
        return done


def rehearse(student: nn.Module, example: Mapping[str, Tensor], config: CoFi, round_to: int) -> None:
    """Settle masks drawn at random on a copy, before anything is trained.

    Raises:
        StageError: a student cut by such masks would not compute what the masked one does.
    """
    trial = plain(student)
    masks = LearntMasks(trial, example, config, 0, round_to)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number, (name, gate) in enumerate(masks.plan.gates.items()):
            values = torch.randn(gate.units, generator=generator) * 2
            masks._log_alpha(name).copy_(values if gate.kind != "layers" else values.fill_(-9.0 if number < 4 else 9.0))
    masks.commit(trial, lambda: example)


class Scaled(nn.Module):  # type: ignore[misc]
    """A parameter times its masks."""

    def __init__(self, scales: Sequence[Callable[[], Tensor]]) -> None:
        super().__init__()
        self._scales = tuple(scales)

    def forward(self, weight: Tensor) -> Tensor:
        for scale in self._scales:
            weight = weight * scale()
        return weight


def _scale_of(use: Use, tensor: Tensor, value: Callable[[str], Tensor]) -> Callable[[], Tensor]:
    """Makes the mask of a use, ready to be multiplied with the tensor."""
    if use.axis < 0:
        return lambda: value(use.gate).reshape(())
    shape = [1] * tensor.dim()
    shape[use.axis] = size = tensor.shape[use.axis]
    positions, width = torch.from_numpy(use.index.reshape(-1)), use.index.shape[1]
    if size == len(positions) and bool((positions == torch.arange(size)).all()):
        return lambda: value(use.gate).repeat_interleave(width).view(shape)

    def spread() -> Tensor:
        mask = value(use.gate)
        whole = torch.ones(size, dtype=mask.dtype, device=mask.device)
        return whole.index_put((positions.to(mask.device),), mask.repeat_interleave(width)).view(shape)

    return spread


def _norm_of_kept(
    norm: nn.Module, gate: str, positions: Tensor, value: Callable[[str], Tensor]
) -> Callable[[Tensor], Tensor]:
    """The forward of a norm whose statistics count only the dimensions that are not masked."""

    def forward(data: Tensor) -> Tensor:
        mask = (value(gate).detach() > 0).to(torch.float32)
        if bool(mask.all()):
            return type(norm).forward(norm, data)
        kept = torch.ones(data.shape[-1], device=data.device).index_put(
            (positions.to(data.device),), mask.repeat_interleave(len(positions) // len(mask))
        )
        wide, count = data.float(), kept.sum().clamp_min(1)
        if isinstance(norm, nn.LayerNorm):
            wide = wide - (wide * kept).sum(-1, keepdim=True) / count
        eps = norm.eps if norm.eps is not None else torch.finfo(data.dtype).eps
        wide = wide * torch.rsqrt((wide.square() * kept).sum(-1, keepdim=True) / count + eps)
        bias = getattr(norm, "bias", None)
        made = wide * norm.weight if bias is None else torch.addcmul(bias, wide, norm.weight)
        return made.to(data.dtype)

    return forward


def _seed(seed: int, step: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{number}".encode()).digest()[:6], "big")


def _why(plan: GatePlan) -> str:
    reasons = sorted(set(plan.notes.values()))
    return f"Units of the student: {'; '.join(reasons)[:300] or 'none were found'}."


__all__ = ["LearntMasks", "Scaled", "rehearse"]
