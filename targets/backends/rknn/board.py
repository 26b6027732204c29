"""Run the model on a Rockchip board. Needs Python, numpy and rknn-toolkit-lite2 there; nothing of what made the model.

python run_on_board.py --self-check     # repeat the package's stored answers, say how far the board is from them
python run_on_board.py --benchmark      # time one inference, arrays in and arrays out
python run_on_board.py inputs.npz       # your own inputs by name; writes outputs.npz
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Dict, Tuple  # noqa: UP035  boards have Python from 3.7 on

import numpy as np

HERE = Path(__file__).resolve().parent
Arrays = Dict[str, Any]  # noqa: UP006
Pair = Tuple[Arrays, Arrays]  # noqa: UP006
FACTS = json.loads((HERE / "board.json").read_text(encoding="utf-8"))


class Board:
    """The model on the NPU; ``run`` takes and gives arrays by name."""

    def __init__(self) -> None:
        from rknnlite.api import RKNNLite

        self._lite = RKNNLite()
        _check(self._lite.load_rknn(str(HERE / "model.rknn")), "load model.rknn")
        # chips with one core take no mask
        wanted = {} if FACTS["cores"] == "auto" else {"core_mask": getattr(RKNNLite, core_name(FACTS["cores"]))}
        _check(self._lite.init_runtime(**wanted), "start the runtime (is this the board that the model is for?)")

    def run(self, inputs: Arrays) -> Arrays:
        """One inference over inputs of at most the model's shapes; shorter token inputs are filled up with zeros."""
        values = [fitted(inputs[item["name"]], item) for item in FACTS["inputs"]]
        found = self._lite.inference(inputs=values, data_format=["nchw"] * len(values))
        if found is None:
            raise SystemExit("the NPU gave no outputs")
        return {name: found[place] for place, name in enumerate(FACTS["outputs"])}


def core_name(cores: str) -> str:
    """RKNNLite's constant for ``options.cores`` of the profile."""
    return f"NPU_CORE_{cores.upper()}"


def fitted(array: Any, item: dict[str, Any]) -> Any:
    """``array`` in the type and the shape that the file has."""
    shape = item["shape"]
    if array.ndim != len(shape) or any(array.shape[axis] > most for axis, most in enumerate(shape)):
        raise SystemExit(f"input {item['name']} is {array.shape}, the model takes {tuple(shape)}")
    edges = [(0, most - array.shape[axis]) for axis, most in enumerate(shape)]
    return np.pad(array, edges).astype(item["dtype"])


def samples(path: Path) -> list[Pair]:
    """The package's stored inputs with the portable model's answers."""
    found: dict[int, Pair] = {}
    with np.load(path, allow_pickle=False) as stored:
        for key in stored.files:
            number, part, name = key.split(".", 2)
            if part in ("input", "output"):
                found.setdefault(int(number), ({}, {}))[part == "output"][name] = stored[key]
    return [found[number] for number in sorted(found)]


def self_check(board: Board, pairs: list[Pair]) -> int:
    """Largest difference relative to the largest value, and how often the largest entry is at the same place."""
    name, worst, equal = FACTS["outputs"][0], 0.0, 0
    for inputs, expected in pairs:
        wanted = expected[name]
        got = board.run(inputs)[name][tuple(slice(size) for size in wanted.shape)]
        worst = max(worst, float(np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-9)))
        equal += int(np.array_equal(got.argmax(-1), wanted.argmax(-1)))
    say(f"{equal} of {len(pairs)} stored answers agree; worst difference {worst:.3g} of the largest value")
    return 0 if equal == len(pairs) else 1


def benchmark(board: Board, inputs: Arrays, count: int = 100) -> None:
    for _ in range(10):
        board.run(inputs)
    times = []
    for _ in range(count):
        before = time.perf_counter()
        board.run(inputs)
        times.append((time.perf_counter() - before) * 1e3)
    times.sort()
    say(f"p50 {statistics.median(times):.3f} ms, p95 {times[int(count * 0.95)]:.3f} ms over {count} runs")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def _check(code: int, doing: str) -> None:
    if code != 0:
        raise SystemExit(f"could not {doing}: code {code}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="?", type=Path, help="an .npz of inputs by name")
    parser.add_argument("--self-check", action="store_true")
    parser.add_argument("--benchmark", action="store_true")
    parser.add_argument("--samples", type=Path, default=HERE.parent / "samples.npz")
    parser.add_argument("--out", type=Path, default=Path("outputs.npz"))
    options = parser.parse_args()
    board = Board()
    if options.inputs is not None:
        with np.load(options.inputs, allow_pickle=False) as stored:
            np.savez(options.out, **board.run({name: stored[name] for name in stored.files}))
        return 0
    pairs = samples(options.samples)
    if options.benchmark:
        benchmark(board, pairs[0][0])
    return self_check(board, pairs) if options.self_check or not options.benchmark else 0


if __name__ == "__main__":
    sys.exit(main())
