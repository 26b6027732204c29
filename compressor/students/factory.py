"""Another student from the teacher's own factory: what it makes with other keyword arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from compressor.config import suggestion
from compressor.errors import CompressError, Problem
from compressor.types import LayerFact

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = Mapping[str, "Tensor"]


def name_problems(module: nn.Module, names: Iterable[str], key: str) -> list[Problem]:
    """Arguments that the factory of ``module`` does not take, or that there is no factory."""
    from compressor.models.factory import parameters_of

    known = parameters_of(module)
    if known is None:
        return [Problem(key, "needs a model of a factory: `--model pkg.mod:factory`")]
    return [
        Problem(f"{key}.{name}", f"is no keyword parameter of the factory{suggestion(name, known)}")
        for name in names
        if name not in known and "*" not in known
    ]


def problems_of(module: nn.Module, example: Batch, arguments: Mapping[str, Any]) -> list[Problem]:
    """What keeps the factory from making a student with these arguments; it is called once."""
    found = name_problems(module, arguments, "factory")
    if found or not arguments:
        return found
    try:
        why = unlike(module, remade(module, arguments, 0)[0], example)
    except CompressError as error:
        why = str(error).replace("\n", " ")
    return [Problem("factory", why)] if why else []


def unlike(teacher: nn.Module, student: nn.Module, example: Batch) -> str:
    """How the student's output differs in shape from the teacher's; empty when it does not."""
    from compressor.models.structure.surgery import FORWARD_ERRORS, outputs_of

    try:
        wanted, found = ([tuple(out.shape) for out in outputs_of(each, example)] for each in (teacher, student))
    except FORWARD_ERRORS as error:
        return f"what it makes cannot take the model's inputs: {type(error).__name__}: {error}"
    return "" if wanted == found else f"what it makes gives outputs of shape {found}, the teacher {wanted}"


def remade(
    module: nn.Module, arguments: Mapping[str, Any], seed: int
) -> tuple[nn.Module, list[dict[str, Any]], list[LayerFact]]:
    """The student, the step that makes it again, and a row for the report.

    Raises:
        ConfigError: no factory made the teacher, or it fails with these arguments.
    """
    from compressor.models.cost import count_parameters
    from compressor.models.factory import remake

    student = remake(module, arguments, seed)
    shown = ", ".join(f"{name} = {value}" for name, value in arguments.items())
    before, after = (f"{count_parameters(each):,} parameters" for each in (module, student))
    fact = LayerFact("student", "the model", "made anew", before, after, f"factory({shown})")
    return student, [{"op": "factory", "arguments": dict(arguments)}], [fact]


__all__ = ["name_problems", "problems_of", "remade", "unlike"]
