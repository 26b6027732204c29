"""The claims, measured: each section runs the user's own commands and writes ``docs/evidence/<section>``.

    python -m tools.bench [SECTION ...] [--work build/bench]      (all sections: about 90 minutes on 2 idle cores)

Figures in the README and the docs are copied from what these print. A section whose input cannot be had says so and is
left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from tools.evidence import CLI, EVIDENCE, ROOT, command, newest, run_recipe


def fashion_mnist(work: Path) -> None:
    """Vision: a ResNet-9 teacher and its student on the full Fashion-MNIST."""
    words = ["recipes/fashion-mnist.toml", "--model", "examples.fashion_mnist.model:teacher"]
    run_recipe("fashion-mnist", work, *words)


def movie_reviews(work: Path) -> None:
    """Text: MiniLM-L6 fine-tuned on movie reviews, and its student."""
    if not (ROOT / "build/movie-reviews/train.csv").is_file():
        command([sys.executable, "-m", "examples.movie_reviews.prepare"])
    if not (ROOT / "build/movie-teacher/config.json").is_file():
        command([sys.executable, "-m", "examples.movie_reviews.train_teacher"])
    run_recipe("movie-reviews", work, "recipes/movie-reviews.toml")


def debian_search(work: Path) -> None:
    """Retrieval: MiniLM-L6 and a student of three layers with vectors of 128, on descriptions of Debian's packages."""
    if not (ROOT / "build/debian-search/train.csv").is_file():
        command([sys.executable, "-m", "examples.debian_search.prepare"])
    run = run_recipe("debian-search", work, "recipes/debian-search.toml")
    text = command([sys.executable, "-m", "tools.search_check", str(run)])
    page = "# The search encoder and its package\n\n`python -m tools.search_check RUN`, queries of the test set:\n\n"
    (EVIDENCE / "debian-search" / "package.md").write_text(page + text)


def text_structure(work: Path) -> None:
    """The text teacher five times faster by structure alone: learnt masks, Minitron's cut, truncation."""
    from tools.text_structure import page

    text = page(
        lambda recipe: run_recipe(Path(recipe).stem, work, recipe),
        lambda folder: dict(json.loads((folder / "report.json").read_text())),
    )
    (EVIDENCE / "text-structure.md").write_text(text)


def sparsity(work: Path) -> None:
    """Nine of ten weights zero: speed, bytes, and SquareHead against labels alone on paired seeds."""
    from tools.sparsity import page

    words = ["recipes/sparse-digits.toml", "--model", "examples.digits.model:teacher", "--data", "examples.digits:load"]
    folder = run_recipe("sparsity", work, *words, "--seeds", "5")
    (EVIDENCE / "sparsity.md").write_text(page(folder, json.loads((folder / "report.json").read_text())))


def mobilenet_v2(work: Path) -> None:
    """MobileNetV2 with ImageNet weights on natural pictures."""
    words = ["recipes/mobilenet-v2.toml", "--model", "examples.mobilenet_v2.model:teacher"]
    run_recipe("mobilenet-v2", work, *words, "--data", "examples.mobilenet_v2:load")


def public_models(work: Path) -> None:
    """ONNX files that no one here trained, through the post-training path."""
    from tools.public_page import page

    (EVIDENCE / "public-models.md").write_text(page(command, work))


def distil_speed(work: Path) -> None:
    """A distillation step beside a hand-written one and beside torchdistill's, and the memory of relations."""
    from tools.distil_speed import page

    (EVIDENCE / "distil-speed.md").write_text(page(command, work))


def text_3_layers(work: Path) -> None:
    """The recommended recipe on the text task: half of the teacher's layers, against its null twin on five seeds."""
    if not (ROOT / "build/movie-reviews/train.csv").is_file():
        command([sys.executable, "-m", "examples.movie_reviews.prepare"])
    if not (ROOT / "build/movie-teacher/config.json").is_file():
        command([sys.executable, "-m", "examples.movie_reviews.train_teacher"])
    run_recipe("text-3-layers", work, "recipes/movie-reviews-3-layers.toml", "--seeds", "5")


