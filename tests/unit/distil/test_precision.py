"""Which processors and networks bfloat16 is tried on."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from compressor.distil import precision  # noqa: E402
from tests.unit.distil.toy import Transformer, convnet  # noqa: E402

pytestmark = pytest.mark.train
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("features", "transformer", "convolutions"),
    [({"amx_bf16", "avx512_bf16"}, True, True), ({"avx512_bf16"}, True, False), (set(), False, False)],
)
def test_vector_bfloat16_is_tried_without_convolutions_only(monkeypatch, features, transformer, convolutions):
    monkeypatch.setattr(precision, "_processor_has", lambda: features.__contains__)
    assert precision.may_gain(Transformer(1), CPU) is transformer
    assert precision.may_gain(convnet(3, 5), CPU) is convolutions


def test_the_clock_decides_for_a_transformer(monkeypatch, tmp_path):
    inputs = {"input_ids": torch.ones(4, 6, dtype=torch.long), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    monkeypatch.setattr(precision, "_processor_has", lambda: {"avx512_bf16"}.__contains__)
    for gain, wanted in ((0.8, "bf16"), (0.9, "fp32")):
        monkeypatch.setattr(precision, "_probe", lambda *_, gain=gain: {"fp32": 1.0, "bf16": gain})
        notes = tmp_path / wanted
        assert precision.decide("auto", Transformer(1), inputs, CPU, notes).dtype == wanted
        monkeypatch.setattr(precision, "_probe", lambda *_: pytest.fail("timed twice"))
        assert precision.decide("auto", Transformer(1), inputs, CPU, notes).dtype == wanted
