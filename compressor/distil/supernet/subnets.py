"""Sub-nets of a student that share its weights: a structure without weights, filled by slices of the student.

A sub-net is what the usual surgery makes of the student (its record), so that no model needs code of its own. Its
weights are never copied: every forward pass slices the student's, and gradients go back into them. What is trained and
judged is therefore exactly what the record cuts out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from compressor.errors import StageError
from compressor.models.cost import count_macs, count_parameters
from compressor.models.rebuild import apply, indices_of
from compressor.models.shapes import LayerShape, layer_shapes
from compressor.models.signals import SignalTap, available, structure_of
from compressor.models.structure.blocks import BlockList, drop_steps, find_block_lists, spread_evenly
from compressor.models.structure.groups import Cut, Scores, owner
from compressor.models.structure.sizes import KEYS, cuts_of, ranking, resize
from compressor.models.structure.units import find_groups
from compressor.search import Candidate, SuperNet, named

Batch = Mapping[str, Tensor]
_LAYERED = re.compile(r"^(hidden|qkv|attn|q|k|v)\[(-?\d+)\]$")
NORMS = (nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Source:
    """Where a weight of a sub-net lies in the student: a tensor, and which positions of some of its axes."""

    tensor: str
    cuts: tuple[tuple[int, Tensor], ...]

    def of(self, shared: Mapping[str, Tensor]) -> Tensor:
        found = shared[self.tensor]
        for axis, index in self.cuts:
            found = found.index_select(axis, index.to(found.device))
        return found


class SubNet(nn.Module):  # type: ignore[misc]  # torch is not followed by mypy
    """One sub-net. Call :meth:`signals`; the module's own weights are on the ``meta`` device."""

    def __init__(
        self, inner: nn.Module, record: list[dict[str, Any]], sources: Mapping[str, Source], example: Batch, device: Any
    ) -> None:
        """``inner``: the sub-net as it was cut, with weights; ``device``: where the student trains."""
        super().__init__()
        self.record, self.sources = record, dict(sources)
        self.macs, self.parameters_count = count_macs(inner, example), count_parameters(inner)
        self.shapes: tuple[LayerShape, ...] = tuple(layer_shapes(inner, example).values())
        _hollow(inner, device)
        self.inner = inner
        self._tap: SignalTap | None = None
        self._names: Mapping[str, str] = {}
        self._stream: tuple[int, Tensor] | None = None

    def listen(self, names: Mapping[str, str], stream: tuple[int, Tensor] | None) -> None:
        """Which signals to give: the student's name for each -> this sub-net's.

        ``stream``: the student's hidden width and this sub-net's positions in it, where they differ; hidden states are
        given at the student's width, with zeros in the other positions.
        """
        self._names, self._stream = names, stream
        self._tap = SignalTap(self.inner, sorted(set(names.values())))
        self._tap.__enter__()  # the hooks live as long as the sub-net

    def signals(self, shared: Mapping[str, Tensor], inputs: Batch, *, training: bool) -> dict[str, Tensor]:
        """One forward pass with slices of ``shared``, the student's parameters; gradients reach them."""
        self.train(training)
        weights = {f"inner.{name}": source.of(shared) for name, source in self.sources.items()}
        found: dict[str, Tensor] = functional_call(self, weights, (inputs,))
        return {name: self._spread(name, found[own]) for name, own in self._names.items()}

    def forward(self, inputs: Batch) -> dict[str, Tensor]:
        assert self._tap is not None  # `listen` comes first
        return self._tap(inputs)

    def _spread(self, name: str, signal: Tensor) -> Tensor:
        stream = name == "pooled" or name.startswith("hidden[")
        if self._stream is None or not stream or signal.shape[-1] != len(self._stream[1]):
            return signal
        width, positions = self._stream
        wide = signal.new_zeros(*signal.shape[:-1], width)
        return wide.index_copy(-1, positions.to(signal.device), signal)


def _hollow(module: nn.Module, device: Any) -> None:
    """Parameters without memory, tied ones still tied; buffers on ``device``."""
    known: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if parameter not in known:
                    known[parameter] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
                part._parameters[name] = known[parameter]
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)


