"""Quantization-aware training on paired seeds: with the teacher against labels alone, ternary against ternary after
training, and quality against bits.

    python -m tools.bench_qat [--seeds 5] [--work build/qat] [--out docs/evidence/qat.md]

Fashion-MNIST, 4,000 training images, the ResNet-9 of ``examples.fashion_mnist`` as teacher, a student of 14,458
parameters. Every seed trains one fp32 student with the teacher; all files of that seed start from it. An arm's
learning rate is the better of two on validation with a seed that is none of the five. Scores are those of the exported
ONNX files in ONNX Runtime on the 10,000 test images. What is measured is kept under ``--work``: a bench that was killed
goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from compressor.data.types import DataBundle
from compressor.distil.loop import distil
from compressor.distil.probes.paired import interval, verdict
from compressor.distil.rounding import install
from compressor.export.onnx import export_onnx
from compressor.export.optimise import optimise
from compressor.models.fakequant import settled, trained_layers
from compressor.models.onnx_graph import read_model, save_model
from compressor.models.rebuild import replay
from compressor.profile import QuantizationRules
from compressor.qat import Qat
from compressor.quantize.checks.lint import lint
from compressor.quantize.qdq import information, write_pairs
from compressor.recipe import DistilStage
from compressor.types import TensorSpec
from examples.fashion_mnist.model import teacher as trained_teacher
from tools.bench_methods import pictures

IMAGES, EPOCHS, QAT_EPOCHS, RATES, TUNING_SEED = 4000, 15, 5, (1e-3, 4e-3), 99
UNLABELLED = 8000  # further images for the teacher; labels alone train as many steps without them
INPUT, OUTPUT = TensorSpec("image", "float32", ("batch", 1, 28, 28)), TensorSpec("logits", "float32", ("batch", 10))
KD: Mapping[str, Any] = {"labels": 0.5, "objective": [{"use": "kd", "weight": 0.5, "options": {"temperature": 2.0}}]}
LABELS: Mapping[str, Any] = {"labels": 1.0, "objective": []}
OFF: Mapping[str, Any] = {
    "labels": 0.5,
    "objective": [
        *KD["objective"],
        {"use": "cosine", "match": {"student": "hidden[i]", "teacher": "hidden[g(i)]", "proj": "none"}},
    ],
}
BITS = ("int8", "int6", "int5", "int4", "int3")


class Small(nn.Module):
    """Three 3x3 convolutions with batch norm, two of them with stride 2, and a linear head on their mean."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((1, 16, 2), (16, 32, 2), (32, 32, 1))
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, s, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()) for a, b, s in widths
        )
        self.head = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        for stage in self.stages:
            image = stage(image)
        return self.head(image.mean(dim=(2, 3)))


@dataclass(frozen=True)
class Arm:
    """One way to make a quantized file from a seed's fp32 student. Without ``train`` nothing is trained."""

    name: str
    qat: Mapping[str, Any]
    train: Mapping[str, Any] = field(default_factory=dict)
    activation: str = "uint8"
    own_teacher: bool = False  # the fp32 student teaches, instead of the ResNet-9
    unlabelled: bool = False  # the teacher sees images without labels too
    epochs: int = QAT_EPOCHS

    @property
    def rules(self) -> QuantizationRules:
        return QuantizationRules(activation=self.activation)


def arms() -> list[Arm]:
    """All arms, in the order in which they are measured."""
    found = []
    for bits in ("ternary", "int4", "int8"):
        found += [Arm(f"{bits} ptq", {"weights": bits}), Arm(f"{bits} qat labels", {"weights": bits}, LABELS)]
        found.append(Arm(f"{bits} qat kd", {"weights": bits}, KD))
        longer = QAT_EPOCHS * (IMAGES + UNLABELLED) // IMAGES
        found.append(Arm(f"{bits} qat labels, longer", {"weights": bits}, LABELS, epochs=longer))
        found.append(Arm(f"{bits} qat kd, unlabelled", {"weights": bits}, KD, unlabelled=True))
    found.append(Arm("ternary qat kd, own teacher", {"weights": "ternary"}, KD, own_teacher=True))
    found.append(Arm("ternary dlt off", {"weights": "ternary", "quantizer": "dlt"}, OFF, own_teacher=True))
    for activation in ("uint8", "uint16"):
        for bits in BITS:
            more = Arm(f"{bits} {activation} ptq", {"weights": bits}, activation=activation)
            found += [more, Arm(f"{bits} {activation} qat kd", {"weights": bits}, KD, activation)]
    return found


