"""What a plan says of zeros: who profits, what is refused, which order is wrong."""

from __future__ import annotations

from compressor.config import validate
from compressor.profile import load_profile
from compressor.profit import sparsity_notes, sparsity_problems
from compressor.recipe import Recipe

ZEROS = {"kind": "prune", "sparsity": 0.8}
CPU, GPU, NPU = (load_profile(name) for name in ("raspberry-pi-5", "geforce-rtx-4070", "ethos-u55-128"))


def recipe(*stages, **accept):
    return validate(Recipe, {"stage": list(stages), "accept": accept}, "recipe")


def places(problems):
    return [problem.where for problem in problems]


def test_a_speed_that_only_zeros_could_give_is_refused_where_they_give_none():
    wanted = recipe(ZEROS, {"kind": "distil"}, min_speedup=2.0)
    (problem,) = sparsity_problems(wanted, (CPU,))
    assert problem.where == "accept.min_speedup"
    assert "asks for 2x, which only the zeros (80 % unstructured) could give, and raspberry-pi-5 cannot" in problem.what
    assert "ONNX Runtime multiplies zeros" in problem.what
    assert places(sparsity_problems(wanted, (CPU, NPU, GPU))) == ["accept.min_speedup"] * 2  # the GPU wants 2:4
    assert not sparsity_problems(recipe({"kind": "prune", "pattern": "2:4"}, min_speedup=1.2), (GPU,))


def test_where_something_else_can_give_the_speed_it_is_a_note_only():
    for other in ({"kind": "student", "keep_layers": 2}, {"kind": "prune", "ratio": 0.5}):
        assert not sparsity_problems(recipe(other, ZEROS, min_speedup=2.0), (CPU,))
    assert not sparsity_problems(recipe(ZEROS, {"kind": "quantize"}, min_speedup=2.0), (CPU,))
    assert not sparsity_problems(recipe(ZEROS), (CPU,))
    gradual = recipe({"kind": "distil", "masks": {"pattern": "2:4"}})
    cpu, gpu, file = sparsity_notes(gradual, (CPU, GPU))
    assert cpu.startswith("raspberry-pi-5: zeros (2:4) do not make it faster there")
    assert gpu.startswith("geforce-rtx-4070: zeros (2:4) can be faster there: Sparse Tensor Cores")
    assert "as large as it was" in file
    assert not sparsity_notes(recipe({"kind": "prune", "ratio": 0.5}), (CPU,))


def test_a_cut_after_zeros_is_refused_and_more_zeros_are_not():
    wrong = recipe(ZEROS, {"kind": "student", "keep_layers": 2}, {"kind": "prune", "ratio": 0.5})
    assert places(sparsity_problems(wrong, ())) == ["stage.1.student", "stage.2.prune"]
    assert not sparsity_problems(recipe(ZEROS, {"kind": "distil"}, {"kind": "prune", "sparsity": 0.9}), ())
    learns = recipe({"kind": "distil", "masks": {"sparsity": 0.5}}, {"kind": "distil", "cofi": {"target": 0.5}})
    assert places(sparsity_problems(learns, ())) == ["stage.1.distil.cofi"]


def test_masks_cannot_be_cut_into_rounds():
    rounds = {"kind": "prune", "ratio": 0.5, "rounds": 2}
    for key, value in (("masks", {"sparsity": 0.5}), ("cofi", {"target": 0.5}), ("sparse_update", {"share": 0.1})):
        assert places(sparsity_problems(recipe(rounds, {"kind": "distil", key: value}), ())) == [
            f"stage.1.distil.{key}"
        ]
        assert not sparsity_problems(recipe(rounds, {"kind": "distil"}, {"kind": "distil", key: value}), ())