class SubNets:
    """Makes the sub-nets of a space, each once. Units are ranked once: smaller sub-nets lie inside larger ones."""

    def __init__(
        self, student: nn.Module, space: SuperNet, example: Batch, data: Iterable[Batch], device: Any = "cpu"
    ) -> None:
        """``student`` without hooks, on the CPU; it is kept and never changed. ``data`` ranks its units by activation.

        ``device``: where the student itself trains.
        """
        self.student, self.space, self.example, self.device = student, space, example, device
        self.groups = find_groups(student, example)
        keys = [key for key in KEYS if key in space.axes]
        self.scores: Scores = ranking(student, self.groups, keys, data)
        self.blocks = layers_of(student, example) if "keep_layers" in space.axes else None
        self._counts = available(student)
        self._offset = int(structure_of(student).transformer)
        self._made: dict[str, SubNet] = {}
        self._wanted: tuple[str, ...] = ("logits",)

    def listen(self, names: Iterable[str]) -> None:
        """Signals of the student that every sub-net shall give, in its own way."""
        self._wanted = tuple(names)
        self._made.clear()

    def __call__(self, candidate: Candidate) -> SubNet:
        """The sub-net of a candidate.

        Raises:
            StageError: the student's code does not run with these sizes.
        """
        key = named(candidate)
        if key not in self._made:
            self._made[key] = self._make(candidate)
        return self._made[key]

    def _make(self, candidate: Candidate) -> SubNet:
        wanted = {key: int(candidate[key]) for key in KEYS if key in candidate}
        cuts = cuts_of(self.student, self.groups, self.scores, wanted)
        inner, record, refused = resize(self.student, cuts, self.example)
        if refused:
            name, why = next(iter(refused.items()))
            raise StageError(f"the sub-net {named(candidate)} cannot be cut: `{name}`: {why}", hint=HINT)
        kept = self.kept(candidate)
        if self.blocks is not None and kept is not None:
            steps = drop_steps(inner, self.blocks.container, kept)
            apply(inner, steps)
            record += steps
        made = SubNet(inner, record, self._sources(inner, record, kept), self.example, self.device)
        made.listen({name: self._own(name, kept) for name in self._wanted}, self._stream(cuts))
        return made

    def kept(self, candidate: Candidate) -> tuple[int, ...] | None:
        """Which layers stay; None where all do."""
        keep = candidate.get("keep_layers")
        if keep is None or self.blocks is None:
            return None
        return spread_evenly(self.blocks.count, keep) if isinstance(keep, int) else tuple(keep)

    def _sources(
        self, inner: nn.Module, record: Sequence[Mapping[str, Any]], kept: tuple[int, ...] | None
    ) -> dict[str, Source]:
        """For each parameter of the sub-net its slice of the student. Cuts come before layers go, in the record too."""
        shared = dict(self.student.named_parameters(remove_duplicate=False))
        cuts: dict[nn.Parameter, list[tuple[int, Tensor]]] = {}
        for step in record:
            if step["op"] == "cut" and step["tensor"] in shared:  # buffers have their own copy in the structure
                place = (int(step["axis"]), indices_of(step["keep"]))
                cuts.setdefault(shared[step["tensor"]], []).append(place)
        names = {name: self._before(name, kept) for name, _ in inner.named_parameters()}
        return {name: Source(old, tuple(cuts.get(shared[old], ()))) for name, old in names.items()}

    def _before(self, name: str, kept: tuple[int, ...] | None) -> str:
        """The student's name of a sub-net's parameter."""
        if self.blocks is None or kept is None or not name.startswith(f"{self.blocks.container}."):
            return name
        rest = name.removeprefix(f"{self.blocks.container}.")
        position, _, local = rest.partition(".")
        return f"{self.blocks.container}.{kept[int(position)]}.{local}"

    def _own(self, name: str, kept: tuple[int, ...] | None) -> str:
        """The sub-net's name of a student's signal: a layer that is gone passes on what the one before it gave."""
        match = _LAYERED.match(name)
        if match is None or kept is None:
            return name
        kind, index = match[1], int(match[2])
        index += self._counts.get(kind, 0) if index < 0 else 0
        if kind == "hidden":
            return f"hidden[{sum(position < index for position in kept) if self._offset else index}]"
        return f"{kind}[{max(0, sum(position <= index for position in kept) - 1)}]"

    def _stream(self, cuts: Sequence[Cut]) -> tuple[int, Tensor] | None:
        hidden = [cut for cut in cuts if cut.group.soft]
        if not hidden:
            return None
        group = hidden[0].group
        norms = [k for k in group.index if k.tensor.endswith("weight") and isinstance(self._part(k.tensor), NORMS)]
        index = group.index[norms[0] if norms else group.main]
        return int(index.size), torch.from_numpy(index[hidden[0].keep].reshape(-1))

    def _part(self, tensor: str) -> nn.Module:
        return self.student.get_submodule(owner(tensor))


HINT = "Leave this value out of the space; if the layer is an ordinary one, please report this model."


def layers_of(module: nn.Module, example: Batch) -> BlockList | None:
    """The longest list of equal layers, None where there is none."""
    chains = [blocks for blocks in find_block_lists(module, example) if blocks.minimum]
    return max(chains, key=lambda blocks: blocks.count, default=None)


__all__ = ["Source", "SubNet", "SubNets", "layers_of"]
