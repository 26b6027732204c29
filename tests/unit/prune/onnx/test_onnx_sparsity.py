"""Zeros in an ONNX file: exact in the float file, still zero in every quantized one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compressor.export.optimise import optimise
from compressor.models.onnx_graph import read_model, save_model
from compressor.profile import QuantizationRules
from compressor.prune.onnx import check
from compressor.prune.onnx.sparsity import sparsify
from compressor.quantize import Variant, quantize
from compressor.recipe import PruneStage
from compressor.types import Artifact
from tests import onnx_models

TWO_OF_FOUR = PruneStage(kind="prune", pattern="2:4")
STATIC = Variant("int8-static", "onnxruntime", "static", per_channel=True)
TENSOR = Variant("int8-static-tensor", "onnxruntime", "static", per_channel=False)
DYNAMIC = Variant("int8-dynamic", "onnxruntime", "dynamic", True, ("Gather", "Gemm", "MatMul"))


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def sparse(made: Path, folder: Path, stage: PruneStage) -> tuple[Artifact, dict[str, np.ndarray]]:
    """A file with zeros, and which elements of which weights are zero."""
    optimise(made, folder / "dense.onnx")
    done = sparsify(read_model(folder / "dense.onnx"), stage)
    save_model(done.model, folder / "sparse.onnx")
    layers = {fact.layer for fact in done.facts if fact.action == "sparsified"}
    names = [node.input[1] for node in done.model.graph.node if node.name in layers]
    zeros = {name: tensors(folder / "sparse.onnx")[name] == 0 for name in names}
    assert sum(int(mask.sum()) for mask in zeros.values()) == done.zeros
    return onnx_models.artifact(folder / "sparse.onnx"), zeros


def images() -> Iterator[dict[str, np.ndarray]]:
    return iter([onnx_models.images(12)])


def tokens() -> Iterator[dict[str, np.ndarray]]:
    return iter([onnx_models.tokens(8)])


def test_two_of_four_along_the_inputs_and_reasons_for_the_rest(tmp_path: Path) -> None:
    _, zeros = sparse(onnx_models.cnn(tmp_path / "raw.onnx"), tmp_path, TWO_OF_FOUR)
    dense = tensors(tmp_path / "dense.onnx")
    for name, mask in zeros.items():
        along = np.moveaxis(mask, 1, -1) if mask.ndim == 4 else mask
        assert (along.reshape(*along.shape[:-1], -1, 4).sum(-1) == 2).all(), name
        assert not (dense[name] == 0).any()
        assert np.array_equal(tensors(tmp_path / "sparse.onnx")[name][~mask], dense[name][~mask])
    facts = sparsify(read_model(tmp_path / "dense.onnx"), TWO_OF_FOUR).facts
    assert {fact.reason for fact in facts if fact.action == "kept"} == {"3 inputs are no multiple of 4"}
    stage = PruneStage(kind="prune", pattern="2:4", protect=("nothing",))
    assert [item.where for item in check(read_model(tmp_path / "dense.onnx"), {}, stage)] == ["protect.0"]


@pytest.mark.parametrize(
    ("build", "batches", "variant"),
    [
        (onnx_models.cnn, images, STATIC),
        (onnx_models.cnn, images, TENSOR),
        (onnx_models.transformer, tokens, DYNAMIC),
    ],
    ids=["per-channel", "per-tensor", "dynamic"],
)
def test_zero_stays_zero_in_the_quantized_file(
    build: Callable[[Path], Path], batches: Callable[[], Iterator[dict[str, np.ndarray]]], variant: Variant,
    tmp_path: Path,
) -> None:  # fmt: skip
    artifact, zeros = sparse(build(tmp_path / "raw.onnx"), tmp_path, PruneStage(kind="prune", sparsity=0.7))
    made = quantize(artifact, variant, QuantizationRules(), batches, tmp_path / "q.onnx")
    stored = tensors(made.path)
    checked = 0
    for name, mask in zeros.items():
        if f"{name}_quantized" not in stored:
            continue
        weight, point = (stored[f"{name}_{part}"] for part in ("quantized", "zero_point"))
        assert weight.dtype in (np.int8, np.uint8)
        distance = weight.astype(int) - (point.astype(int) if point.ndim == 0 else 0)
        assert not point.any() or point.ndim == 0
        mask = mask if mask.shape == weight.shape else mask.T  # a Gemm with transB becomes a MatMul
        assert (distance[mask] == 0).all(), name
        assert (distance[~mask] != 0).mean() > 0.5  # and the others are not
        checked += 1
    assert checked >= 3
