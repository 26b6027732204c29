"""Cut one labelled set into disjoint parts by seed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def split_indices(count: int, sizes: Mapping[str, int], seed: int) -> dict[str, np.ndarray]:
    """Draw disjoint parts of ``range(count)``; what is left over is ``train``.

    ``sizes`` maps a part's name to its number of samples, drawn in that order from one permutation, so that the same
    call gives the same parts on every machine. Each part is returned sorted (int64).

    >>> parts = split_indices(10, {"validation": 2, "calibration": 3}, seed=0)
    >>> {name: len(part) for name, part in parts.items()}
    {'validation': 2, 'calibration': 3, 'train': 5}
    """
    wanted = sum(sizes.values())
    if any(size < 0 for size in sizes.values()) or wanted >= count:
        raise ValueError(f"cannot take {dict(sizes)} from {count} samples and leave any for train")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(count)
    parts: dict[str, np.ndarray] = {}
    start = 0
    for name, size in sizes.items():
        parts[name] = np.sort(order[start : start + size])
        start += size
    parts["train"] = np.sort(order[start:])
    return parts