class UnmeasuredError(LookupError):
    """A figure that is not stored, where nothing may be measured."""


class Bench:
    """Trains, exports and scores; every number is kept in one JSON file."""

    def __init__(self, work: Path, *, frozen: bool = False) -> None:
        self.work, self.path, self.frozen = work, work / "scores.json", frozen
        work.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.teacher = trained_teacher()
        held = [part[pictures.HELD_OUT] for part in pictures.raw("train")]
        self.validation = pictures.split("validation", *(part[:2000] for part in held))
        splits = {**pictures.train("ten", IMAGES), "validation": self.validation}
        splits["calibration"] = pictures.split("calibration", *(part[2000:2256] for part in held))
        self.data = DataBundle(splits, (), "fashion-mnist", {})
        self.more = DataBundle({**splits, **pictures.train("ten", IMAGES, UNLABELLED)}, (), "fashion-mnist", {})
        self.test = pictures.held("ten", "test")

    def value(self, key: str, make: Any) -> Any:
        """A stored figure, or a new one."""
        if key not in self.known:
            if self.frozen:
                raise UnmeasuredError(key)
            self.known[key] = make()
            draft = self.path.with_suffix(".part")
            draft.write_text(json.dumps(self.known, indent=1))
            draft.replace(self.path)
            print(f"{key}: {self.known[key]}", file=sys.stderr, flush=True)
        return self.known[key]

    def student(self, seed: int) -> nn.Module:
        """The fp32 student of a seed, trained with the teacher."""
        torch.manual_seed(1000 + seed)
        made = Small()
        self._fit(made, {**KD, "epochs": EPOCHS, "learning_rate": 4e-3}, f"fp32-{seed}", seed)
        return made.eval()

    def _fit(self, module: nn.Module, keys: Mapping[str, Any], name: str, seed: int, **more: Any) -> Any:
        stage = {"kind": "distil", "batch": 64, "precision": "fp32", "weight_decay": 0.0005, **keys}
        given = {"teacher_digest": "fashion-mnist", **more}
        teacher, data = given.pop("teacher", self.teacher), given.pop("data", self.data)
        labels_only = not keys["objective"]
        return distil(
            module, teacher, data, DistilStage.model_validate(stage), seed=seed, work=self.work / name,
            bank=self.work / "bank", signals={}, labels_only=labels_only, **given,
        )  # fmt: skip

    def trained(self, arm: Arm, seed: int, rate: float) -> nn.Module:
        """The rounding student of an arm."""
        plain = self.student(seed)
        module = replay(plain, [])
        if not arm.train:
            batch = {"image": torch.from_numpy(self.data.splits["calibration"].pictures)}  # type: ignore[attr-defined]
            small = {"image": batch["image"][:4]}
            install(module.eval(), Qat.model_validate(arm.qat), arm.rules, small, lambda: [batch])
            return module
        keys = {**arm.train, "qat": arm.qat, "epochs": arm.epochs, "learning_rate": rate}
        more: dict[str, Any] = {"rules": arm.rules, "data": self.more if arm.unlabelled else self.data}
        if arm.own_teacher:
            more |= {"teacher": copy.deepcopy(plain), "teacher_digest": f"own-{seed}"}
        self._fit(module, keys, f"{arm.name}-{seed}-{rate}".replace(" ", "-"), seed, **more)
        return module.eval()

    def rate(self, arm: Arm) -> float:
        """The better learning rate on validation."""
        if not arm.train or arm.name.split()[1].startswith("uint"):
            return RATES[0]  # of the bit widths, all with one rate
        scores = {
            rate: self.value(
                f"tuning|{arm.name}|{rate}",
                lambda rate=rate: self._share(self._torch(self.trained(arm, TUNING_SEED, rate), self.validation)),
            )
            for rate in RATES
        }
        return max(scores, key=lambda rate: scores[rate])

    def _torch(self, module: nn.Module, split: pictures.Pictures) -> Any:
        with torch.no_grad():
            parts = [module.eval()(torch.from_numpy(part)) for part in np.array_split(split.pictures, 10)]
        return torch.cat(parts).numpy(), split.labels

    @staticmethod
    def _share(found: tuple[Any, Any]) -> float:
        return 100 * float((found[0].argmax(1) == found[1]).mean())

    def scores(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Accuracy of the exported file, its agreement with the trained module, sizes and bits."""
        rate = self.rate(arm)
        return dict(self.value(f"{arm.name}|{rate}|{seed}", lambda: self._measured(arm, self.trained(arm, seed, rate))))

    def plain(self, seed: int) -> dict[str, Any]:
        """The fp32 student of a seed."""
        return dict(
            self.value(f"fp32|{seed}", lambda: {"accuracy": self._share(self._torch(self.student(seed), self.test))})
        )

    def _measured(self, arm: Arm, module: nn.Module) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            example = {"image": self.test.pictures[:2]}
            export_onnx(settled(module), example, [INPUT], [OUTPUT], folder / "raw.onnx", name="qat", metadata={})
            optimise(folder / "raw.onnx", folder / "fp32.onnx")
            layers = trained_layers(module)
            found: dict[str, Any] = {"bits": sum(information(layers, 0).values())}
            for packed in (False, True):
                file = folder / f"packed-{packed}.onnx"
                model, _ = write_pairs(read_model(folder / "fp32.onnx"), layers, arm.rules, packed=packed)
                assert not lint(model, arm.rules)
                save_model(model, file)
                found["bytes packed" if packed else "bytes"] = file.stat().st_size
            logits = _run(folder / "packed-False.onnx", self.test.pictures)
            found["accuracy"] = 100 * float((logits.argmax(1) == self.test.labels).mean())
            wanted, _ = self._torch(module, self.test)
            written = _run(folder / "packed-False.onnx", self.test.pictures, plain=True)
            gap = np.abs(written - wanted)
            found |= {"parity": float((gap <= 1e-4 * max(1.0, np.abs(wanted).max())).mean()), "worst": float(gap.max())}
            return found


def _run(path: Path, images: Any, *, plain: bool = False) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"image": part})[0] for part in np.array_split(images, 20)])


# ------------------------------------------------------------------------------------------------- the page


ARMS = (
    "Arms: `ptq` rounds the fp32 student (ranges from 256 calibration images) and trains nothing; `qat labels` trains "
    "5 epochs on labels; `qat kd` on labels x 0.5 and the teacher at temperature 2 x 0.5, the defaults of the tool. "
    "`own teacher`: the fp32 student teaches. `dlt off`: scale and shift, and the direction of the hidden states of "
    "the fp32 student (Q2). Added when these were known: `kd, unlabelled`, where the teacher also sees 8,000 images "
    "without labels, and `labels, longer`, which trains as many steps.\n"
)
CLAIMS = (
    ("ternary qat kd", "ternary qat labels", "teacher and labels beat labels, ternary"),
    ("int4 qat kd", "int4 qat labels", "the same at 4 bits"),
    ("int8 qat kd", "int8 qat labels", "the same at 8 bits"),
    ("ternary qat kd, unlabelled", "ternary qat labels, longer", "with unlabelled images, as many steps, ternary"),
    ("int4 qat kd, unlabelled", "int4 qat labels, longer", "the same at 4 bits"),
    ("int8 qat kd, unlabelled", "int8 qat labels, longer", "the same at 8 bits"),
    ("ternary qat kd", "ternary ptq", "ternary trained beats ternary after training"),
    ("ternary qat labels", "ternary ptq", "the same without a teacher"),
    ("int4 qat kd", "int4 ptq", "4 bits trained beat 4 bits after training"),
    ("int8 qat kd", "int8 ptq", "8 bits trained beat 8 bits after training"),
    ("ternary dlt off", "ternary qat labels", "scale, shift and features (Q2) beat TWN with labels"),
    ("ternary qat kd", "ternary qat kd, own teacher", "the big teacher teaches more than the fp32 student"),
)


def page(bench: Bench, seeds: int, few: int) -> str:
    """The evidence, from what is measured and what has to be."""
    by_name = {arm.name: arm for arm in arms()}
    plain = [bench.plain(seed)["accuracy"] for seed in range(seeds)]
    scores = {}
    for name, arm in by_name.items():
        if not name.split()[1].startswith("uint"):
            with suppress(UnmeasuredError):
                scores[name] = [bench.scores(arm, seed) for seed in range(seeds)]
    lines = [_head(), ARMS, f"fp32 student: {statistics.fmean(plain):.2f} % ({_seeds(plain)}).\n", "## Claims\n"]
    lines += ["| claim | ours | other | difference | wins | 90 % interval | verdict |", "|---|---|---|---|---|---|---|"]
    lines += [_claim(scores, *claim) for claim in CLAIMS if claim[0] in scores and claim[1] in scores]
    lines += ["\n## Arms\n", "| arm | test accuracy of the exported file | a seed each | file | packed | agreement |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [_arm(name, found) for name, found in scores.items()]
    lines += [_legend(), "## Quality against bits (methods Q3)\n", *_bits(bench, by_name, few)]
    return "\n".join(lines) + "\n"


def _head() -> str:
    assert __doc__ is not None
    text = __doc__.partition("\n\n    python")[0].replace("\n", " ")
    return f"# {text}\n\n`python -m tools.bench qat`. {' '.join(__doc__.split('qat.md]')[1].split())}\n"


def _seeds(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _claim(scores: Mapping[str, list[dict[str, Any]]], ours: str, other: str, text: str) -> str:
    pairs = [(a["accuracy"], b["accuracy"]) for a, b in zip(scores[ours], scores[other], strict=True)]
    gaps = [a - b for a, b in pairs]
    low, high = interval(gaps)
    means = [statistics.fmean(side) for side in zip(*pairs, strict=True)]
    wins = f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}"
    sides = f"{ours} {means[0]:.2f} | {other} {means[1]:.2f} | {means[0] - means[1]:+.2f}"
    return f"| {text} | {sides} | {wins} | {low:+.2f} to {high:+.2f} | {verdict(gaps)} |"


def _arm(name: str, found: list[dict[str, Any]]) -> str:
    values = [item["accuracy"] for item in found]
    sizes = [f"{found[0][key] / 1024:.1f} KiB" for key in ("bytes", "bytes packed")]
    parity = min(item["parity"] for item in found)
    worst = max(item["worst"] for item in found)
    mean = f"{statistics.fmean(values):.2f} %"
    return f"| {name} | {mean} | {_seeds(values)} | {sizes[0]} | {sizes[1]} | {parity:.3%}, worst {worst:.3f} |"


def _legend() -> str:
    return (
        "\n`file`: few-bit codes in int8 tensors, for integer kernels: bytes and time are those of int8. `packed`: in "
        "INT4 tensors, which ONNX Runtime unpacks at every call: smaller, not faster. `agreement`: share of the "
        "100,000 test logits of the exported file within 1e-4 of the largest of the fake-quantized module's "
        "(quantize-dequantize pairs computed as written), and the largest difference; where they differ, a sum in "
        "another order crossed a rounding boundary.\n"
    )


def _bits(bench: Bench, by_name: Mapping[str, Arm], few: int) -> list[str]:
    lines = [
        f"Total bits: weights x bits + scales; {few} seeds, one learning rate, {QAT_EPOCHS} epochs with the teacher.\n",
        "| weights | activations | total bits | after training | trained | gain |",
        "|---|---|---|---|---|---|",
    ]
    for activation in ("uint8", "uint16"):
        for bits in BITS:
            with suppress(UnmeasuredError):
                lines.append(_width(bench, by_name, bits, activation, few))
    return lines


def _width(bench: Bench, by_name: Mapping[str, Arm], bits: str, activation: str, few: int) -> str:
    pair = []
    for kind in ("ptq", "qat kd"):
        found = [bench.scores(by_name[f"{bits} {activation} {kind}"], seed) for seed in range(few)]
        pair.append((statistics.fmean(item["accuracy"] for item in found), found[0]["bits"]))
    (before, size), (after, _) = pair
    scores = f"{before:.2f} % | {after:.2f} % | {after - before:+.2f}"
    return f"| {bits} | {activation} | {size / 8192:.2f} KiB | {scores} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--few", type=int, default=2, help="seeds of the table of bits")
    parser.add_argument("--known", action="store_true", help="write what is stored, measure nothing")
    parser.add_argument("--work", type=Path, default=Path("build/qat"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if pictures.missing():
        raise SystemExit(pictures.missing())
    text = page(Bench(options.work, frozen=options.known), options.seeds, options.few)
    print(text)
    if options.out is not None:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