def methods(_work: Path) -> None:
    """Every objective's claim on paired seeds; scores stay under build/methods, so it goes on where it was stopped."""
    if not (ROOT / "build/movie-teacher/config.json").is_file():
        command([sys.executable, "-m", "examples.movie_reviews.prepare"])
        command([sys.executable, "-m", "examples.movie_reviews.train_teacher"])
    command([sys.executable, "-m", "tools.bench_methods", "--out", str(EVIDENCE / "methods.md")])


def repeatability(work: Path) -> None:
    """How often the ratio student/teacher repeats within 5 %, on the Fashion-MNIST files."""
    report = json.loads((EVIDENCE / "fashion-mnist" / "report.json").read_text())
    artifacts = report["artifacts"]
    run = work / "runs" / "runs" / report["digest"][:16]
    teacher = (run / artifacts["teacher/fp32"]["path"]).resolve()
    shipped = next(row["artifact"] for row in report["outcomes"][0]["rows"] if row["shipped"])
    student = (run / artifacts[shipped]["path"]).resolve()
    page = "# Repeatability of the latency ratio\n\nTen measurements from scratch, Fashion-MNIST teacher and student:\n"
    for threads in ("1", "2"):
        words = [
            sys.executable,
            "-m",
            "tools.repeatability",
            str(teacher),
            str(student),
            "--repeats",
            "10",
            "--threads",
            threads,
        ]
        page += f"\n```\n{command(words).strip()}\n```\n"
    (EVIDENCE / "repeatability.md").write_text(page)


def quantize(work: Path) -> None:
    """Ours beside Olive, NNCF, ModelOpt and ONNX Runtime's quantizers on two students."""
    from tools.quantize_section import page

    (EVIDENCE / "quantize.md").write_text(page(command, work))


def profiles_cost(work: Path) -> None:
    """Four profiles that share one student against one profile, and a second identical run; from empty stores."""
    words = ["recipes/digits.toml", "--model", "examples.digits.model:teacher", "--data", "examples.digits:load"]
    seconds: dict[str, float] = {}
    command([*CLI, "plan", *words, "--json"])  # trains the digits teacher once, outside of what is timed
    four = ("this-machine", "this-machine-2t", "raspberry-pi-5", "laptop-x86-vnni")
    for name, profiles in (("one profile", four[:1]), ("four profiles", four), ("four profiles, second run", four)):
        out = work / ("cost-" + name.split(",")[0].replace(" ", "-"))
        if "second" not in name:
            shutil.rmtree(out, ignore_errors=True)
        began = time.monotonic()
        flags = [word for profile in profiles for word in ("--profile", profile)]
        command([*CLI, "run", *words, *flags, "--out", str(out), "--json"], accept=(0, 3))
        seconds[name] = time.monotonic() - began
    lines = [f"| {name} | {value:.1f} s | {value / seconds['one profile']:.2f}x |" for name, value in seconds.items()]
    page = (
        "# What profiles cost\n\nThe digits demo, whole command, one after the other:\n\n| run | wall clock | ratio |\n"
    )
    page += "|---|---|---|\n"
    (EVIDENCE / "profiles-cost.md").write_text(page + "\n".join(lines) + "\n")


def causal_lm(work: Path) -> None:
    """A real small language model: on-policy distillation, drafts, and half of it against the same from nothing."""
    if not (ROOT / "build/smollm2").is_dir():
        command([sys.executable, "-m", "examples.smollm2.prepare"])
    drafts = command([sys.executable, "-m", "tools.bench_drafts", "--work", str(work / "drafts")])
    half = command([sys.executable, "-m", "tools.bench_lm_pruning", "--work", str(work / "lm-pruning")])
    page = "# A small causal language model\n\n`python -m tools.bench causal-lm`, one thread.\n\n"
    page += f"## Students that write, and drafts (`tools/bench_drafts.py`)\n\n{drafts}\n"
    page += f"## Half of the model (`tools/bench_lm_pruning.py`)\n\n{half}"
    (EVIDENCE / "causal-lm-tables.md").write_text(page)  # causal-lm.md says what they mean


