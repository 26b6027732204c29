"""Real ONNX models in real packages: a picture classifier, a sentence classifier, and a device's own format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compressor.types import (
    Artifact,
    Format,
    Inputs,
    Measurement,
    Origin,
    TensorSpec,
    Unavailable,
    file_digest,
)
from targets.base import Compiled
from targets.outcome import DataFacts, ProfileOutcome, Promise, Row, RunSummary, State
from targets.package import PackageInfo

LABELS = ("ankle boot", "bag | <b>", "coat")
IMAGE = {
    "kind": "image",
    "settings": {"size": [12, 10], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "scale": 1 / 255,
                 "layout": "NCHW", "channels": 3},
    "resample": "bilinear",
}  # fmt: skip


def tensor(name: str, array: Any) -> TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


def save(graph: onnx.GraphProto, path: Path) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def picture_model(path: Path) -> Path:
    draw = np.random.default_rng(3)
    weights = [draw.normal(size=(4, 3, 3, 3)), draw.normal(size=(4, 3))]
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "v"], ["logits"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 12, 10])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    initial = [tensor(name, value.astype(np.float32)) for name, value in zip("wv", weights, strict=True)]
    return save(helper.make_graph(nodes, "pictures", [image], [logits], initial), path)


def sentence_model(path: Path, vocabulary: int) -> Path:
    draw = np.random.default_rng(4)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["a"]),
        helper.make_node("Unsqueeze", ["attention_mask", "last"], ["b"]),
        helper.make_node("Cast", ["b"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["a", "m"], ["c"]),
        helper.make_node("ReduceSum", ["c", "one"], ["logits"], keepdims=0),
    ]
    shape = ["batch", "sequence"]
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name in ("input_ids", "attention_mask")]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])
    table = draw.normal(size=(vocabulary, 2)).astype(np.float32)
    initial = [tensor("table", table), tensor("last", np.array([2])), tensor("one", np.array([1]))]
    return save(helper.make_graph(nodes, "sentences", inputs, [logits], initial), path)


def artifact_of(path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> Artifact:
    digest = file_digest(path)
    return Artifact("student/fp32", "student", path, Format.ONNX, "fp32", inputs, outputs, digest, parameters=120)


def outcome_of(artifact: Artifact, profile: str = "this-machine", compiled: Compiled | None = None) -> ProfileOutcome:
    def here(value: float, unit: str, **detail: float) -> Measurement:
        return Measurement(value, unit, Origin.MEASURED, "a laptop", detail)

    row = Row(
        artifact=artifact,
        state=State.EXECUTED,
        validation=here(0.91, "accuracy"),
        test=here(0.9, "accuracy"),
        latency=here(0.4, "ms", p95=0.5, threads=1),
        speedup=here(3.0, "x"),
        file_bytes=here(artifact.file_bytes, "bytes"),
        peak_memory=Unavailable("the process was too short to see"),
        compiled=compiled,
        shipped=True,
        reason="the only candidate",
    )
    return ProfileOutcome(profile, "This machine", "onnxruntime-cpu", "a laptop", (row,), Promise(), True, "It fits.")


def summary_of(outcome: ProfileOutcome, task: str) -> RunSummary:
    return RunSummary(
        name="toy <script>",
        digest="sha256:" + "12" * 32,
        created="2031-02-03T04:05:06Z",
        command="compress-for-device run recipe.toml",
        task=task,
        metric="accuracy",
        recipe={},
        seed=0,
        machine={},
        versions={"compress-for-device": "0.1.0", "onnxruntime": "1.31.1", "numpy": "2.4.6"},
        teacher={"source": "example/teacher", "digest": "sha256:00", "licence": "apache-2.0"},
        data=DataFacts("toy", {"test": 100}, {}),
        stages=(),
        parity=(),
        outcomes=(outcome,),
    )


Case = tuple[ProfileOutcome, RunSummary, PackageInfo]


@pytest.fixture
def pictures(tmp_path: Path) -> Case:
    artifact = artifact_of(
        picture_model(tmp_path / "student.onnx"),
        (TensorSpec("image", "float32", ("batch", 3, 12, 10)),),
        (TensorSpec("logits", "float32", ("batch", 3)),),
    )
    outcome = outcome_of(artifact)
    draw = np.random.default_rng(5)
    raw = [draw.integers(0, 256, (9, 14, 3), np.uint8) for _ in range(3)]
    from targets.package.infer import picture_input

    samples: list[Inputs] = [{"image": picture_input(picture, IMAGE)} for picture in raw]
    info = PackageInfo(preprocess=IMAGE, labels=LABELS, samples=samples, raw=raw)
    return outcome, summary_of(outcome, "image-classification"), info


@pytest.fixture
def sentences(tmp_path: Path, tokenizer_specification: dict[str, Any]) -> Case:
    from targets.package.infer import WordPiece

    shape = ("batch", "sequence")
    artifact = artifact_of(
        sentence_model(tmp_path / "sentences.onnx", len(tokenizer_specification["model"]["vocab"])),
        (TensorSpec("input_ids", "int64", shape), TensorSpec("attention_mask", "int64", shape)),
        (TensorSpec("logits", "float32", ("batch", 2)),),
    )
    outcome = outcome_of(artifact)
    raw = ["The film is GOOD!", "a café, 你好 🙂"]
    plain = WordPiece(tokenizer_specification)
    ids = [np.array([plain.encode(text, 16)], np.int64) for text in raw]
    info = PackageInfo(
        preprocess={
            "kind": "text",
            "tokenizer_file": "tokenizer.json",
            "max_length": 16,
            "pad_id": 0,
            "names": ["input_ids", "attention_mask"],
        },
        files={"tokenizer.json": json.dumps(tokenizer_specification).encode()},
        labels=("bad", "good"),
        samples=[{"input_ids": row, "attention_mask": np.ones_like(row)} for row in ids],
        raw=raw,
    )
    return outcome, summary_of(outcome, "text-classification"), info


@pytest.fixture
def tokenizer_specification() -> dict[str, Any]:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["the", "a", "film", "is", "good", "bad", "cafe", *".,!?你好🙂"]
    letters = [prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz" for prefix in ("", "##")]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocabulary = list(dict.fromkeys([*names, *words, *letters]))
    return {
        "version": "1.0",
        "added_tokens": [{"id": index, "content": name, **flags} for index, name in enumerate(names)],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {word: index for index, word in enumerate(vocabulary)},
        },
    }


@pytest.fixture
def engine(pictures: Case, tmp_path: Path) -> Case:
    """The picture model compiled for a device whose runtime is not here."""
    outcome, _, info = pictures
    artifact = outcome.rows[0].artifact
    path = tmp_path / "out" / "student.engine"
    path.parent.mkdir()
    path.write_bytes(b"an engine's bytes")
    (path.parent / "manifest.json").write_text('{"engine": 1}')
    (path.parent / "build_engine.py").write_text("# build kit\n")
    extra = (path.parent / "manifest.json", path.parent / "build_engine.py")
    made = outcome_of(artifact, "geforce-rtx-4070", Compiled(path, artifact, placed=5, extra_files=extra))
    return made, summary_of(made, "image-classification"), info


Build = Callable[[Case], Path]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    from targets.package import write_package

    def make(case: Case) -> Path:
        outcome, summary, info = case
        return write_package(outcome, summary, info, tmp_path / "run" / "packages")

    return make
