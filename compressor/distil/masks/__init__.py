"""What a stage does to the student's weights around every step: zeros that are kept, masks that learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from compressor.distil.masks.base import Masking, NoMasking
from compressor.recipe import DistilStage

if TYPE_CHECKING:
    from torch import Tensor, nn


def masking_of(
    student: nn.Module, config: DistilStage, example: Callable[[], Mapping[str, Tensor]], seed: int, round_to: int
) -> Masking:
    """What accompanies the steps of a stage: masks that learn, zeros that grow or are kept, or nothing.

    Raises:
        StageError: the student has nothing that could be masked.
    """
    if config.cofi is not None:
        from compressor.distil.masks.cofi import LearntMasks

        return LearntMasks(student, example(), config.cofi, seed, round_to)
    from compressor.distil.masks.zeros import KeptZeros
    from compressor.models.sparse import masked

    if config.masks is not None or any(True for _ in masked(student)):
        return KeptZeros(student, config.masks)
    return NoMasking()
