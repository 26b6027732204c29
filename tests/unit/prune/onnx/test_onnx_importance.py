"""Scores against hand-made values, mending that is exact where it can be, and memory that does not grow."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper

from compressor.errors import StageError
from compressor.models.onnx_graph import constants
from compressor.prune.onnx import prune
from compressor.prune.onnx.graph import find_structure
from compressor.prune.onnx.importance import ActivationStatistics, score
from compressor.prune.onnx.repair import repair, statistics_on
from compressor.prune.onnx.runtime import Watcher, random_example
from compressor.prune.onnx.surgery import mask
from compressor.prune.onnx.trace import prepare
from compressor.recipe import PruneStage
from tests.unit.prune.onnx.graphs import TOPOLOGIES, chain, residual

ACTIVATION = PruneStage(kind="prune", ratio=0.5)


def batches(count: int, size: int = 20) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(5)
    return [{"x": generator.normal(size=(size, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def test_activation_is_mean_then_l2() -> None:
    """Minitron: mean of |a| over positions, L2 over samples, mean 1; in batches as in one go."""
    structure = find_structure(prepare(residual()), random_example(residual()))
    group = next(group for group in structure.groups if group.name == "c2")
    data = batches(3)
    found = score(structure, [group], "activation", data)
    seen = np.concatenate([Watcher(structure.trace.model, ["r2"]).run(batch)["r2"] for batch in data])
    norms = np.sqrt(np.square(np.abs(seen).mean(axis=(2, 3))).sum(axis=0))
    np.testing.assert_allclose(found.units["c2"], norms / norms.mean(), rtol=1e-5)
    key = group.consumed[0]
    np.testing.assert_allclose(found.means[key], seen.mean(axis=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert found.samples == 60


def test_statistics_do_not_grow_with_samples() -> None:
    structure = find_structure(prepare(residual()), random_example(residual()))
    few, many = (ActivationStatistics(structure, structure.groups) for _ in range(2))
    few.observe(batches(1))
    many.observe(batches(12))
    assert many.floats_held == few.floats_held


def test_magnitude_finds_the_unit_of_zeros() -> None:
    model = chain()
    for name in ("c1.weight", "bn1.scale", "bn1.offset"):
        tensor = constants(model.graph)[name]
        array = numpy_helper.to_array(tensor).copy()
        array[5] = 0
        tensor.CopyFrom(numpy_helper.from_array(array, name))
    structure = find_structure(prepare(model), random_example(model))
    assert int(np.argmin(score(structure, structure.groups[:1], "magnitude", []).units["c1"])) == 5


def test_units_that_are_constant_go_without_a_trace() -> None:
    """Four hidden neurons that always give the same: their bias takes over, the outputs stay as they were."""
    model = TOPOLOGIES["flatten"]()
    for name, part, factor in (("fc1.weight", np.s_[:4], 0.0), ("fc2.weight", np.s_[:, :4], 0.05)):
        tensor = constants(model.graph)[name]
        array = numpy_helper.to_array(tensor).copy()
        array[part] *= factor
        tensor.CopyFrom(numpy_helper.from_array(array, name))
    config = PruneStage(kind="prune", neurons=0.25, importance="magnitude")
    done = prune(model, random_example(model), config, batches(2))
    assert done.way == "bias compensation"
    wanted, found = Watcher(model).run(batches(1)[0]), Watcher(done.model).run(batches(1)[0])
    np.testing.assert_allclose(found["fc2"], wanted["fc2"], atol=1e-4)


def test_written_out_norms_see_the_data() -> None:
    """The first norm's statistics are those of its input, over each batch."""
    model = prepare(chain())
    data = batches(2)
    mean, variance = statistics_on(model, data, {"bn1": 4, "bn2": 4})["bn1"]
    seen = [Watcher(model, ["c1"]).run(batch)["c1"].astype(np.float64) for batch in data]
    np.testing.assert_allclose(mean, np.mean([a.mean(axis=(0, 2, 3)) for a in seen], axis=0), atol=1e-5)
    np.testing.assert_allclose(variance, np.mean([a.var(axis=(0, 2, 3)) for a in seen], axis=0), rtol=1e-4)


def test_the_nearest_way_wins() -> None:
    done = prune(chain(), random_example(chain()), ACTIVATION, batches(2))
    assert len(done.distances) == 5
    assert done.distances[done.way] == min(done.distances.values())
    assert done.distances[done.way] < done.distances["nothing"]


def test_without_cuts_nothing_is_mended() -> None:
    structure = find_structure(prepare(chain()), random_example(chain()))
    masked = mask(structure.trace.model, structure, [])
    assert repair(structure, masked, [], {}, batches(2)).way == "nothing"


def test_activation_needs_data() -> None:
    with pytest.raises(StageError, match="needs calibration data"):
        prune(chain(), random_example(chain()), ACTIVATION, [])


def test_random_is_seeded() -> None:
    config = PruneStage(kind="prune", ratio=0.5, importance="random")
    first, again, other = (prune(chain(), random_example(chain()), config, [], seed=seed).model for seed in (1, 1, 2))
    assert first.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)
    assert first.SerializeToString(deterministic=True) != other.SerializeToString(deterministic=True)
