"""What on-policy distillation does for a small causal language model, and for its use as a draft (methods X1, X4).

python -m tools.bench_drafts [--build build] [--work build/bench/drafts] [--seeds 5] [--steps 12] [--report]

The student is four of the teacher's 30 layers with its embeddings. One warm start on text; from it, for each seed,
students that see equally many steps of the same text: cross-entropy (``ce``), off-policy distillation by forward and by
reverse KL (``kd``, ``kd-reverse``), reverse KL on what the student wrote itself (``gkd``), and forward KL on the text
and on its own writing in turn (``distillspec``). Judged by the teacher's likelihood of what each student writes, and by
how many of its proposals the teacher accepts, with real times of speculative decoding. Resumable: figures are kept in
``--work``. Divergence and share of own writing were chosen on validation, with a seed that is not judged.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.distil.generation import end_token, generate, language_model
from compressor.distil.probes.paired import FEWEST, weigh
from compressor.recipe import StudentStage
from compressor.students import make_student
from tools.bench_speculative import measure
from tools.causal_lm import BATCH, BLOCK, Results, World, drawn, forget, log_likelihoods, open_world, perplexity, train

LAYERS = (0, 10, 19, 29)
WARM_STEPS, STEPS = 120, 12
PROMPT, NEW = 16, BLOCK - 16
PROMPTS, TIMED = 24, 1  # beginnings that are judged, and that speculative decoding is timed on
AHEAD = (1, 2, 3, 4, 6, 8)  # lengths of proposals
TIMED_AHEAD = (2,)
ROUNDS = 5  # of each cost
KD: list[dict[str, Any]] = [{"use": "kd", "options": {"temperature": 1.0}}]
REVERSE: list[dict[str, Any]] = [{"use": "reverse-kl", "options": {"temperature": 1.0}}]
OWN = {"prompt_tokens": PROMPT, "max_new_tokens": NEW, "temperature": 1.0}
ARMS: dict[str, dict[str, Any]] = {
    "ce": {"objective": []},
    "kd": {"objective": KD},
    "gkd": {"objective": REVERSE, "rollouts": {"fraction": 1.0, **OWN}},
    "distillspec": {"objective": KD, "rollouts": {"fraction": 0.5, **OWN, "temperature": 0.3}},
    "kd-reverse": {"objective": REVERSE},
}
DRAFTS = ("ce", "distillspec")  # whose speed is measured
PAIRS = (("gkd", "kd-reverse"), ("gkd", "kd"), ("distillspec", "ce"), ("kd", "ce"))
RATE, WARM_RATE = 5e-4, 1e-3
FREEZE = ["*embed_tokens*"]  # two thirds of the student's parameters, and good as they are


def fresh(world: World) -> nn.Module:
    """The student before any training."""
    example = {name: torch.from_numpy(value) for name, value in world.train.batch(np.arange(2)).items()}
    config = StudentStage(kind="student", keep_layers=LAYERS)
    return make_student(world.teacher, config, example, seed=0).module


def warm(world: World, work: Path) -> nn.Module:
    """The start that all arms share: trained on text alone, as a draft usually is."""
    student = fresh(world)
    text = drawn(world.train, WARM_STEPS * BATCH, 0)
    train(
        student, None, text, {"objective": [], "learning_rate": WARM_RATE, "freeze": FREEZE}, seed=0, work=work / "warm"
    )
    return student


def arm(world: World, start: nn.Module, name: str, seed: int, work: Path, steps: int = STEPS) -> nn.Module:
    """One student of a seed; those of a seed read the same blocks in the same order."""
    student = copy.deepcopy(start)
    text = drawn(world.train, steps * BATCH, 1000 + seed)
    teacher = None if name == "ce" else world.teacher
    settings = {"learning_rate": RATE, "freeze": FREEZE, **ARMS[name]}
    train(student, teacher, text, settings, seed=seed, work=work, digest=world.model.provenance.digest)
    return student.eval()


def judged(world: World, student: nn.Module, seed: int) -> dict[str, float]:
    """The teacher's and the student's own mean log-likelihood of a token that the student drew (temperature 1)."""
    end = end_token(world.teacher)
    made = generate(student, world.prompts(PROMPTS, PROMPT), NEW, temperature=1.0, seed=seed, end=end)
    written = made.mask[:, PROMPT:] != 0
    theirs, own = (log_likelihoods(m, made.ids)[:, PROMPT - 1 :][written].mean() for m in (world.teacher, student))
    kinds = len(torch.unique(made.ids[:, PROMPT:][written])) / int(written.sum())
    return {"teacher_ll": float(theirs), "own_ll": float(own), "distinct": kinds, "tokens": int(written.sum())}


def teacher_text(world: World, work: Path) -> Tensor:
    """The teacher's own greedy continuations, int64 (B, T); made once."""
    file = work / "teacher-text.npy"
    if not file.is_file():
        np.save(file, generate(world.teacher, world.prompts(PROMPTS, PROMPT), NEW).ids.numpy())
    return torch.from_numpy(np.load(file, allow_pickle=False))


