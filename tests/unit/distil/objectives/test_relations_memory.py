"""What relation objectives keep for the backward pass: B x B values, whatever the width, and no more above the cap."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from compressor.distil.objectives.base import Batch, Step  # noqa: E402
from compressor.distil.objectives.registry import get  # noqa: E402
from compressor.distil.objectives.relations import distances  # noqa: E402
from compressor.recipe import Match  # noqa: E402

pytestmark = pytest.mark.train
HIDDEN = Match(student="hidden[-1]", teacher="hidden[-1]", proj="none")


def kept(use: str, batch: int, width: int, **options: int) -> int:
    """Values that autograd keeps, each storage once, without the features themselves."""
    objective = get(use)(get(use).Options(**options), HIDDEN)
    objective.bind({"hidden": 1}, {"hidden": 1})
    student = torch.randn(batch, width, requires_grad=True)
    teacher, storages = torch.randn(batch, width), {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        term = objective({"hidden[0]": student}, {"hidden[0]": teacher}, Batch(None, None), Step(0, 1, 0))
    term.sum.backward()
    assert torch.isfinite(student.grad).all()
    return sum(size for pointer, size in storages.items() if pointer != student.untyped_storage().data_ptr())


def test_distances_keep_squares_whatever_the_width() -> None:
    few, wide = kept("rkd-distance", 64, 16), kept("rkd-distance", 64, 512)
    assert wide <= 8 * 64**2
    assert wide - few <= 2 * 64 * 512  # pooled features


def test_angles_stop_growing_at_the_cap() -> None:
    cap = kept("rkd-angle", 32, 16, samples=32)
    assert kept("rkd-angle", 256, 16, samples=32) <= cap + 2 * 256 * 16
    assert kept("rkd-angle", 64, 16, samples=64) > 6 * cap  # without a cap: the cube


def test_distances_are_euclidean_and_survive_equal_samples() -> None:
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0], [0.0, 8.0]], dtype=torch.float64, requires_grad=True)
    found = distances(vectors)
    plain = torch.tensor([[0, 5, 5, 8], [5, 0, 0, 5], [5, 0, 0, 5], [8, 5, 5, 0]], dtype=torch.float64)
    torch.testing.assert_close(found, plain / (plain.sum() / 10))
    found.square().sum().backward()
    assert torch.isfinite(vectors.grad).all()
