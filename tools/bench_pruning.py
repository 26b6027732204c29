"""Pruning, measured on Fashion-MNIST: relevance without fine-tuning, and a comparison with Torch-Pruning.

    python -m tools.bench_pruning relevance
    PYTHONPATH=<folder with torch_pruning 1.6.1> python -m tools.bench_pruning rival

Torch-Pruning is not a dependency: `pip download --no-deps torch-pruning==1.6.1`, unpacked beside the project. Results
are kept one by one in ``<work>/pruning.json``, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.data.split import split_indices
from compressor.models.cost import count_macs, count_parameters
from compressor.prune import prune
from compressor.recipe import PruneStage
from examples.fashion_mnist.model import teacher
from examples.fashion_mnist.train_teacher import accuracy, augment, read_idx
from targets.layer_cost import LayerCost

DATA = Path("/usr/share/datasets/fashion-mnist")
SEEDS = range(5)
IMAGES, VIEWS, EPOCHS, BATCH = 10_000, 2, 4, 128
TESTED = 2_000  # test pictures for what is not trained
KINDS = ((False, "magnitude"), (False, "taylor"))  # (ranked over all layers, importance) of Torch-Pruning
EXAMPLE = {"image": torch.zeros(2, 1, 28, 28)}
Results = dict[str, Any]


def kept(path: Path, key: str, make: Callable[[], Any]) -> Any:
    """A result that is made once."""
    found: Results = json.loads(path.read_text()) if path.is_file() else {}
    if key not in found:
        value = make()
        found = json.loads(path.read_text()) if path.is_file() else {}
        found[key] = value
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1))
        print(key, json.dumps(value), flush=True)
    return found[key]


@cache
def parts() -> dict[str, tuple[Tensor, Tensor]]:
    """Train, calibration and test pictures with labels; train and calibration are the teacher's own split."""
    images, labels = read_idx(DATA, "train")
    split = split_indices(len(labels), {"validation": 5000, "calibration": 1000}, seed=0)
    chosen = {name: torch.from_numpy(split[name]) for name in ("train", "calibration")}
    return {name: (images[index], labels[index]) for name, index in chosen.items()} | {"test": read_idx(DATA, "t10k")}


def batches(images: Tensor, size: int = 32) -> list[dict[str, Tensor]]:
    return [{"image": part} for part in images.split(size)]


# relevance: 30 % of the filters, ten images a class, nothing trained


def ten_a_class(seed: int) -> Tensor:
    images, labels = parts()["train"]
    generator = np.random.default_rng(seed)
    chosen = [generator.choice(np.flatnonzero(labels.numpy() == label), 10, replace=False) for label in range(10)]
    return images[torch.from_numpy(generator.permutation(np.concatenate(chosen)))]


def without_training(importance: str, seed: int, scope: str) -> Results:
    config = PruneStage.model_validate({"kind": "prune", "channels": 0.3, "importance": importance, "scope": scope})
    data = batches(ten_a_class(seed), 20)
    done = prune(teacher(), EXAMPLE, config, data, seed=seed, repair=False)
    images, labels = (tensor[:TESTED] for tensor in parts()["test"])
    return {"test": accuracy(done.module, images, labels), "macs": done.macs_before / done.macs_after}


def relevance(path: Path) -> None:
    methods = ("relevance", "taylor", "activation", "activation-weight", "magnitude", "random")
    for scope in ("global",):  # as in the source
        print(f"\n{scope}\n| importance | accuracy on test, seeds 0-4 | mean |\n|---|---|---|")
        for method in methods:
            found = [
                kept(path, f"relevance/{scope}/{method}/{seed}", partial(without_training, method, seed, scope))
                for seed in SEEDS
            ]
            scores = [100 * item["test"] for item in found]
            print(f"| `{method}` | {', '.join(f'{score:.2f}' for score in scores)} | {np.mean(scores):.2f} |")


# the rival: the same latency, the same training


@cache
def lesson() -> tuple[Tensor, Tensor, Tensor]:
    """``VIEWS`` augmented views of the first train pictures, their labels and the teacher's logits."""
    images, labels = (tensor[:IMAGES] for tensor in parts()["train"])
    generator = torch.Generator().manual_seed(0)
    views = torch.cat([augment(images, generator) for _ in range(VIEWS)])
    module = teacher()
    with torch.inference_mode():
        logits = torch.cat([module(part) for part in views.split(500)])
    return views, labels.repeat(VIEWS), logits.clone()


def train(student: nn.Module, seed: int, epochs: int = EPOCHS) -> float:
    """Accuracy on test after ``epochs`` of kd (temperature 2, 0.9 teacher and 0.1 labels); an epoch sees one view."""
    views, labels, logits = lesson()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    student.train().requires_grad_(True)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = IMAGES // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.1, total_steps=steps * epochs, pct_start=0.2)
    for epoch in range(epochs):
        order = torch.randperm(IMAGES, generator=generator) + IMAGES * (epoch % VIEWS)
        for index in order.split(BATCH)[:steps]:
            out = student(views[index])
            soft = F.kl_div((out / 2).log_softmax(1), (logits[index] / 2).log_softmax(1), log_target=True)
            loss = 0.9 * 4 * soft * out.shape[1] + 0.1 * F.cross_entropy(out, labels[index])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
    return float(accuracy(student, *parts()["test"]))


