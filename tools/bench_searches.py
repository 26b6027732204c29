"""Do the searches' proxies rank students as training does? DisWOT's score, and the loss of a super-net's sub-nets.

    python -m tools.bench_searches [--work build/bench/searches] [--seeds 3] [--page FILE]

Every trained network leaves its figure in the work folder, so that a stopped run goes on. One thread: about 12 minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.data.types import DataBundle
from compressor.distil.loop import distil
from compressor.models.cost import count_macs, count_parameters
from compressor.models.factory import build, remake
from compressor.recipe import DistilStage
from compressor.search import Search, Space, SuperNet, named
from compressor.students.search.diswot import Judge
from compressor.types import write_atomic
from tools.bench_methods import pictures

CANDIDATES, IMAGES, TESTED = 20, 4_000, 5_000
SPACE = Space(factory={"width": (4, 6, 8, 12), "first": (1, 2), "second": (1, 2), "third": (1, 2, 3), "growth": (1, 2)})
KD = {
    "kind": "distil", "epochs": 3, "batch": 64, "learning_rate": 3e-3, "precision": "fp32",
    "objective": [{"use": "kd", "weight": 0.5, "options": {"temperature": 4.0}}],
}  # fmt: skip
SCORES: Mapping[str, dict[str, Any]] = {
    "both terms (default)": {},
    "ICKD alone": {"terms": ("ickd",)},
    "SP alone": {"terms": ("sp",)},
    "both, narrower maps padded": {"widths": "pad"},
    "both, mean of 8 draws": {"draws": 8},
    "SP alone, mean of 8 draws": {"terms": ("sp",), "draws": 8},
}


class Residual(nn.Module):  # type: ignore[misc]  # torch is not typed here
    """x + BN(conv(ReLU(BN(conv x)))), the first convolution with a stride where the width changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside))
        self.two = nn.Sequential(nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside))
        same = stride == 1 and inside == outside
        self.way = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.way(x) + self.two(torch.relu(self.one(x))))


