"""A simulator that was killed goes on where it was."""

import numpy as np
import pytest

from compressor.cli.predictions import PredictionStore
from compressor.evaluate import ArrayEvalSet, predict
from targets.slow import STEPS, KeptBatches

SAMPLES, BATCH = 100, 8


class Simulator:
    def __init__(self, dies_at: int | None = None) -> None:
        self.calls, self.dies_at = 0, dies_at

    def __call__(self, inputs):
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        self.calls += 1
        return {"other": inputs["x"] - 1, "twice": inputs["x"] * 2}


@pytest.fixture
def data():
    return ArrayEvalSet({"x": np.random.default_rng(0).normal(size=(SAMPLES, 3)).astype(np.float32)})


def through(simulator, data, cache, told, key="whole"):
    kept = KeptBatches(simulator, cache, key, "twice", SAMPLES, told)
    return kept, predict(kept, data, BATCH, "twice")


def test_a_killed_simulator_goes_on_where_it_was(data, tmp_path):
    cache, told = PredictionStore(tmp_path), []
    first = Simulator(dies_at=5)
    with pytest.raises(KeyboardInterrupt):
        through(first, data, cache, told.append)
    assert len(cache) == 5
    second = Simulator()
    kept, found = through(second, data, PredictionStore(tmp_path), told.append)
    assert first.calls + second.calls == -(-SAMPLES // BATCH), "no batch is run twice"
    np.testing.assert_array_equal(found, data.arrays["x"] * 2)
    kept.forget()
    assert not len(cache), "the whole is kept elsewhere, its parts are gone"


def test_another_set_or_file_shares_nothing(data):
    cache: dict[str, np.ndarray] = {}
    through(Simulator(), data, cache, lambda done: None)
    other = Simulator()
    through(other, data, cache, lambda done: None, key="another")
    assert other.calls == -(-SAMPLES // BATCH)


def test_it_says_how_far_it_is(data):
    told: list[int] = []
    through(Simulator(), data, {}, told.append)
    assert told == sorted(told)
    assert len(told) == STEPS - 1, "the end is told by who asked"
    assert told[-1] < SAMPLES