def latencies(modules: dict[str, nn.Module], folder: Path, rounds: int = 60) -> dict[str, float]:
    """p50 in ms of the exported files in ONNX Runtime with one thread, runs interleaved."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in modules.items():
        path = folder / "measured.onnx"
        torch.onnx.export(module.eval(), (EXAMPLE["image"][:1],), path, dynamo=False, input_names=["image"])
        sessions[name] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    data = {"image": np.zeros((1, 1, 28, 28), np.float32)}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, session in sessions.items():
            session.run(None, data)
            for _ in range(3):
                start = time.perf_counter()
                session.run(None, data)
                times[name].append(time.perf_counter() - start)
    return {name: 1000 * float(np.median(values)) for name, values in times.items()}


def ours(seed: int, ratios: Results) -> nn.Module:
    calibration = parts()["calibration"][0]
    order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(seed))
    data = batches(calibration[order[:512]])
    config = PruneStage(kind="prune", **ratios)
    return prune(teacher(), EXAMPLE, config, data, round_to=8, seed=seed, cost=LayerCost()).module


def theirs(ratio: float, round_to: int, everywhere: bool, method: str = "magnitude", seed: int = 0) -> nn.Module:
    """Torch-Pruning as its README says: group L2 magnitude (or group Taylor), the classifier left alone, rounded."""
    import torch_pruning  # type: ignore[import-not-found]

    module = teacher().requires_grad_(True)
    if method == "taylor":  # gradients of the loss on labelled calibration pictures, as its manual does
        images, labels = parts()["calibration"]
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:512]
        for index in order.split(32):
            F.cross_entropy(module(images[index]), labels[index]).backward()
    importance = (
        torch_pruning.importance.GroupTaylorImportance()
        if method == "taylor"
        else torch_pruning.importance.GroupMagnitudeImportance(p=2)
    )
    pruner = torch_pruning.pruner.BasePruner(
        module, EXAMPLE["image"], importance=importance, global_pruning=everywhere, pruning_ratio=ratio,
        ignored_layers=[module.head], round_to=round_to, max_pruning_ratio=0.95,
    )  # fmt: skip
    pruner.step()
    return module


def grid() -> Iterator[tuple[float, int, bool, str]]:
    for everywhere, method in KINDS:
        for round_to in (8, 16):
            for ratio in np.arange(0.5, 0.93, 0.03):
                yield round(float(ratio), 2), round_to, everywhere, method


def matched(path: Path, wanted: nn.Module) -> dict[str, Any]:
    """Torch-Pruning's largest network (by MACs) of every kind whose p50 is at most 5 % above ours."""

    def search() -> Results:
        found: Results = {}
        for everywhere, method in KINDS:
            candidates = {}
            for ratio, round_to, where, how in grid():
                if (where, how) == (everywhere, method):
                    candidates[f"{ratio}/{round_to}"] = theirs(ratio, round_to, where, how)
            times = latencies({"teacher": teacher(), "ours": wanted, **candidates}, path.parent)
            fitting = [name for name in candidates if times[name] <= 1.05 * times["ours"]]
            if not fitting:  # nothing of theirs is as fast: its fastest, and the table shows both latencies
                fitting = [min(candidates, key=lambda name: times[name])]
            best = max(fitting, key=lambda name: count_macs(candidates[name], EXAMPLE))
            wish, multiple = best.split("/")
            found[f"{'global' if everywhere else 'uniform'} {method}"] = {
                "ratio": float(wish), "round_to": int(multiple), "everywhere": everywhere, "method": method,
                "ms": times[best], "ours_ms": times["ours"], "teacher_ms": times["teacher"],
                "macs": count_macs(candidates[best], EXAMPLE), "parameters": count_parameters(candidates[best]),
            }  # fmt: skip
        return found

    found: dict[str, Any] = kept(path, "rival/matched", search)
    return found


def _trained(make: Callable[[], nn.Module], seed: int) -> float:
    return train(make(), seed)


def _key(name: str, how: Results, seed: int) -> str:
    return f"rival/{name}/{how['ratio']}/{how['round_to']}/{seed}" if "ratio" in how else f"rival/{name}/{seed}"


def rival(path: Path, wish: Results) -> None:
    """Five seeds of ours against Torch-Pruning's networks of the same latency."""
    first = ours(0, wish)
    print(first)
    macs = count_macs(teacher(), EXAMPLE), count_macs(first, EXAMPLE)
    print(f"ours: {macs[0] / macs[1]:.2f}x fewer MACs, {count_parameters(first)} parameters")
    kinds = matched(path, first)
    for seed in SEEDS:
        kept(path, f"rival/ours/{seed}", partial(_trained, partial(ours, seed, wish), seed))
        for name, how in kinds.items():
            settings = how["ratio"], how["round_to"], how["everywhere"], how["method"]
            kept(path, _key(name, how, seed), partial(_trained, partial(theirs, *settings, seed), seed))
    print("| tool | MACs | p50 | accuracy on test, seeds 0-4 | mean | ours higher |\n|---|---|---|---|---|---|")
    own = [100 * kept(path, f"rival/ours/{seed}", lambda: None) for seed in SEEDS]
    for name in ("ours", *kinds):
        how = kinds.get(name, {"macs": macs[1], "ms": next(iter(kinds.values()))["ours_ms"]})
        scores = [100 * kept(path, _key(name, how, seed), lambda: None) for seed in SEEDS]
        wins = sum(a > b for a, b in zip(own, scores, strict=True))
        print(
            f"| {name} | {how['macs'] / 1e6:.2f} M | {how['ms']:.3f} ms | {', '.join(f'{s:.2f}' for s in scores)} | "
            f"{np.mean(scores):.2f} | {wins if name != 'ours' else ''} |"
        )


WISH: Results = {"layers": 1, "scope": "latency", "target_speedup": 4.2, "importance": "activation"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("relevance", "rival", "all"))
    parser.add_argument("--work", type=Path, default=Path("build/bench"))
    args = parser.parse_args()
    if args.part in ("relevance", "all"):
        relevance(args.work / "pruning.json")
    if args.part in ("rival", "all"):
        rival(args.work / "pruning.json", WISH)


if __name__ == "__main__":
    main()