def weight_only(work: Path) -> None:
    """Few-bit weights of the small language model: perplexity, size, time and memory. Prints the table."""
    if not (ROOT / "build/smollm2").is_dir():
        command([sys.executable, "-m", "examples.smollm2.prepare"])
    print(command([sys.executable, "-m", "tools.bench_weights", "--work", str(work / "weight-only")]))


def floats(work: Path) -> None:
    """float16, bfloat16 and float8 forms of real files, and what the overflow lint says. Prints the table."""
    print(command([sys.executable, "-m", "tools.bench_floats", "--work", str(work)]))


def grapheme_to_phoneme(work: Path) -> None:
    """Encoder-decoder: a T5 that spells words out in phonemes, and its student with one decoder layer."""
    if not (ROOT / "build/g2p/train.csv").is_file():
        command([sys.executable, "-m", "examples.grapheme_to_phoneme.prepare"])
    if not (ROOT / "build/g2p-teacher/config.json").is_file():
        command([sys.executable, "-m", "examples.grapheme_to_phoneme.train_teacher"])
    run = run_recipe("grapheme-to-phoneme", work, "recipes/grapheme-to-phoneme.toml")
    text = command([sys.executable, "-m", "tools.grapheme_to_phoneme", str(run)])
    (EVIDENCE / "grapheme-to-phoneme" / "README.md").write_text(text)


def importance_memory(_work: Path) -> None:
    """Peak memory of importance at 100 and at 10,000 calibration samples."""
    page = (
        "# Memory of importance on calibration data\n\n`python -m tools.bench importance-memory`, a process each.\n\n"
    )
    page += command([sys.executable, "-m", "tools.bench_importance_memory"])
    page += "\nAs float32, 10,000 of these pictures are 29.9 MiB; what differs is the allocator's, not the samples'.\n"
    (EVIDENCE / "importance-memory.md").write_text(page)


def searches(work: Path) -> None:
    """Do DisWOT's score and a super-net's loss rank students as training them does? Goes on where it was stopped."""
    made = work / "searches" / "page.md"
    command([sys.executable, "-m", "tools.bench_searches", "--work", str(work / "searches"), "--page", str(made)])
    page = "# Searches for a student: the tables\n\n`python -m tools.bench searches`, one thread.\n\n"
    (EVIDENCE / "searches-tables.md").write_text(page + made.read_text())  # searches.md says what they mean


def pruning(work: Path) -> None:
    """Ten times fewer operations; relevance without training; Torch-Pruning beside it; ONNX files. Prints tables."""
    words = ["recipes/fashion-mnist-structure.toml", "--model", "examples.fashion_mnist.model:teacher"]
    run_recipe("fashion-mnist-structure", work, *words)
    parts = ["relevance"] + (["rival"] if find_spec("torch_pruning") else [])
    if len(parts) == 1:
        print("torch_pruning is not importable: the comparison is left out", file=sys.stderr)
    for part in parts:
        print(command([sys.executable, "-m", "tools.bench_pruning", part, "--work", str(work)]))
    command([sys.executable, "-m", "tools.public_models", str(work / "public")])
    print(command([sys.executable, "-m", "tools.bench_onnx_pruning", str(work / "public")]))


def token_drop(_: Path) -> None:
    """The text teacher with fewer tokens after some blocks, untrained."""
    from tools.bench_tokens import page

    (EVIDENCE / "token-drop.md").write_text(page())


def delta(work: Path) -> None:
    """A fine-tuned update as a delta (Q4): MiniLM-L6 and its fine-tuning on movie reviews."""
    words = [sys.executable, "-m", "tools.bench_delta", "--work", os.path.relpath(work / "delta", ROOT)]
    page = "# An update as a delta\n\n`python -m tools.bench delta`: a classifier, its encoder as it was and as it "
    page += "was fine-tuned, 2,063 test sentences, one seed.\n\n" + command(words)
    (EVIDENCE / "delta.md").write_text(page)


