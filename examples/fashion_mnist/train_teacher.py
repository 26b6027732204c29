"""Train the Fashion-MNIST teacher: about 20 minutes on two cores with bfloat16, one to two hours without.

    python -m examples.fashion_mnist.train_teacher --data /usr/share/datasets/fashion-mnist

The validation and calibration parts are those that ``compress-for-device`` draws with the same seed, so that the
teacher has never seen what later chooses between students. The test set is scored once, at the end.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.data.split import split_indices
from examples.fashion_mnist.model import WEIGHTS, ResNet9

MEAN, STD = 0.2860, 0.3530  # of the 60,000 training pictures, scaled to 0..1


def read_idx(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Images float32 (N, 1, 28, 28), normalised, and labels int64 (N,) of ``train`` or ``t10k``."""
    images = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    return (torch.from_numpy(pixels.copy()).float() / 255 - MEAN) / STD, torch.from_numpy(
        np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
    )


def augment(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Random horizontal flip, shift by up to 2 pixels, and one erased 6x6 square, all per picture."""
    count = len(batch)
    flip = torch.rand(count, generator=generator) < 0.5
    batch = torch.where(flip[:, None, None, None], batch.flip(-1), batch)
    padded = F.pad(batch, (2, 2, 2, 2), value=float(-MEAN / STD))
    rows = torch.randint(0, 5, (count, 1), generator=generator) + torch.arange(28)
    columns = torch.randint(0, 5, (count, 1), generator=generator) + torch.arange(28)
    out = padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]
    top = torch.randint(-3, 26, (count, 1), generator=generator)
    left = torch.randint(-3, 26, (count, 1), generator=generator)
    line = torch.arange(28)
    inside_rows = (line >= top) & (line < top + 6)
    inside_columns = (line >= left) & (line < left + 6)
    erased = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
    return out.masked_fill(erased, float(-MEAN / STD))


@torch.inference_mode()
def accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    module.eval()
    hits = sum(int((module(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    module.train()
    return hits / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--epochs", type=int, default=22)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = read_idx(args.data, "train")
    parts = split_indices(len(labels), {"validation": 5000, "calibration": 1000}, seed=args.seed)
    train, validation = torch.from_numpy(parts["train"]), torch.from_numpy(parts["validation"])

    module = ResNet9().to(memory_format=torch.channels_last).train()
    average = torch.optim.swa_utils.AveragedModel(
        module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998), use_buffers=True
    )
    steps = args.epochs * (len(train) // args.batch)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.3, total_steps=steps, pct_start=0.2)
    started = time.process_time()
    for epoch in range(args.epochs):
        order = train[torch.randperm(len(train), generator=generator)]
        for index in order.split(args.batch)[: len(train) // args.batch]:
            batch = augment(images[index], generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(module(batch), labels[index])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            average.update_parameters(module)
        score = accuracy(average.module, images[validation], labels[validation])
        print(f"epoch {epoch + 1}/{args.epochs}: loss {loss.item():.3f}, validation accuracy {score:.4f}", flush=True)

    final = average.module
    test = accuracy(final, *read_idx(args.data, "t10k"))
    state = {name: tensor.contiguous() for name, tensor in final.state_dict().items()}
    save_file(
        state, args.out, metadata={"licence": "Apache-2.0", "data": "Fashion-MNIST (MIT), 54,000 training pictures"}
    )
    print(
        json.dumps(
            {
                "validation_accuracy": score,
                "test_accuracy": test,
                "parameters": sum(p.numel() for p in final.parameters()),
                "cpu_seconds": round(time.process_time() - started),
                "epochs": args.epochs,
            }
        )
    )


if __name__ == "__main__":
    main()
