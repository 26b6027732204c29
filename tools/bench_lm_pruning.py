"""Half of a small causal language model against the same network from nothing (methods U1, N3).

python -m tools.bench_lm_pruning [--build build] [--work build/bench/lm-pruning] [--seeds 5]

The ``prune`` stage cuts neurons and key-value heads by activation, so that half of the parameters outside the
embedding go. For each seed a copy of the result, and the same network with newly drawn weights, are distilled from the
whole model for the same steps on the same text, drawn by the seed. Judged by perplexity on test. Resumable.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compressor.distil.generation import language_model
from compressor.distil.probes.paired import weigh
from compressor.prune import prune
from compressor.recipe import PruneStage
from tools.causal_lm import BATCH, Results, World, drawn, forget, open_world, perplexity, train

STAGE = PruneStage(kind="prune", neurons=0.56, heads=0.34, importance="activation")
CALIBRATION = 16  # blocks
STEPS, ROWS = 8, 4  # and blocks a step
JUDGED = 16  # test blocks
KD: list[dict[str, Any]] = [{"use": "kd", "options": {"temperature": 1.0}}]
RATES = {"pruned": 3e-4, "scratch": 1e-3}


def cut(world: World) -> nn.Module:
    """Half of the teacher, as the prune stage makes it."""
    calibration = drawn(world.train, CALIBRATION, 2000)
    rows = np.arange(CALIBRATION)
    batches = [
        {name: torch.from_numpy(value) for name, value in calibration.batch(rows[at : at + BATCH]).items()}
        for at in range(0, CALIBRATION, BATCH)
    ]
    return prune(world.teacher, batches[0], STAGE, batches).module


def from_nothing(module: nn.Module, seed: int) -> nn.Module:
    """The same network with weights drawn as the model's own configuration draws them."""
    made = copy.deepcopy(module)
    model: Any = language_model(made)
    spread = model.config.initializer_range
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, spread, generator=generator)
            else:
                parameter.fill_(1.0 if "norm" in name else 0.0)
    return made


def outside_embedding(module: nn.Module) -> int:
    """Parameters without the (tied) embedding."""
    model: Any = language_model(module)
    return int(sum(p.numel() for p in module.parameters()) - model.get_input_embeddings().weight.numel())


def arm(world: World, name: str, student: nn.Module, seed: int, work: Path) -> dict[str, Any]:
    """Distil and judge."""
    text = drawn(world.train, STEPS * ROWS, 1000 + seed)
    settings = {"objective": KD, "learning_rate": RATES[name], "batch": ROWS}
    train(student, world.teacher, text, settings, seed=seed, work=work, digest=world.model.provenance.digest)
    return {"perplexity": perplexity(student, world.test, JUDGED)}


def run(world: World, work: Path, seeds: int, results: Results) -> None:
    """Everything that has no figures yet."""
    missing = [(s, name) for s in range(1, seeds + 1) for name in RATES if f"{name}-{s}" not in results.rows]
    if not missing:
        return
    if "teacher" not in results.rows:
        facts = {"perplexity": perplexity(world.teacher, world.test, JUDGED)}
        results.add("teacher", {**facts, "outside_embedding": outside_embedding(world.teacher)})
    began = time.process_time()
    half = cut(world)
    if "half" not in results.rows:
        facts = {"perplexity": perplexity(half, world.test, JUDGED), "outside_embedding": outside_embedding(half)}
        results.add("half", {**facts, "prune_seconds": round(time.process_time() - began, 1)})
    for seed, name in missing:
        folder = work / f"{name}-{seed}"
        student = copy.deepcopy(half) if name == "pruned" else from_nothing(half, seed)
        results.add(f"{name}-{seed}", arm(world, name, student, seed, folder))
        forget(folder)


def table(results: Results, seeds: int) -> str:
    """A row a seed, and what the paired differences allow to say."""
    rows = results.rows
    whole, half = rows["teacher"], rows["half"]
    lines = [
        f"The whole model: {whole['outside_embedding'] / 1e6:.1f} M parameters outside the embedding, perplexity "
        f"{whole['perplexity']:.1f}. Pruned: {half['outside_embedding'] / 1e6:.1f} M, perplexity "
        f"{half['perplexity']:.1f} before any training.\n",
        f"| seed | pruned, {STEPS} steps of distillation | from nothing, the same {STEPS} steps |",
        "|---|---|---|",
    ]
    for seed in range(1, seeds + 1):
        kept, fresh = rows[f"pruned-{seed}"], rows[f"scratch-{seed}"]
        lines.append(f"| {seed} | {kept['perplexity']:.1f} | {fresh['perplexity']:.1f} |")
    found = weigh(
        [
            float(np.log(rows[f"scratch-{seed}"]["perplexity"] / rows[f"pruned-{seed}"]["perplexity"]))
            for seed in range(1, seeds + 1)
        ]
    )
    lines.append(
        f"\nLog of the quotient of perplexities: mean {found.mean:.3f}, 90 % interval {found.low:.3f} to "
        f"{found.high:.3f}; {found.wins} of {found.pairs} seeds won: {found.verdict}."
    )
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=Path("build"))
    parser.add_argument("--work", type=Path, default=Path("build/bench/lm-pruning"))
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    results = Results(options.work / "results.json")
    run(open_world(options.build), options.work, options.seeds, results)
    print(table(results, options.seeds))


if __name__ == "__main__":
    main()
