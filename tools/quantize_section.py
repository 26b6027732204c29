"""Page `docs/evidence/quantize.md`: two students, the files of five quantizers each, and the races of runtimes."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressor.types import write_atomic

Command = Callable[..., str]
HEAD = """# Quantizers side by side

`python -m tools.bench quantize`: on each student all quantizers got the same fp32 file and the same 256 calibration
samples on the same machine. Every file is scored sample by sample in ONNX Runtime; all are timed together, interleaved,
at one thread. "Answers changed": test samples whose class is another than fp32's.
"""


def page(command: Command, work: Path) -> str:
    """Make what is missing, run, lay out the tables. ``work``/rivals may hold the environments `olive`, `modelopt`."""
    folder = work / "quantize"
    folder.mkdir(parents=True, exist_ok=True)
    text = HEAD
    for title, model, words in (picture_student(command, folder), text_student(command, work)):
        call = [
            sys.executable,
            "-m",
            "tools.bench_quantize",
            model,
            "--work",
            folder / title.split()[0].lower(),
            *words,
        ]
        for name in ("olive", "modelopt"):
            call += [f"--{name}", work / "rivals" / name] if (work / "rivals" / name).is_dir() else []
        text += f"\n## {title}\n\n{command([str(word) for word in call])}"
    return text


def picture_student(command: Command, folder: Path) -> tuple[str, Path, list[object]]:
    """The student of recipes/fashion-mnist.toml after 8 epochs: what is judged is the quantizers."""
    recipe, out = folder / "fashion-mnist.toml", folder / "fashion-mnist"
    if not list(out.glob("store/export-student-*/model.onnx")):
        import tomli_w

        data: dict[str, Any] = tomllib.loads(Path("recipes/fashion-mnist.toml").read_text())
        data |= {"name": "fashion-mnist-8", "profiles": ["this-machine"], "null_twin": False}
        data["stage"][1] |= {"epochs": 8, "views": 2}
        write_atomic(recipe, tomli_w.dumps(data))
        words = ["run", recipe, "--model", "examples.fashion_mnist.model:teacher", "--out", out, "--json"]
        command([sys.executable, "-m", "compressor.cli", *map(str, words)], accept=(0, 3))
    (model,) = out.glob("store/export-student-*/model.onnx")
    words = ["--dump", "recipes/fashion-mnist.toml", "--factory", "examples.fashion_mnist.model:teacher"]
    return "Vision: Fashion-MNIST, a CNN of 183 k parameters", model, list(words)


def text_student(command: Command, work: Path) -> tuple[str, Path, list[object]]:
    """The first seed of recipes/movie-reviews-3-layers.toml, from the run of that section where there is one."""
    recipe = "recipes/movie-reviews-3-layers.toml"
    found = [path for root in (Path("build/text-3"), work / "runs") for path in root.glob("runs/*/report.json")]
    reports = [path for path in found if json.loads(path.read_text())["name"] == "movie-reviews-3-layers"]
    if not reports:
        words = [sys.executable, "-m", "compressor.cli", "run", recipe, "--out", str(work / "runs"), "--json"]
        reports = [Path(json.loads(command(words, accept=(0, 3)))["run"]) / "report.json"]
    artifacts = json.loads(reports[0].read_text())["artifacts"]
    model = (reports[0].parent / artifacts["student/fp32"]["path"]).resolve()
    return "Text: movie reviews, three layers of MiniLM", model, ["--dump", recipe]
