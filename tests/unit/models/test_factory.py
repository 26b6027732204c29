"""``pkg.mod:factory``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from compressor.errors import ConfigError, PlanError  # noqa: E402
from compressor.models import ImageInput, RawInput, load_model  # noqa: E402
from compressor.recipe import DataConfig, ImagePreprocess, TeacherConfig  # noqa: E402
from compressor.types import TensorSpec  # noqa: E402

pytestmark = pytest.mark.train

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)
    def forward(self, picture):
        return self.head(self.drop(self.conv(picture).mean(dim=(2, 3))))

class Two(nn.Module):
    def forward(self, left, right):
        return left + right

class Window(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    def forward(self, signal):
        return self.net(signal)

def net():
    torch.manual_seed(0)
    return Net()
def two(): return Two()
def window(): return Window()
def text(): return "no module"
def needs(width): return Net()
def fails(): raise OSError("no weights")
class Pair(Net):
    def forward(self, picture):
        return 1, 2
def pair(): return Pair()
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factory_under_test.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def load(name: str, sample: object = None, **data: object):
    return load_model(
        TeacherConfig(licence="mit"), factory=f"factory_under_test:{name}", data=DataConfig(**data), sample=sample
    )


def test_pictures() -> None:
    model = load("net", np.zeros((8, 8, 1), np.uint8))
    assert (model.kind, model.task, model.labels) == ("factory", "image-classification", ("0", "1", "2"))
    assert model.inputs == (TensorSpec("picture", "float32", ("batch", 1, 8, 8)),)
    assert model.outputs == (TensorSpec("logits", "float32", ("batch", 3)),)
    assert isinstance(model.preprocess, ImageInput)
    assert not model.module.training
    assert model.provenance.licence == "mit"
    assert model.provenance.digest == load("net", np.zeros((8, 8), np.uint8)).provenance.digest


def test_pictures_by_the_recipe_alone() -> None:
    settings = ImagePreprocess(size=(6, 10), channels=1)
    assert load("net", preprocess=settings).inputs[0].shape == ("batch", 1, 6, 10)
    with pytest.raises(PlanError, match=r"input shape of .* is not known"):
        load("net")


def test_arrays() -> None:
    model = load("window", np.zeros((3, 4)))
    assert model.inputs == (TensorSpec("signal", "float32", ("batch", 3, 4)),)
    assert model.outputs == (TensorSpec("output", "float32", ("batch", 5)),)
    assert isinstance(model.preprocess, RawInput)
    two = load("two", {"left": np.zeros(4, np.float32), "right": np.zeros(4, np.float32)})
    assert [spec.name for spec in two.inputs] == ["left", "right"]
    with pytest.raises(PlanError, match=r"takes 2 inputs \(left, right\)"):
        load("two", np.zeros(4, np.float32))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("text", "returned a str, not a torch.nn.Module"),
        ("needs", "wants width"),
        ("fails", "OSError: no weights"),
        ("pair", "returns a tuple"),
        ("nte", "did you mean `net`"),
        ("CODE_", "has no"),
    ],
)
def test_faults_of_the_factory(name: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        load(name, np.zeros((8, 8, 1), np.uint8))
    assert caught.value.exit_code == 2


def test_data_that_does_not_fit() -> None:
    with pytest.raises(PlanError, match=r"cannot take a sample of the data \(picture float32 \(2, 3, 8, 8\)\)"):
        load("net", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(PlanError, match="names 2 classes but"):
        load("net", np.zeros((8, 8, 1), np.uint8), labels=("a", "b"))