class Net(nn.Module):  # type: ignore[misc]  # torch is not typed here
    """Three stages of residual blocks at 14, 7 and 4 points, mean over space, a linear head."""

    def __init__(self, widths: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        made, inside = [], 1
        for width, count in zip(widths, blocks, strict=True):
            layers = [Residual(inside if at == 0 else width, width, 2 if at == 0 else 1) for at in range(count)]
            made.append(nn.Sequential(*layers))
            inside = width
        self.stages = nn.Sequential(*made)
        self.head = nn.Linear(inside, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.stages(image).mean((2, 3)))


def net(width: int = 16, first: int = 2, second: int = 2, third: int = 2, growth: int = 2) -> nn.Module:
    """The factory whose arguments are searched; the teacher is what it makes without any."""
    return Net([width, width * growth, width * growth**2], [first, second, third])


class Store:
    """Figures by name in one file, written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, key: str, work: Callable[[], Any]) -> Any:
        if key not in self.known:
            began = time.process_time()
            self.known[key] = {"value": work(), "cpu_seconds": round(time.process_time() - began, 1)}
            write_atomic(self.path, json.dumps(self.known, indent=1))
            print(key, self.known[key], flush=True)
        return self.known[key]["value"]

    def seconds(self, prefix: str) -> float:
        return float(sum(item["cpu_seconds"] for key, item in self.known.items() if key.startswith(prefix)))


def trained(
    folder: Path, student: nn.Module, teacher: nn.Module | None, data: DataBundle, stage: Mapping[str, Any], **more: Any
) -> Any:
    """One stage of training in ``folder``, which is left empty."""
    settings = {"seed": 0, "teacher_digest": "bench", "signals": {}, "labels_only": teacher is None} | more
    found = distil(
        student,
        teacher,
        data,
        DistilStage.model_validate(stage),
        work=folder / "work",
        bank=folder / "bank",
        **settings,
    )
    shutil.rmtree(folder / "work", ignore_errors=True)
    student.eval()
    return found


def keep(module: nn.Module, path: Path) -> None:
    """Write the weights; a file is whole or not there."""
    torch.save(module.state_dict(), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def accuracy(module: nn.Module, split: pictures.Pictures, count: int) -> float:
    assert split.labels is not None
    with torch.inference_mode():
        parts = [module(torch.from_numpy(part)) for part in np.array_split(split.pictures[:count], 10)]
    return 100 * float((torch.cat(parts).argmax(1).numpy() == split.labels[:count]).mean())


def teacher_of(folder: Path) -> nn.Module:
    """The teacher of the pictures, trained once on 6,000 of them."""
    path = folder / "teacher.pt"
    torch.manual_seed(1)
    module = build("tools.bench_searches:net")
    if not path.is_file():
        split = pictures.train("ten", 6_000)
        trained(folder, module, None, DataBundle(split, (), "f", {}), KD | {"labels": 1.0, "objective": []})
        keep(module, path)
    module.load_state_dict(torch.load(path, weights_only=True))
    return module.eval()


def diswot(folder: Path, store: Store, seeds: int) -> list[str]:
    """Kendall's tau between scores and the accuracy of distilled students."""
    torch.manual_seed(0)
    teacher = teacher_of(folder)
    found = SPACE.some(CANDIDATES, np.random.default_rng(0))
    split = pictures.train("ten", IMAGES)
    data, test = DataBundle(split, (), "f", {}), pictures.held("ten", "test")
    batch = {"image": torch.from_numpy(split["train"].pictures[:64])}
    assert split["train"].labels is not None
    labels = torch.from_numpy(split["train"].labels[:64])
    taus: dict[str, list[float]] = {}
    cost = [(count_parameters(m), count_macs(m, batch)) for m in (made(teacher, each, 0) for each in found)]
    best: list[str] = []
    for seed in range(seeds):
        truth = [
            float(
                store.get(f"kd {seed} {named(each)}", lambda e=each, s=seed: student(folder, teacher, data, test, e, s))
            )
            for each in found
        ]
        for name, keys in SCORES.items():
            judge = Judge(teacher, batch, labels, Search(space=SPACE, budget={"macs": 1}, seed=seed, **keys))
            values = store.get(f"score {seed} {name}", lambda j=judge: [j(made(teacher, e, 0)).value for e in found])
            taus.setdefault(name, []).append(tau(values, truth))
            if name == "both terms (default)":
                best.append(f"{truth[int(np.argmax(values))]:.2f}")
        for name, column in (("number of parameters", 0), ("multiply-accumulates", 1)):
            taus.setdefault(name, []).append(tau([row[column] for row in cost], truth))
        best[-1] += f" ({max(truth):.2f} the best of the 20, {np.mean(truth):.2f} their mean)"
    seconds = store.seconds("score 0 both terms (default)"), store.seconds("kd 0 ")
    lines = [f"Teacher: {accuracy(teacher, test, TESTED):.2f} % on {TESTED:,} test pictures.\n"]
    lines += ["| ranked by | " + " | ".join(f"seed {seed}" for seed in range(seeds)) + " | mean |"]
    lines += ["|---|" + "---|" * (seeds + 1)]
    lines += [
        f"| {name} | {' | '.join(f'{t:+.2f}' for t in row)} | {np.mean(row):+.2f} |" for name, row in taus.items()
    ]
    lines.append(f"\nAccuracy of the candidate with the best score, seed by seed: {'; '.join(best)}.")
    lines.append(
        f"Scoring the {CANDIDATES} took {seconds[0]:.1f} CPU seconds, distilling them {seconds[1]:.0f} (seed 0)."
    )
    return lines


def made(teacher: nn.Module, candidate: Mapping[str, Any], seed: int) -> nn.Module:
    return remake(teacher, {key.removeprefix("factory."): value for key, value in candidate.items()}, seed)


def student(
    folder: Path, teacher: nn.Module, data: DataBundle, test: pictures.Pictures, candidate: Any, seed: int
) -> float:
    module = made(teacher, candidate, 100 + seed)
    trained(folder, module, teacher, data, KD, seed=seed)
    return round(accuracy(module, test, TESTED), 3)


def tau(values: Sequence[float], truth: Sequence[float]) -> float:
    from scipy.stats import kendalltau

    return float(kendalltau(values, truth).statistic)


# -- AutoDistil ------------------------------------------------------------------------------------------------------
WORDS, LENGTH, ALONE, TRAINED, HELD = 2_000, 32, 12, 4_000, 1_000
EPOCHS = {"teacher": 6, "super": 8, "alone": 3}
REVIEWS = Path("build/movie-reviews/train.csv")
SUBNETS: dict[str, list[int]] = {
    "keep_layers": [1, 2, 4],
    "hidden_size": [48, 96],
    "heads": [2, 4],
    "neurons": [48, 192],
}
SUPER = {
    "kind": "distil", "batch": 64, "learning_rate": 1e-3, "precision": "fp32", "labels": 0.0,
    "objective": [
        {"use": "soft-ce"},
        {"use": "hidden", "match": {"student": "hidden[-1]", "teacher": "hidden[-1]"}},
        {"use": "minilm-relations", "options": {"compare": "mse"}},
    ],
}  # fmt: skip


class Sentences:
    """Movie reviews as ids of their most frequent words."""

    def __init__(self, name: str, ids: np.ndarray, labels: np.ndarray) -> None:
        self.name, self.ids, self.labels = name, ids, labels
        self.digests = np.array([row.tobytes()[:16].hex()[:16] for row in ids], dtype="S16")

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, index: np.ndarray) -> dict[str, np.ndarray]:
        ids = self.ids[index]
        ids = ids[:, : max(1, int((ids != 0).sum(1).max()))]
        return {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)}


