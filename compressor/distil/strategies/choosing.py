"""Strategies at work in a run: which samples take part, and what the models lose on the ones that are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from compressor.distil.processes import Processes
from compressor.distil.result import OnEvent
from compressor.distil.strategies.draws import Losses
from compressor.distil.strategies.judging import Judges
from compressor.distil.strategies.pool import Pool
from compressor.distil.stream import TrainingSet
from compressor.distil.teachers import TeacherSource
from compressor.errors import StageError
from compressor.recipe import DistilStage
from compressor.types import Array

CHUNK = 128  # texts of one call


class Choosing:
    """``load(positions, view)`` gives model inputs. ``asked``, ``tried``: samples teacher and student were run on."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        load: Callable[[Array, int], dict[str, Tensor]],
        processes: Processes,
    ) -> None:
        self._student, self._teacher, self._load, self._processes = student, teacher, load, processes
        self.asked = self.tried = 0

    def pool(
        self, data: TrainingSet, config: DistilStage, seed: int, on_event: OnEvent, *, labels_only: bool
    ) -> tuple[Array, Array]:
        """Positions that take part, and the labels of all; the same on every process."""
        judges = Judges(self._student, self._ask, lambda positions: self._load(positions, 0))
        pool = Pool(data, judges.teacher, judges.student, seed, on_event)
        pool.apply(config.strategy, labels_only=labels_only)
        self.tried += judges.tried
        count = int(self._processes.agreed(np.array([len(pool.kept)]))[0])
        return self._processes.agreed(np.resize(pool.kept, count)), self._processes.agreed(pool.labels)

    def losses(self, data: TrainingSet, source: TeacherSource, *, cached: bool) -> Losses:
        """Losses of both models on samples. ``cached``: the source has the teacher's logits."""

        def taught(positions: Array, inputs: Mapping[str, Tensor]) -> Tensor:
            if cached:
                source.prepare(0)
                return source.signals(positions, inputs, 0)["logits"]
            source.forwards += len(positions)
            return self._ask(positions, inputs)

        judges = Judges(self._student, taught, lambda positions: self._load(positions, 0))
        return lambda positions: judges.losses(data, positions)

    def embedder(self, source: TeacherSource, *, cached: bool) -> Callable[[Array], Tensor]:
        """The teacher's output for samples, from the source where it has it."""

        def embed(positions: Array) -> Tensor:
            found = []
            with torch.no_grad():
                for start in range(0, len(positions), CHUNK):
                    part = positions[start : start + CHUNK]
                    inputs = self._load(part, 0)
                    if cached:
                        source.prepare(0)
                        found.append(source.signals(part, inputs, 0)["logits"].cpu())
                    else:
                        found.append(self._ask(part, inputs).cpu())
            return torch.cat(found)

        return embed

    def _ask(self, positions: Array, inputs: Mapping[str, Tensor]) -> Tensor:
        if self._teacher is None:
            raise StageError("there is no teacher to ask", hint="Strategies that judge samples need a PyTorch teacher.")
        self.asked += len(positions)
        found: Tensor = self._teacher.eval()(**inputs)
        return found
