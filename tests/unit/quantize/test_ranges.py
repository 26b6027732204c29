"""Calibration: exact ranges, histograms, the cache."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import StageError
from compressor.quantize.prepare import prepare
from compressor.quantize.ranges import BINS, collect, entropy_range, percentile_range
from tests import onnx_models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return prepare(onnx.load(onnx_models.cnn(tmp_path_factory.mktemp("m") / "m.onnx")))


def test_min_max_is_exact_however_the_data_is_cut(model):
    data = onnx_models.images(20)
    whole = collect(model, lambda: iter([data]), "minmax")
    parts = collect(model, lambda: iter([{"image": part} for part in np.array_split(data["image"], 7)]), "minmax")
    assert whole["image"] == (float(data["image"].min()), float(data["image"].max()))
    assert whole["r0"][0] == 0
    assert whole.keys() == parts.keys()
    for name, pair in whole.items():
        assert parts[name] == pytest.approx(pair, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_clipping_methods_give_narrower_ranges_that_hold_zero(model, method):
    data = onnx_models.images(40)
    data["image"][0, 0, 0, 0] = 60  # one outlier in 30,720 values
    plain = collect(model, lambda: iter([data]), "minmax")
    clipped = collect(model, lambda: iter([data]), method)
    assert clipped["image"][1] < 20 < plain["image"][1]
    for name, (low, high) in clipped.items():
        assert plain[name][0] - 1e-6 <= low <= 0 <= high <= plain[name][1] + 1e-6


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 1e4), st.floats(-5, 5))
def test_thresholds_stay_inside_the_range(seed, scale, shift):
    values = np.random.default_rng(seed).standard_normal(500) * scale + shift
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    counts = np.histogram(values, bins=BINS, range=(low, high))[0]
    for choose in (percentile_range, entropy_range):
        a, b = choose(counts, low, high)
        assert low <= a <= 0 <= b <= high * (1 + 1e-9)
        assert b > a


def test_percentile_cuts_the_stated_share():
    counts = np.zeros(1000, np.int64)
    counts[[0, 999]] = 1
    counts[400:600] = 500
    assert percentile_range(counts, -10, 10, share=99.9) == pytest.approx((-2.0, 2.0), abs=0.03)
    assert percentile_range(counts, -10, 10, share=100) == pytest.approx((-10, 10))


def test_a_second_variant_reads_the_cache_and_other_data_does_not(model, tmp_path):
    data = onnx_models.images(8)
    first = collect(model, lambda: iter([data]), "minmax", tmp_path)
    stored = list(tmp_path.iterdir())
    assert len(stored) == 1
    stored[0].write_text(stored[0].read_text().replace(str(first["image"][1]), "123.0"))
    assert collect(model, lambda: iter([data]), "minmax", tmp_path)["image"][1] == 123.0
    assert collect(model, lambda: iter([onnx_models.images(8, 9)]), "minmax", tmp_path)["image"][1] != 123.0
    assert collect(model, lambda: iter([data]), "percentile", tmp_path)["image"][1] != 123.0
    assert len(list(tmp_path.iterdir())) == 3


def test_no_data_nan_and_unfitting_data_are_errors(model):
    with pytest.raises(StageError, match="no calibration data"):
        collect(model, lambda: iter([]), "minmax")
    with pytest.raises(StageError, match="NaN"):
        collect(model, lambda: iter([{"image": np.full((1, 3, 16, 16), np.nan, np.float32)}]), "minmax")
    with pytest.raises(StageError, match="calibration data"):
        collect(model, lambda: iter([{"image": np.zeros((1, 3), np.float32)}]), "minmax")
