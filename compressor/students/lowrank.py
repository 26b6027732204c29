"""Low-rank students: linear layers and embeddings become two smaller ones where that saves multiply-accumulates.

``rank`` is the share of a layer's weights (of its multiply-accumulates, for a linear layer) that stays: r (in + out) =
rank * in * out. ``rank_energy`` takes the smallest rank that keeps this share of the squared singular values. ``ranks``
says it by name. The mathematics is in :mod:`compressor.models.lowrank`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from compressor.errors import Problem
from compressor.recipe import StudentStage
from compressor.types import LayerFact

if TYPE_CHECKING:
    from torch import Tensor, nn

STAGE = "student"
TIED = "its weight is also another layer's"


@dataclass(frozen=True)
class Layer:
    """A layer that could be factorised, and why it is not when it is not."""

    path: str
    rows: int  # outputs; tokens of an embedding
    columns: int  # inputs; width of an embedding
    embedding: bool
    refusal: str = ""

    @property
    def highest(self) -> int:
        from compressor.models.lowrank import largest_saving_rank

        return min(self.rows, self.columns, largest_saving_rank(self.rows, self.columns))


def layers_of(module: nn.Module) -> list[Layer]:
    """Every linear layer and embedding, in the order of the module."""
    from torch import nn

    from compressor.models.lowrank import is_transposed

    parameters = [part._parameters.get("weight") for part in module.modules()]
    uses = Counter(id(weight) for weight in parameters if weight is not None)
    found = []
    for path, part in module.named_modules():
        plain = type(part) is nn.Linear or is_transposed(part)
        if not plain and not isinstance(part, nn.Embedding):
            continue
        weight = part.weight
        rows, columns = weight.T.shape if is_transposed(part) else weight.shape
        refusal = TIED if uses[id(weight)] > 1 else _foreign(module, path, part)
        found.append(Layer(path, int(rows), int(columns), isinstance(part, nn.Embedding), refusal))
    return found


def _foreign(module: nn.Module, path: str, part: nn.Module) -> str:
    """Why code outside of the layer would miss its weight, or empty."""
    from torch import nn

    holder = module.get_submodule(path.rpartition(".")[0])
    if isinstance(holder, nn.MultiheadAttention):
        return "belongs to nn.MultiheadAttention, which reads the weight itself"
    if isinstance(part, nn.Embedding) and type(part) is not nn.Embedding:
        return f"is a {type(part).__name__}, which does more than look up"
    return ""


def asked(config: StudentStage) -> bool:
    return config.rank is not None or config.rank_energy is not None or bool(config.ranks)


def pattern_of(path: str, config: StudentStage) -> str | None:
    """The first pattern of ``ranks`` that names a layer."""
    return next((pattern for pattern in config.ranks if fnmatchcase(path, pattern)), None)


def problems_of(module: nn.Module, config: StudentStage) -> list[Problem]:
    """What is wrong with ``rank``, ``rank_energy`` and ``ranks`` for this module."""
    if not asked(config):
        return []
    layers = layers_of(module)
    problems = []
    for pattern, rank in config.ranks.items():
        mine = [layer for layer in layers if fnmatchcase(layer.path, pattern)]
        free = [layer for layer in mine if not layer.refusal]
        if not mine:
            some = ", ".join(layer.path for layer in layers[:6])
            problems.append(Problem(f"ranks.{pattern}", f"matches no linear layer or embedding; some are {some} ..."))
        elif not free:
            problems.append(Problem(f"ranks.{pattern}", f"`{mine[0].path}` {mine[0].refusal}"))
        elif rank > max(layer.highest for layer in free):
            most = max(layer.highest for layer in free)
            problems.append(Problem(f"ranks.{pattern}", f"{rank} saves nothing; the largest rank that does is {most}"))
    wide = config.rank is not None or config.rank_energy is not None
    if wide and not any(not layer.refusal and layer.highest >= 1 for layer in layers):
        key = "rank" if config.rank is not None else "rank_energy"
        problems.append(Problem(key, "matches nothing: the model has no linear layer that two smaller ones could save"))
    return problems


def choose_rank(layer: Layer, part: nn.Module, config: StudentStage, round_to: int, moment: Tensor | None) -> int:
    """The rank of a layer, a multiple of ``round_to``; 0 when none saves anything or none is asked for."""
    from compressor.models.lowrank import energies

    pattern = pattern_of(layer.path, config)
    if layer.refusal or (pattern is None and config.rank is None and config.rank_energy is None):
        return 0
    if pattern is not None:
        wanted: float = config.ranks[pattern]
    elif config.rank is not None:
        wanted = config.rank * layer.rows * layer.columns / (layer.rows + layer.columns)
    else:
        held = energies(part, moment)
        wanted = float((held < config.rank_energy).sum()) + 1
    if pattern is None:
        wanted = max(round_to, round(wanted / round_to) * round_to)
    return int(wanted) if 1 <= wanted <= layer.highest else 0


def factorise_layers(
    student: nn.Module, config: StudentStage, round_to: int, calibration: Iterable[Mapping[str, Tensor]] | None
) -> tuple[list[dict[str, Any]], list[LayerFact]]:
    """Replace layers of ``student`` in place; the record steps, and a row for every linear layer and embedding."""
    from compressor.models.lowrank import factorise, second_moments

    if not asked(config):
        return [], []
    layers = layers_of(student)
    moments: dict[str, Tensor] = {}
    if config.rank_inputs and calibration is not None:
        watched = [layer.path for layer in layers if not layer.refusal and not layer.embedding and layer.highest]
        moments = second_moments(student, watched, calibration)
    record: list[dict[str, Any]] = []
    facts = []
    for layer in layers:
        moment = moments.get(layer.path)
        rank = choose_rank(layer, student.get_submodule(layer.path), config, round_to, moment)
        before = f"{layer.rows}x{layer.columns}"
        if not rank:
            reason = layer.refusal or "no rank was asked for, or none that saves anything"
            facts.append(LayerFact(STAGE, layer.path, "kept", before, before, reason))
            continue
        factorise(student, layer.path, rank, moment)
        record.append({"op": "factorise", "module": layer.path, "rank": rank})
        after = f"{layer.rows}x{rank} {rank}x{layer.columns}"
        how = "weighed by what it reads" if moment is not None else "by its weights"
        facts.append(LayerFact(STAGE, layer.path, "factorised", before, after, f"rank {rank}, {how}"))
    return record, facts


__all__ = ["Layer", "asked", "choose_rank", "factorise_layers", "layers_of", "problems_of"]