def fashion_mnist_exits(work: Path) -> None:
    """The whole vision teacher with two exits: mean latency over the exits that real samples take."""
    words = ["recipes/fashion-mnist-exits.toml", "--model", "examples.fashion_mnist.model:teacher"]
    run_recipe("fashion-mnist-exits", work, *words)


def text_tokens(work: Path) -> None:
    """Whole reviews, half of whose tokens end after the second block, taught by the teacher that reads all of them."""
    run_recipe("text-tokens", work, "recipes/text-tokens.toml")


EVERYWHERE = {
    "fashion-mnist-everywhere": ["--model", "examples.fashion_mnist.model:teacher"],
    "movie-reviews-everywhere": [],
}


def everywhere(work: Path) -> None:
    """Both students on every device that has a profile: one report each."""
    for name, words in EVERYWHERE.items():
        run_recipe(name, work, f"recipes/{name}.toml", *words, "--profile", "all")


def race(work: Path) -> None:
    """The winner of the race on this machine beside each runtime configured by hand, on both students.

    ``work``/rivals/litert may hold an environment with litert-torch 0.10 and ai-edge-quantizer 0.10.
    """
    from tools.bench_race import HEAD

    page = HEAD
    python = work / "rivals" / "litert" / "bin" / "python"
    for name, words in EVERYWHERE.items():
        run = newest(work, name) or run_recipe(name, work, f"recipes/{name}.toml", *words, "--profile", "all")
        call = [sys.executable, "-m", "tools.bench_race", str(run), "--work", str(work / "race")]
        call += ["--factory", words[-1]] if words else []
        call += ["--litert", str(python)] if python.is_file() else []
        page += f"\n## {name}\n\n{command(call)}"
    (EVIDENCE / "race.md").write_text(page)


def qat(_work: Path) -> None:
    """Quantization-aware training with a teacher, with labels, and none; scores stay under build/qat."""
    command([sys.executable, "-m", "tools.bench_qat", "--out", str(EVIDENCE / "qat.md")])


def size_budget(work: Path) -> None:
    """A precision for each layer under a size budget, beside null twins of equal size. Prints tables of
    docs/evidence/mixed-precision.md."""
    print(command([sys.executable, "-m", "tools.bench_size_budget", "--work", str(work)]))


def accuracy_control(work: Path) -> None:
    """Layers put back until a promise holds, beside NNCF's accuracy control. Prints tables of the same page."""
    command([sys.executable, "-m", "tools.public_models", str(work / "public")])
    words = ["--work", str(work), "--public", str(work / "public")]
    print(command([sys.executable, "-m", "tools.bench_accuracy_control", *words]))


def transplant(work: Path) -> None:
    """A language model under another tokenizer, untrained."""
    from tools.bench_transplant import page

    (EVIDENCE / "transplant.md").write_text(page(work / "transplant"))


SECTIONS: dict[str, Callable[[Path], None]] = {
    "fashion-mnist": fashion_mnist,
    "movie-reviews": movie_reviews,
    "debian-search": debian_search,
    "public-models": public_models,
    "mobilenet-v2": mobilenet_v2,
    "distil-speed": distil_speed,
    "text-3-layers": text_3_layers,
    "methods": methods,
    "text-structure": text_structure,
    "sparsity": sparsity,
    "repeatability": repeatability,
    "profiles-cost": profiles_cost,
    "quantize": quantize,
    "qat": qat,
    "delta": delta,
    "causal-lm": causal_lm,
    "weight-only": weight_only,
    "floats": floats,
    "grapheme-to-phoneme": grapheme_to_phoneme,
    "importance-memory": importance_memory,
    "pruning": pruning,
    "searches": searches,
    "token-drop": token_drop,
    "transplant": transplant,
    "size-budget": size_budget,
    "accuracy-control": accuracy_control,
    "fashion-mnist-exits": fashion_mnist_exits,
    "text-tokens": text_tokens,
    "everywhere": everywhere,
    "race": race,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], help="default: all")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.sections or SECTIONS:
        print(f"== {name}", file=sys.stderr)
        SECTIONS[name](options.work.resolve())


if __name__ == "__main__":
    main()
