"""Handwritten digits that ship in scikit-learn: 1,797 grey pictures of 8x8 pixels (UCI Optical Recognition of
Handwritten Digits, test part), no download.

    compress-for-device run --data examples.digits:load --model examples.digits.model:teacher ...
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from compressor.data.split import split_indices

SEED = 0
TEST, VALIDATION, CALIBRATION = 0.2, 0.1, 100  # the test part is drawn per class

Part = tuple[np.ndarray, np.ndarray]  # uint8 (N, 8, 8, 1), int64 (N,)


def pictures() -> Part:
    """All pictures, grey values 0..16 scaled to 0..255, and their digits."""
    found = find_spec("sklearn")  # not imported: that takes four seconds, reading its file takes none
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("scikit-learn is not installed; it carries the digits")
    table = np.loadtxt(Path(found.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    pixels = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)[..., None]
    return pixels, table[:, -1].astype(np.int64)


def cut(labels: np.ndarray, seed: int = SEED) -> dict[str, np.ndarray]:
    """Positions of ``train validation calibration test``.

    Test is drawn class by class; the rest is cut by the tool's own ``split_indices``. The teacher is trained on exactly
    this ``train``, and :func:`load` hands all four parts to the tool, so that nothing the teacher learned from is ever
    used to choose or to judge a student.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    places = [random.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    test = np.sort(np.concatenate([place[: round(TEST * len(place))] for place in places]))
    rest = np.setdiff1d(np.arange(len(labels)), test)
    parts = split_indices(
        len(rest), {"validation": round(VALIDATION * len(rest)), "calibration": CALIBRATION}, seed=seed
    )
    return {**{name: rest[index] for name, index in parts.items()}, "test": test}


def load() -> dict[str, Part]:
    """The loader for ``--data examples.digits:load``."""
    pixels, labels = pictures()
    return {name: (pixels[index], labels[index]) for name, index in cut(labels).items()}
