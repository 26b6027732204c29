"""Fewer layers: some of the longest list of blocks, or of the encoder's and the decoder's, are kept.

A deep encoder with a shallow decoder loses little quality and most of the decoding time where a cache is kept, since
the encoder then runs once (Kasai et al., "Deep Encoder, Shallow Decoder: Reevaluating Non-autoregressive Machine
Translation", ICLR 2021). Graphs exported here keep none.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compressor.errors import Problem
from compressor.recipe import StudentStage
from compressor.types import LayerFact

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compressor.models.structure.blocks import BlockList

Batch = Mapping[str, "Tensor"]
Keep = tuple[int, ...] | int
STAGE = "student"


def problems_of(module: nn.Module, example: Batch, config: StudentStage) -> list[Problem]:
    """What keeps the layers of ``config`` from being kept; empty when they can be."""
    found: list[Problem] = []
    for key, keep, blocks in _wanted(module, example, config):
        found += [Problem(key, text) for text in _wrong(module, keep, blocks)]
    return found


def _wrong(module: nn.Module, keep: Keep, blocks: BlockList | None) -> list[str]:
    from compressor.models.structure.blocks import shares_bias

    if blocks is None:
        return ["matches nothing: the model has no list of blocks of equal shape"]
    if isinstance(keep, int):
        wrong = not 1 <= keep <= blocks.count
    else:
        wrong = not keep or list(keep) != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= blocks.count
    if wrong:
        return [f"`{blocks.container}` has {blocks.count} layers; give how many to keep, or ascending indices from 0"]
    first = next(module.get_submodule(blocks.container).children())
    if not isinstance(keep, int) and keep[0] != 0 and shares_bias(first):
        return [f"layer 0 of `{blocks.container}` holds the position bias of all layers: keep it"]
    return []


def _wanted(module: nn.Module, example: Batch, config: StudentStage) -> list[tuple[str, Keep, BlockList | None]]:
    """Key, what to keep, and the list it is about."""
    from compressor.models.signals import encoder_decoder
    from compressor.models.structure.blocks import find_block_lists

    asked = {"keep_layers": config.keep_layers, "decoder_layers": config.decoder_layers}
    if not any(keep is not None for keep in asked.values()):
        return []
    chains = [blocks for blocks in find_block_lists(module, example) if blocks.minimum]
    sides = encoder_decoder(module)
    found: list[tuple[str, Keep, BlockList | None]] = []
    for number, (key, keep) in enumerate(asked.items()):
        if keep is not None:
            own = chains if sides is None else [b for b in chains if b.container.startswith(f"{sides[number]}.")]
            found.append((key, keep, max(own, key=lambda blocks: blocks.count, default=None)))
    return found


def keep_layers(
    module: nn.Module, example: Batch, config: StudentStage
) -> tuple[nn.Module, list[dict[str, Any]], list[LayerFact]]:
    """A copy with some layers, the steps that make it, and what became of each layer."""
    from compressor.models.rebuild import apply
    from compressor.models.structure.blocks import drop_steps, spread_evenly

    student = copy.deepcopy(module)
    record: list[dict[str, Any]] = []
    facts: list[LayerFact] = []
    for key, keep, blocks in _wanted(module, example, config):
        if blocks is None:
            continue
        kept = spread_evenly(blocks.count, keep) if isinstance(keep, int) else keep
        steps = drop_steps(student, blocks.container, kept)
        apply(student, steps)
        record += steps
        facts += [
            LayerFact(STAGE, f"{blocks.container}.{i}", "copied", f"layer {i}", f"layer {kept.index(i)}")
            if i in kept
            else LayerFact(STAGE, f"{blocks.container}.{i}", "dropped", f"layer {i}", "", f"not in {key}")
            for i in range(blocks.count)
        ]
    return student, record, facts


__all__ = ["keep_layers", "problems_of"]