class Bert(nn.Module):  # type: ignore[misc]  # torch is not typed here
    """A small BERT with a classifier."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        super().__init__()
        self.model = BertForSequenceClassification(
            BertConfig(
                hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192,
                vocab_size=WORDS + 2, max_position_embeddings=LENGTH, num_labels=2,
            )
        )  # fmt: skip

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def reviews() -> DataBundle:
    import csv

    with REVIEWS.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    rows = [rows[at] for at in np.random.default_rng(0).permutation(len(rows))[: TRAINED + HELD]]
    texts = [re.findall(r"[a-z']+|[!?.]", row["text"].lower())[:LENGTH] for row in rows]
    common = [word for word, _ in Counter(word for text in texts for word in text).most_common(WORDS)]
    number = {word: at + 2 for at, word in enumerate(common)}
    ids = np.zeros((len(texts), LENGTH), np.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = [number.get(word, 1) for word in text] or [1]
        row[0] = row[0] or 1
    names = sorted({row["label"] for row in rows})
    labels = np.array([names.index(row["label"]) for row in rows], np.int64)
    held = HELD
    splits = {
        "train": Sentences("train", ids[held:], labels[held:]),
        "validation": Sentences("v", ids[:held], labels[:held]),
    }
    return DataBundle(splits, tuple(names), "reviews", {})


def losses(result: Any) -> dict[str, float]:
    """Loss by sub-net, from the rows of the stage's report."""
    rows = [(fact.layer.removeprefix("sub-net: "), fact.reason) for fact in result.facts if fact.stage == "supernet"]
    return {name: float(reason.split()[1]) for name, reason in rows if reason.startswith("loss ")}


def autodistil(folder: Path, store: Store) -> list[str]:
    """Spearman's correlation of the loss with inherited weights and the loss of the same sub-net trained alone."""
    from scipy.stats import spearmanr

    torch.manual_seed(0)
    data, teacher = reviews(), Bert().eval()
    path = folder / "text-teacher.pt"
    if not path.is_file():
        trained(folder, teacher, None, data, SUPER | {"epochs": EPOCHS["teacher"], "labels": 1.0, "objective": []})
        keep(teacher, path)
    teacher.load_state_dict(torch.load(path, weights_only=True))
    bank = {"work": folder, "teacher": teacher, "data": data}
    whole = store.get("super", lambda: losses(_super(**bank, epochs=EPOCHS["super"], space=SUBNETS)))
    start = store.get("untrained", lambda: losses(_super(**bank, epochs=1, space=SUBNETS, learning_rate=1e-9)))
    alone = SuperNet.model_validate({**SUBNETS, "budget": {"macs": 10**9}}).some(ALONE, np.random.default_rng(1))
    rows = []
    for each in alone:
        single = {key: [value] for key, value in each.items()}
        found = store.get(
            f"alone {named(each)}", lambda s=single: losses(_super(**bank, epochs=EPOCHS["alone"], space=s))
        )
        rows.append((named(each), start[named(each)], whole[named(each)], found[named(each)]))
    columns = np.array([row[1:] for row in rows])
    lines = ["| sub-net | teacher's weights, cut | inherited from the super-net | trained alone |", "|---|---|---|---|"]
    lines += [f"| {name} | {a:.4f} | {b:.4f} | {c:.4f} |" for name, a, b, c in sorted(rows, key=lambda row: row[3])]
    for what, column in (("inherited from the trained super-net", 1), ("cut from the teacher without training", 0)):
        rank = spearmanr(columns[:, column], columns[:, 2]).statistic
        kendall = tau(columns[:, column], columns[:, 2])
        lines.append(f"\nLoss {what} against trained alone: Spearman {rank:+.2f}, Kendall {kendall:+.2f}.")
        for width in SUBNETS["hidden_size"]:
            same = columns[[f"hidden_size {width}," in row[0] for row in rows]]
            rank = spearmanr(same[:, column], same[:, 2]).statistic
            lines.append(f"Among the {len(same)} of hidden width {width}: Spearman {rank:+.2f}.")
    seconds = store.seconds("super"), store.seconds("alone")
    lines.append(
        f"\nThe super-net of {len(whole)} took {seconds[0]:.0f} CPU seconds, the {ALONE} alone {seconds[1]:.0f}."
    )
    return lines


def _super(
    *, work: Path, teacher: nn.Module, data: DataBundle, epochs: int, space: Mapping[str, Any], **more: Any
) -> Any:
    import copy

    table = {"supernet": {**space, "budget": {"macs": 10**9}}, "epochs": epochs}
    return trained(work, copy.deepcopy(teacher), teacher, data, SUPER | table | more)


def main() -> None:
    """Run both and print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/bench/searches"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    page = ["## AutoDistil (N2): the super-net's proxy\n"]
    page += autodistil(options.work / "text", _store(options.work / "text"))
    first = ["## DisWOT (N1): the score without training\n"]
    page = [*first, *diswot(options.work / "vision", _store(options.work / "vision"), options.seeds), "", *page]
    text = "\n".join(page) + "\n"
    print(text)
    if options.page is not None:
        options.page.write_text(text)


def _store(folder: Path) -> Store:
    folder.mkdir(parents=True, exist_ok=True)
    return Store(folder / "figures.json")


if __name__ == "__main__":
    main()
