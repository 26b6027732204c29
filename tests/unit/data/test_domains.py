"""A column of domains goes from the file to the mixture of a stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from compressor.data.load import load_data
from compressor.errors import ConfigError
from compressor.models.types import LoadedModel
from compressor.recipe import DataConfig, DistilStage

TEXTS = [" ".join(words) for words in product("abcde", "abcde", "fghij")]


def source(folder: Path, name: str = "t.csv") -> Path:
    rows = [f"{text},{'pos' if text < 'c' else 'neg'},{'law' if 'f' in text else 'news'}" for text in TEXTS]
    path = folder / name
    path.write_text("\n".join(["text,label,kind", *rows]))
    return path


def config(folder: Path, **settings: object) -> DataConfig:
    return DataConfig.model_validate({"source": str(source(folder)), "domain": "kind", "validation": 20, **settings})


def test_every_training_sample_has_the_domain_of_its_row(tmp_path: Path, text_model: Callable[..., LoadedModel]):
    model = text_model()
    data = load_data(config(tmp_path), model, seed=0)
    numbers = data.domains["train"]
    assert len(numbers) == len(data.splits["train"])
    home, rows = data.rows["train"]
    assert home == "train"
    assert numbers.tolist() == [0 if "f" in TEXTS[row] else 1 for row in rows]  # law, news
    plain = load_data(config(tmp_path, domain=None, text="text"), model, seed=0)
    assert plain.domains == {}
    assert plain.digests["train"] != data.digests["train"]  # a stage that mixes by it depends on it
    assert plain.digests["test"] == data.digests["test"]


def test_further_data_may_lack_the_column(tmp_path: Path, text_model: Callable[..., LoadedModel]):
    other = tmp_path / "more.txt"
    other.write_text("j j j j\ni i i i\n")
    data = load_data(config(tmp_path, transfer=str(other)), text_model(), seed=0)
    assert set(data.domains) == {"train"}
    pytest.importorskip("torch")
    from compressor.distil.strategies.draws import domains
    from compressor.distil.stream import TrainingSet

    found = TrainingSet.of(data)
    assert found.domains is not None
    assert found.domains[-2:].tolist() == [-1, -1]
    assert [len(part) for part in domains(found, "domain")] == [2, *np.bincount(data.domains["train"])]
    assert found.take(np.array([0, len(found) - 1])).domains.tolist() == [found.domains[0], -1]


def test_a_column_that_is_not_there_is_refused(tmp_path: Path, text_model: Callable[..., LoadedModel]):
    with pytest.raises(ConfigError, match="did you mean `kind`"):
        load_data(config(tmp_path, domain="kynd"), text_model(), seed=0)


def test_blocks_belong_to_the_document_they_begin_in(tmp_path: Path, text_model: Callable[..., LoadedModel]):
    model = text_model()
    preprocess = model.preprocess.model_copy(update={"eos_id": 3, "max_length": 8})
    model = replace(model, task="causal-lm", labels=(), preprocess=preprocess)
    data = load_data(config(tmp_path, label=None), model, seed=0)
    split, (_, rows) = data.splits["train"], data.rows["train"]
    stream = [domain for row in rows for domain in [0 if "f" in TEXTS[row] else 1] * 6]  # three words, three marks
    assert data.domains["train"].tolist() == [stream[number * 8] for number in range(len(split))]


@pytest.mark.train
def test_the_plan_asks_for_the_column():
    torch = pytest.importorskip("torch")
    from compressor.distil.fit import fit_problems
    from tests.unit.distil.toy import bundle, convnet

    data = bundle()
    stage = DistilStage.model_validate({"kind": "distil", "strategy": [{"use": "mix", "by": "domain"}]})
    example = {"image": torch.zeros(2, 1, 12, 12)}
    found = fit_problems(stage, "s", task="image-classification", module=convnet(2, 1), example=example, data=data)
    assert [problem.what for problem in found] == ["mix by domain needs the column of domains: give `data.domain`"]
    known = replace(data, domains={"train": np.arange(96) % 2})
    assert not fit_problems(stage, "s", task="image-classification", module=convnet(2, 1), example=example, data=known)
