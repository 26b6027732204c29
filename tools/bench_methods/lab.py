"""Trains arms: the learning rate on validation first, then once a seed, however many rows share the arm."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from compressor.data.types import DataBundle
from compressor.distil.loop import distil
from compressor.distil.panel import Panel
from compressor.recipe import DistilStage
from tools.bench_methods.arms import Arm, Row
from tools.bench_methods.store import Store

TUNING_SEED = 99  # never one of the seeds that are compared
BATCH = {"vision": 64, "text": 32}


class Fixture(Protocol):
    """Data, teachers and students of one domain."""

    transient: bool  # students are not kept once they have a score

    def student(self, arm: Arm, seed: int, trained: Callable[[Arm, int], nn.Module]) -> nn.Module:
        """A fresh student; ``trained`` gives the student of another arm."""
        ...

    def teacher(self, name: str) -> nn.Module | None: ...

    def panel(self, name: str) -> Panel | None: ...

    def bundle(self, arm: Arm) -> DataBundle: ...

    def held_out(self, module: nn.Module, arm: Arm) -> float:
        """The score on validation, per cent."""
        ...

    def scores(self, module: nn.Module, arm: Arm) -> Mapping[str, float]:
        """Every metric on test, per cent."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """Keys of every distil stage."""
        ...

    def teachers(self) -> str:
        """What each teacher reaches on test, in words."""
        ...


class Lab:
    """One fixture with its store."""

    def __init__(self, fixture: Fixture, store: Store, folder: Path, told: Callable[[str], None]) -> None:
        self.fixture, self.store, self.folder, self.told = fixture, store, folder, told

    def value(self, row: Row, side: Arm | tuple[Arm, Arm], seed: int) -> float:
        """One side of a row for one seed."""
        if isinstance(side, tuple):
            return self.score(side[0], seed)[row.metric] - self.score(side[1], seed)[row.metric]
        return self.score(side, seed)[row.metric]

    def score(self, arm: Arm, seed: int) -> Mapping[str, float]:
        """Test scores of the student of this arm and seed."""
        found = self.store.get(arm, "seeds", str(seed))
        if found is None:
            began = time.process_time()
            found = dict(self.fixture.scores(self.trained(arm, seed), arm))
            self.store.put(arm, "seeds", str(seed), found | {"cpu_seconds": round(time.process_time() - began, 1)})
            self._forget(arm, seed, self.rate(arm))
            self.told(f"{arm.key} seed {seed}: {found}")
        return found

    def known(self, row: Row, seeds: int) -> bool:
        """Are all scores of a row there, so that nothing has to be trained?"""
        return all(
            all(self.store.get(arm, "seeds", str(seed)) for seed in range(seeds))
            and (len(arm.rates) == 1 or all(self.store.get(arm, "tuning", str(rate)) for rate in arm.rates))
            for arm in row.arms
        )

    def rate(self, arm: Arm) -> float:
        """The learning rate that is best on validation."""
        if len(arm.rates) == 1:
            return arm.rates[0]
        held: dict[float, float] = {}
        for rate in arm.rates:
            found = self.store.get(arm, "tuning", str(rate))
            if found is None:
                found = {"validation": self.fixture.held_out(self._train(arm, TUNING_SEED, rate), arm)}
                self.store.put(arm, "tuning", str(rate), found)
                self._forget(arm, TUNING_SEED, rate)
            held[rate] = found["validation"]
        return max(held, key=lambda rate: held[rate])

    def trained(self, arm: Arm, seed: int) -> nn.Module:
        """The student of this arm and seed at the arm's learning rate."""
        return self._train(arm, seed, self.rate(arm))

    def _train(self, arm: Arm, seed: int, rate: float) -> nn.Module:
        batch = BATCH[arm.bench]
        samples = (arm.labelled if arm.stage.get("data", "all") != "transfer" else 0) + (
            arm.transfer if arm.stage.get("data", "all") != "train" else 0
        )
        epochs = max(1, -(-arm.steps * batch // samples))
        keys = {"kind": "distil", "epochs": epochs, "batch": batch, "learning_rate": rate, **self.fixture.settings()}
        module = self.fixture.student(arm, seed, self.trained)
        distil(
            module,
            self.fixture.teacher(arm.teacher) if arm.teacher else None,
            self.fixture.bundle(arm),
            DistilStage.model_validate(keys | dict(arm.stage)),
            seed=seed,
            work=self._work(arm, seed, rate),
            bank=self.folder / "bank",
            teacher_digest=f"{arm.bench}-{arm.teacher}",
            signals={},
            labels_only=not arm.teacher,
            panel=self.fixture.panel(arm.teacher) if arm.teacher else None,
        )
        return module.eval()

    def _work(self, arm: Arm, seed: int, rate: float) -> Path:
        return self.folder / f"{arm.key}-{seed}-{rate:g}"

    def _forget(self, arm: Arm, seed: int, rate: float) -> None:
        if self.fixture.transient:
            shutil.rmtree(self._work(arm, seed, rate), ignore_errors=True)