def distributions(module: nn.Module, text: Tensor) -> Tensor:
    """Next-token probabilities after the prompts, float16 (B, n, V)."""
    with torch.no_grad():
        parts = [module(part, torch.ones_like(part))[:, PROMPT - 1 : -1].softmax(-1).half() for part in text.split(8)]
    return torch.cat(parts)


def overlap(target: Tensor, draft: Tensor) -> float:
    """Mean over the target's text of sum min(p, q): the rate at which drawn proposals are accepted (temperature 1)."""
    pairs = zip(target, draft, strict=True)
    return float(torch.stack([torch.minimum(p.float(), q.float()).sum(-1).mean() for p, q in pairs]).mean())


def agreement(draft: Tensor, text: Tensor) -> Tensor:
    """Where the student's likeliest token is the teacher's, bool (B, n). At temperature 0 acceptance is just this."""
    return draft.argmax(-1) == text[:, PROMPT:]


def block_efficiency(agrees: Tensor, ahead: int) -> float:
    """Mean tokens a pass of the target gives with proposals of ``ahead`` tokens; at most ``ahead`` + 1.

    >>> block_efficiency(torch.tensor([[True, True, False, True, False, True]]), 2)
    3.0
    """
    passes = written = 0
    for row in agrees.tolist():
        at = 0
        while at < len(row):
            wrong = next((i for i, good in enumerate(row[at : at + ahead]) if not good), len(row[at : at + ahead]))
            at += wrong + 1
            passes += 1
        written += at
    return written / passes


def evaluate(
    world: World, student: nn.Module, seed: int, target: tuple[Tensor, Tensor], *, timed: bool
) -> dict[str, Any]:
    """All figures of one student; ``target``: the teacher's text and its probabilities there."""
    text, wanted = target
    found = distributions(student, text)
    agrees = agreement(found, text)
    row: dict[str, Any] = {
        "perplexity": perplexity(student, world.test, PROMPTS),
        **judged(world, student, seed),
        "accepted": float(agrees.float().mean()),
        "overlap": overlap(wanted, found),
        "efficiency": {str(k): block_efficiency(agrees, k) for k in AHEAD},
    }
    if timed:
        prompts = world.prompts(PROMPTS, PROMPT)[:: PROMPTS // TIMED]
        row["timed"] = {str(k): measure(world.teacher, student, prompts, NEW, k) for k in TIMED_AHEAD}
    return row


def costs(world: World, student: nn.Module) -> dict[str, Any]:
    """Seconds of processor time of one pass: the target reads 1 to 9 tokens, the draft one, after 40 in the cache."""
    ids = world.prompts(1, 40)

    def of(module: nn.Module, tokens: int) -> float:
        model = language_model(module)
        found = []
        for _ in range(ROUNDS):
            cache = model(input_ids=ids, use_cache=True).past_key_values
            started = time.process_time()
            model(input_ids=ids[:, :tokens], past_key_values=cache, use_cache=True)
            found.append(time.process_time() - started)
        return float(np.median(found))

    with torch.no_grad():
        target = {str(k + 1): of(world.teacher, k + 1) for k in (0, *AHEAD)}
        return {"target": target, "draft": of(student, 1)}


def projected(row: Mapping[str, Any], cost: Mapping[str, Any], ahead: int) -> float:
    """Speed-up by counted tokens and measured costs: tokens a pass times the plain pass over what a pass costs."""
    spent = cost["target"][str(ahead + 1)] + ahead * cost["draft"]
    return float(row["efficiency"][str(ahead)] * cost["target"]["1"] / spent)


def run(world: World, work: Path, seeds: Sequence[int], results: Results, steps: int = STEPS) -> None:
    """Everything that has no figures yet."""
    missing = [(seed, name) for seed in seeds for name in ARMS if f"{name}-{seed}" not in results.rows]
    if not missing:
        return
    start = warm(world, work)
    text = teacher_text(world, work)
    target = text, distributions(world.teacher, text)
    if "start" not in results.rows:
        results.add("start", evaluate(world, start, 0, target, timed=False))
    if "costs" not in results.rows:
        results.add("costs", costs(world, start))
    for seed, name in missing:
        folder = work / f"{name}-{seed}"
        student = arm(world, start, name, seed, folder, steps)
        results.add(f"{name}-{seed}", evaluate(world, student, seed, target, timed=name in DRAFTS))
        forget(folder)


def table(results: Results, seeds: Sequence[int]) -> str:
    """Means over the seeds, and what the paired differences allow to say."""
    rows = results.rows
    lines = [
        "| | perplexity of the text | teacher's log-likelihood of a token it wrote | its own | accepted, greedy "
        f"| accepted, drawn | tokens a pass, greedy, {', '.join(map(str, AHEAD))} proposed |",
        "|---|---|---|---|---|---|---|",
        _line("start (one run)", [rows["start"]]),
    ]
    for name in ARMS:
        found = _done(results, seeds, name)
        if found:
            lines.append(_line(f"{name} (seeds {', '.join(map(str, found))})", [rows[f"{name}-{s}"] for s in found]))
    lines += ["", "| paired difference | mean | 90 % interval | seeds won | verdict |", "|---|---|---|---|---|"]
    read: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "teacher's log-likelihood": lambda row: float(row["teacher_ll"]),
        "accepted, greedy": lambda row: float(row["accepted"]),
        "accepted, drawn": lambda row: float(row["overlap"]),
        "tokens a pass, 3 proposed": lambda row: float(row["efficiency"]["3"]),
    }
    for what, value in read.items():
        for better, worse in PAIRS:
            pairs = _done(results, seeds, better, worse)
            if len(pairs) < FEWEST:
                continue
            told = weigh([value(rows[f"{better}-{s}"]) - value(rows[f"{worse}-{s}"]) for s in pairs])
            lines.append(
                f"| {what}: {better} - {worse} | {told.mean:+.4f} | {told.low:+.4f} to {told.high:+.4f} "
                f"| {told.wins} of {told.pairs} | {told.verdict} |"
            )
    return "\n".join([*lines, "", *_speeds(results, seeds)])


