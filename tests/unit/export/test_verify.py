"""Parity rows: exact differences, scaled tolerances, hidden specialisations."""

import numpy as np
import pytest

from compressor.errors import StageError
from compressor.export.verify import difference, variations, verify
from tests import onnx_models


def test_differences_are_exact_and_nan_or_another_shape_is_infinite():
    assert difference(np.array([1.0, -2.0]), np.array([1.5, -2.0])) == 0.5
    assert difference(np.array([np.inf, np.nan]), np.array([np.inf, np.nan])) == 0
    assert difference(np.array([1.0]), np.array([np.nan])) == np.inf
    assert difference(np.ones(2), np.ones((2, 1))) == np.inf
    assert difference(np.array([np.inf]), np.array([1.0])) == np.inf


def test_the_tolerance_grows_with_the_reference_and_a_wrong_output_fails(tmp_path):
    path = onnx_models.cnn(tmp_path / "m.onnx")

    def scaled(factor):
        return lambda inputs: {"logits": onnx_models.run(path, dict(inputs)) + np.float32(factor)}

    good = verify(scaled(0), path, [onnx_models.images(4)], artifact="student")[0]
    bad = verify(scaled(1e-2), path, [onnx_models.images(4)])[0]
    assert (good.artifact, good.output, good.worst, good.passed) == ("student", "logits", 0.0, True)
    assert bad.worst == pytest.approx(1e-2, rel=1e-3)
    assert not bad.passed
    far = verify(lambda x: {"logits": onnx_models.run(path, dict(x)) + np.float32(1000)}, path, [onnx_models.images(2)])
    assert far[0].tolerance == pytest.approx(0.1, rel=0.05)


def test_other_batch_sizes_and_lengths_are_tried_where_the_file_leaves_them_open():
    batch = {"ids": np.zeros((5, 12), np.int64)}
    assert [v["ids"].shape for v in variations(batch, {"ids": ["batch", "sequence"]})] == [
        (5, 12),
        (1, 12),
        (3, 12),
        (5, 6),
    ]
    assert [v["ids"].shape for v in variations(batch, {"ids": [5, 12]})] == [(5, 12)]


def test_no_data_and_a_missing_output_are_errors(tmp_path):
    path = onnx_models.cnn(tmp_path / "m.onnx")
    with pytest.raises(StageError, match="no batches"):
        verify(lambda x: {}, path, [])
    with pytest.raises(StageError, match="no output `logits`"):
        verify(lambda x: {"other": np.zeros(1)}, path, [onnx_models.images(1)])
