"""Every task from checkpoint to a package that answers: small real checkpoints with random weights."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.models.conftest import bert_folder, encoder_folder  # noqa: F401  (fixtures)

pytestmark = [pytest.mark.train, pytest.mark.slow]
Command = Callable[..., "subprocess.CompletedProcess[str]"]
WORDS = ["quiet", "wonder", "dull", "noisy", "film", "actors", "wonderful", "story", "heart", "laugh", "good", "bad"]
RECIPE = """
name = "task"
profiles = ["this-machine"]
[teacher]
model = "{model}"
{teacher}
[data]
source = "{source}"
validation = 40
calibration = 20
{data}
[accept]
max_drop = 0.9
{stages}
[[stage]]
kind = "quantize"
engines = ["onnxruntime"]
schemes = ["dynamic"]
samples = 16
"""
STUDENT = """
[[stage]]
kind = "student"
keep_layers = 2
[[stage]]
kind = "distil"
epochs = 1
batch = 32
{distil}
[[stage.objective]]
use = "{use}"
{more}
"""


def texts(count: int, seed: int = 3) -> list[str]:
    random = np.random.default_rng(seed)
    return sorted({" ".join(random.choice(WORDS, random.integers(3, 12))) for _ in range(count)})


def table(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def run(command: Command, tmp_path: Path, **parts: str) -> dict[str, Any]:
    distil = STUDENT.format(
        **{"distil": "", "use": "kd", "more": "", **{k: parts.pop(k) for k in ("distil", "use", "more") if k in parts}}
    )
    recipe = tmp_path / "task.toml"
    recipe.write_text(RECIPE.format(**{"teacher": "", "data": "", "stages": distil, **parts}))
    result = command("run", str(recipe), "--json")
    assert result.returncode in (0, 3), result.stdout[-3000:] + result.stderr[-3000:]
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def package(found: dict[str, Any], folder: Path) -> Path:
    place = (folder / found["packages"]["this-machine"]).with_suffix("")
    check = infer(place, "--self-check")
    assert check.returncode == 0, check.stdout + check.stderr
    return place


def infer(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "infer.py", *words], cwd=folder, capture_output=True, text=True, check=False)


def answer(folder: Path, *words: str) -> Any:
    found = infer(folder, *words, "--json")
    assert found.returncode == 0, found.stdout + found.stderr
    return json.loads(found.stdout)[0]


def rows(found: dict[str, Any]) -> dict[str, Any]:
    return {row["artifact"]: row for row in found["report"]["outcomes"][0]["rows"]}


def resaved(folder: Path, name: str, target: Path, **config: Any) -> Path:
    """The checkpoint under another head, with its tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    settings = transformers.AutoConfig.from_pretrained(folder, **config)
    getattr(transformers, name)(settings).save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return target


def test_several_labels_of_a_text(command: Command, bert_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    model = resaved(bert_folder, "BertForSequenceClassification", tmp_path / "m",
                    problem_type="multi_label_classification")  # fmt: skip
    lines = [[t, ";".join(n for n, w in (("good", "good"), ("bad", "bad")) if w in t)] for t in texts(300)]
    source = table(tmp_path / "t.csv", ["text", "label"], lines)
    found = run(command, tmp_path, model=str(model), source=str(source), use="multi-label")
    assert (found["report"]["task"], found["report"]["metric"]) == ("multi-label-text-classification", "micro F1")
    assert "mean_average_precision" in rows(found)["student/fp32"]["test"]["detail"]
    said = answer(package(found, tmp_path), "a good film")
    assert set(said["scores"]) == {"bad", "good"}


def test_tags_of_words(command: Command, bert_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    names = {0: "O", 1: "B-X", 2: "I-X"}
    model = resaved(bert_folder, "BertForTokenClassification", tmp_path / "m", id2label=names,
                    label2id={name: i for i, name in names.items()})  # fmt: skip
    lines = [{"words": t.split(), "tags": ["B-X" if w == "film" else "O" for w in t.split()]} for t in texts(300)]
    (tmp_path / "t.json").write_text(json.dumps(lines))
    found = run(command, tmp_path, model=str(model), source=str(tmp_path / "t.json"))
    assert (found["report"]["task"], found["report"]["metric"]) == ("token-classification", "entity F1")
    said = answer(package(found, tmp_path), "a wonderful film")
    assert said["words"] == ["a", "wonderful", "film"]
    assert set(said["tags"]) <= set(names.values())


def test_pairs_of_texts(command: Command, bert_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    lines = [[t, u, "good" if "good" in t and "good" in u else "bad"]
             for t, u in zip(texts(300), reversed(texts(300)), strict=True)]  # fmt: skip
    source = table(tmp_path / "t.csv", ["sentence1", "sentence2", "label"], lines)
    found = run(command, tmp_path, model=str(bert_folder), source=str(source), data='text_pair = "sentence2"')
    place = package(found, tmp_path)  # the stored pairs go through the packaged tokenizer, too
    assert json.loads((place / "manifest.json").read_text())["self_check"]["samples"] > 0
    assert answer(place, "good film", "--pair", "good story")["label"] in ("good", "bad")
    assert infer(place, "good film").returncode == 2


def letters(folder: Path) -> Path:
    """A GPT-2 over single letters, 3 layers x 32."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    known = {letter: number for number, letter in enumerate(["<end>", "?", *" abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="?").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(known), n_positions=64, n_embd=32, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "distil",
    [
        "[stage.rollouts]\nfraction = 0.5\nprompt_tokens = 8\nmax_new_tokens = 8",
        "[stage.sequences]\nprompt_tokens = 8\nmax_new_tokens = 16\nbeams = 2\n[stage.lora]\nrank = 2",
    ],
    ids=["on-policy", "sequences-and-lora"],
)
def test_a_causal_language_model(command: Command, tmp_path: Path, distil: str) -> None:
    (tmp_path / "t.txt").write_text("\n".join(texts(400)))
    found = run(
        command, tmp_path, model=str(letters(tmp_path / "m")), source=str(tmp_path / "t.txt"),
        data="max_length = 32", more=distil,
    )  # fmt: skip
    report = found["report"]
    assert (report["task"], report["metric"]) == ("causal-lm", "perplexity")
    made = rows(found)
    assert {"teacher/fp32", "null-twin/fp32", "student/fp32"} <= set(made)
    test = made["student/fp32"]["test"]
    assert test["unit"] == "perplexity"
    assert 1 < test["value"] < 40  # 28 letters
    place = package(found, tmp_path)
    assert len(answer(place, "a good f", "--new-tokens", "5")["tokens"]) <= 5


def test_what_does_not_fit_a_task_is_refused_before_training(
    command: Command,
    bert_folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    source = table(tmp_path / "t.csv", ["text", "label"], [[t, "good"] for t in texts(100)])
    recipe = tmp_path / "task.toml"
    stages = STUDENT.format(distil="", use="kd", more="[stage.rollouts]\nfraction = 0.5")
    recipe.write_text(RECIPE.format(model=bert_folder, source=source, teacher="", data="", stages=stages))
    result = command("plan", str(recipe))
    assert result.returncode == 2
    assert "is for causal language models" in result.stdout + result.stderr