def _done(results: Results, seeds: Sequence[int], *names: str) -> list[int]:
    """The seeds that have figures of all these arms."""
    return [seed for seed in seeds if all(f"{name}-{seed}" in results.rows for name in names)]


def _line(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    def mean(read: Callable[[Mapping[str, Any]], float]) -> float:
        return float(np.mean([read(row) for row in rows]))

    passes = ", ".join(f"{np.mean([row['efficiency'][str(k)] for row in rows]):.2f}" for k in AHEAD)
    return (
        f"| {name} | {mean(lambda row: row['perplexity']):.1f} | {mean(lambda row: row['teacher_ll']):.3f} "
        f"| {mean(lambda row: row['own_ll']):.3f} | {mean(lambda row: row['accepted']):.1%} "
        f"| {mean(lambda row: row['overlap']):.1%} | {passes} |"
    )


def _speeds(results: Results, seeds: Sequence[int]) -> list[str]:
    """Measured speed of speculative decoding, and by counted tokens and measured costs for every length."""
    rows, cost = results.rows, results.rows["costs"]
    passes = ", ".join(f"{tokens}: {seconds * 1000:.0f}" for tokens, seconds in cost["target"].items())
    lines = [
        f"Processor time of one pass in ms: draft, one token: {cost['draft'] * 1000:.0f}; target, tokens: {passes}.",
        "",
        "| draft | proposed | tokens a pass | measured, wall clock | measured, processor time | same text |",
        "|---|---|---|---|---|---|",
    ]
    for name in DRAFTS:
        for ahead in map(str, TIMED_AHEAD):
            found = [rows[f"{name}-{seed}"]["timed"][ahead] for seed in _done(results, seeds, name)]
            keys = ("tokens_per_pass", "speedup", "speedup_processor", "same")
            one, wall, processor, same = (float(np.mean([row[key] for row in found])) for key in keys)
            lines.append(f"| {name} | {ahead} | {one:.2f} | {wall:.2f}x | {processor:.2f}x | {same:.0%} |")
    lines += ["", "| draft | by counted tokens and the costs above, proposed: " + " | ".join(map(str, AHEAD)) + " |"]
    lines.append("|---" * (len(AHEAD) + 1) + "|")
    for name in ARMS:
        own = [rows[f"{name}-{seed}"] for seed in _done(results, seeds, name)]
        cells = (np.mean([projected(row, cost, k) for row in own]) if own else float("nan") for k in AHEAD)
        lines.append(f"| {name} | " + " | ".join(f"{cell:.2f}x" for cell in cells) + " |")
    return lines


def main() -> None:
    """Train what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build"))
    parser.add_argument("--work", type=Path, default=Path("build/bench/drafts"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="of each arm; another number wants a --work of its own"
    )
    parser.add_argument("--report", action="store_true", help="train nothing, print what is there")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = Results(options.work / "results.json")
    seeds = range(1, options.seeds + 1)
    if not options.report:
        run(open_world(options.build), options.work, seeds, results, options.steps)
    print(table(results, seeds))


if __name__ == "__main__":
    main()
