"""Inputs for a model of which only the signature is known: to time it, and to see which kernels run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compressor.profile import HardwareProfile
from compressor.types import Array, TensorSpec

DEFAULT_SEQUENCE = 64  # length of a dynamic dimension that is not the batch, when the profile's options do not say


def random_inputs(specs: Sequence[TensorSpec], profile: HardwareProfile, seed: int) -> dict[str, Array]:
    """Plausible inputs: normal floats, token ids 0 and 1 (every vocabulary has them), masks of ones. Batch from the
    profile, other dynamic dimensions from its option ``max_sequence`` or 64."""
    generator = np.random.default_rng(seed)
    length = profile.runtime.sequence(int(profile.options.get("max_sequence", DEFAULT_SEQUENCE)))
    made: dict[str, Array] = {}
    for spec in specs:
        shape = [
            size if isinstance(size, int) else profile.runtime.batch if axis == 0 else length
            for axis, size in enumerate(spec.shape)
        ]
        if np.dtype(spec.dtype).kind == "f":
            made[spec.name] = generator.standard_normal(shape).astype(spec.dtype)
        elif "mask" in spec.name:
            made[spec.name] = np.ones(shape, spec.dtype)
        elif "type" in spec.name:
            made[spec.name] = np.zeros(shape, spec.dtype)
        else:
            made[spec.name] = generator.integers(0, 2, shape).astype(spec.dtype)
    return made
