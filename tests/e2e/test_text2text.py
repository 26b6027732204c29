"""An encoder-decoder model from checkpoint to a package that writes: one whole run in this process."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from compressor.cli.run import run_command  # noqa: E402
from compressor.cli.session import Request, open_session  # noqa: E402
from tests.unit.distil import text2text as toy  # noqa: E402

pytestmark = [pytest.mark.train, pytest.mark.slow]
# a device that is not here: its runtime scores every file, and nothing waits for a clock
RECIPE = """
name = "letters"
profiles = ["raspberry-pi-5"]
null_twin = false
[teacher]
model = "{model}"
task = "{task}"
[data]
source = "{source}"
text = "word"
target = "letters"
max_length = 12
target_length = 6
validation = 8
calibration = 8
[accept]
max_drop = 0.99
[[stage]]
kind = "distil"
epochs = 1
batch = 16
[[stage.objective]]
use = "kd"
[stage.sequences]
max_new_tokens = 5
[[stage]]
kind = "quantize"
engines = ["onnxruntime"]
schemes = ["dynamic"]
"""


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    part = toy.raw(60).parts["train"]
    with (tmp_path / "t.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("word", "letters"), *zip(part.samples, part.labels, strict=True)])
    model = toy.save(tmp_path / "m", "marian", layers=1)
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE.format(model=model, source=tmp_path / "t.csv", task="translation"))
    return Request(recipe, None, None, (), None, None, tmp_path / "out")


def infer(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "infer.py", *words], cwd=folder, capture_output=True, text=True, check=False)


def test_a_run_writes_texts_in_the_targets_runtime_and_packs_a_writer(
    request_: Request, capsys: pytest.CaptureFixture[str]
) -> None:
    session = open_session(request_)
    assert session.plan.model["task"] == "translation"
    assert any("one pass" in warning for warning in session.plan.warnings)
    assert run_command(request_, remeasure=False, as_json=True) in (0, 3)
    found = json.loads(capsys.readouterr().out)
    report = found["report"]
    assert (report["task"], report["metric"]) == ("translation", "BLEU")
    (outcome,) = report["outcomes"]
    rows = {row["artifact"]: row for row in outcome["rows"]}
    assert {"teacher/fp32", "student/fp32", "student/int8-dynamic-ort"} <= set(rows)
    detail = rows["student/fp32"]["test"]["detail"]
    assert 0 <= rows["student/fp32"]["test"]["value"] <= 1
    assert {"chrf", "rouge_l", "exact_match", "word_error_rate", "standard_error"} <= set(detail)
    assert 1 < detail["perplexity"] < 100  # 11 tokens
    place = Path(found["packages"]["raspberry-pi-5"]).with_suffix("")
    check = infer(place, "--self-check")
    assert check.returncode == 0, check.stdout + check.stderr
    said = infer(place, "abc", "--json")
    assert said.returncode == 0, said.stderr
    (answer,) = json.loads(said.stdout)
    assert set(answer["text"].split()) <= set("abcdefgh?")
    assert len(answer["tokens"]) <= 6
