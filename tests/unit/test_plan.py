"""What a plan says of the origin of each figure, before anything runs."""

from __future__ import annotations

import pytest

from compressor.plan import TargetView, profile_plan
from compressor.profile import load_profile


@pytest.mark.parametrize(
    ("profile", "runs", "accuracy", "latency"),
    [
        ("this-machine", "measured", "measured", "measured"),
        ("raspberry-pi-5", "measured", "proxy (same runtime on this machine)", "unavailable: no raspberry-pi-5"),
        ("ethos-u55-128", "simulated", "simulated", "unavailable: no ethos-u55-128 is attached: a simulator's speed"),
        ("numpy-reference", "simulated", "simulated", "unavailable: a simulator's speed"),
        ("geforce-rtx-4070", None, "proxy (ONNX Runtime on this machine)", "unavailable: no driver"),
    ],
)
def test_origin_of_figures(profile: str, runs: str | None, accuracy: str, latency: str) -> None:
    found = profile_plan(load_profile(profile), TargetView("any", True, runs, "no driver"), (), {})
    assert found.accuracy == accuracy
    assert found.latency.startswith(latency)
