"""What a stage does to the student's weights around every step: zeros that are kept, masks that learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from compressor.distil.masks.base import Masking, NoMasking
from compressor.errors import Problem
from compressor.recipe import DistilStage

if TYPE_CHECKING:
    from torch import Tensor, nn


def masking_of(
    student: nn.Module,
    config: DistilStage,
    example: Callable[[], Mapping[str, Tensor]],
    seed: int,
    round_to: int,
    optimiser: Any,
) -> Masking:
    """What accompanies the steps of a stage: masks that learn, zeros that grow or are kept, or nothing.

    Raises:
        StageError: the student has nothing that could be masked, or could not be cut by learnt masks.
    """
    if config.cofi is not None:
        from compressor.distil.masks.cofi import LearntMasks, rehearse

        rehearse(student, example(), config.cofi, round_to)
        return LearntMasks(student, example(), config.cofi, seed, round_to)
    if config.sparse_update is not None:
        from compressor.distil.masks.updates import FewUpdates

        return FewUpdates(student, config.sparse_update, optimiser)
    from compressor.distil.masks.zeros import KeptZeros
    from compressor.models.sparse import masked

    if config.masks is not None or any(True for _ in masked(student)):
        return KeptZeros(student, config.masks)
    return NoMasking()


def mask_problems(stage: DistilStage, where: str, module: nn.Module, example: Mapping[str, Tensor]) -> list[Problem]:
    """What keeps the masks of a stage from being made, seen on the teacher; ``where`` is the stage's key."""
    if stage.masks is not None:
        from compressor.models.sparse import problems_of

        found = problems_of(module, stage.masks.zeros, stage.masks.protect)
        return [Problem(f"{where}.masks.{item.where}", item.what) for item in found]
    if stage.supernet is not None:
        from compressor.distil.supernet.problems import supernet_problems

        return supernet_problems(stage, where, module, example)
    if stage.cofi is None:
        return []
    from compressor.distil.masks.gates import plan_gates
    from compressor.models.structure.surgery import FORWARD_ERRORS

    names = [name for name, _ in module.named_modules() if name]
    problems = [
        Problem(f"{where}.cofi.protect.{number}", f"`{pattern}` matches no module")
        for number, pattern in enumerate(stage.cofi.protect)
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    try:
        plan = plan_gates(module, example, stage.cofi)
    except FORWARD_ERRORS as error:
        text = f"the model cannot be followed on its example input: {type(error).__name__}: {error}"
        return [*problems, Problem(f"{where}.cofi", text)]
    if not plan.counted:
        reasons = "; ".join(sorted(set(plan.notes.values()))) or "the model has no units that could go"
        problems.append(Problem(f"{where}.cofi.masks", f"matches nothing: {reasons}"))
    return problems
