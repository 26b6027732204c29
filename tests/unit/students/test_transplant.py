"""Another tokenizer: matching pursuit keeps its promises, a permuted vocabulary changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("tokenizers")

from tokenizers import Tokenizer  # noqa: E402

from compressor.data import load_data, read_raw  # noqa: E402
from compressor.data.surfaces import byte_alphabet, vocabulary_of, words  # noqa: E402
from compressor.errors import PlanError  # noqa: E402
from compressor.models import load_model  # noqa: E402
from compressor.models.omp import pursue  # noqa: E402
from compressor.models.rebuild import load_student, save_student  # noqa: E402
from compressor.models.vocabulary import table_parameters  # noqa: E402
from compressor.plan import recipe_problems  # noqa: E402
from compressor.recipe import DataConfig, Recipe, StudentStage, TeacherConfig  # noqa: E402
from compressor.students import make_student  # noqa: E402
from compressor.students.transplant import Pair, settle, start_rows, transplant  # noqa: E402
from tests.unit.students.test_tokenizer import byte_level, texts, wordpiece  # noqa: E402
from tests.unit.students.test_vocabulary import checkpoint, write  # noqa: E402

pytestmark = pytest.mark.train


# ------------------------------------------------------------------------------------------- matching pursuit


@pytest.fixture(scope="module")
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.randn(20, 12, generator=random), torch.randn(60, 12, generator=random)


def test_residual_never_grows(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    targets, dictionary = problem
    found = pursue(targets, dictionary, 12)
    norms = torch.cat([targets.norm(dim=1, keepdim=True), found.norms], dim=1)
    assert (norms[:, 1:] <= norms[:, :-1] + 1e-6).all()
    assert all(len(set(row)) == 12 for row in found.atoms.tolist()), "no atom twice"
    short = pursue(targets, dictionary, 4)
    assert torch.equal(short.atoms, found.atoms[:, :4])


def test_residual_is_that_of_least_squares(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    targets, dictionary = problem
    found = pursue(targets, dictionary, 5)
    made = found.combine(dictionary)
    assert torch.allclose((targets - made).norm(dim=1), found.norms[:, -1], atol=1e-5)
    for target, atoms, norm in zip(targets, found.atoms, found.norms[:, -1], strict=True):
        best = np.linalg.lstsq(dictionary[atoms].T.numpy(), target.numpy(), rcond=None)[0]
        assert np.linalg.norm(dictionary[atoms].T.numpy() @ best - target.numpy()) == pytest.approx(
            float(norm), abs=1e-5
        )


def test_as_many_atoms_as_the_rank_reconstruct(problem: tuple[torch.Tensor, torch.Tensor]) -> None:
    targets, dictionary = problem
    for count in (12, 40):
        assert (pursue(targets, dictionary, count).combine(dictionary) - targets).abs().max() < 1e-5
    low = dictionary[:, :3] @ torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    inside = torch.randn(7, 60, generator=torch.Generator().manual_seed(2)) @ low / 60
    assert (pursue(inside, low, 6).combine(low) - inside).abs().max() < 1e-5, "dependent atoms add nothing"


def test_batches_do_not_matter(problem: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    targets, dictionary = problem
    whole = pursue(targets, dictionary, 6)
    monkeypatch.setattr("compressor.models.omp.FLOATS", 300)
    parts = pursue(targets, dictionary, 6)
    assert torch.equal(whole.atoms, parts.atoms)
    assert torch.allclose(whole.weights, parts.weights, atol=1e-5)
    assert torch.allclose(whole.combine(dictionary), parts.combine(dictionary), atol=1e-5)
    assert parts.combine(dictionary[:, 0]).shape == (20,)


# ------------------------------------------------------------------------------------------- surfaces


def test_tokens_of_both_kinds_meet() -> None:
    pieces, levels = (vocabulary_of(made.to_str().encode()) for made in (wordpiece(), byte_level()))
    both = set(pieces.ids) & set(levels.ids)
    assert ("text", b"walk", True) in both
    assert ("text", b"ing", False) in both
    assert pieces.role("pad") == 0
    assert levels.role("eos") == 1
    assert words(("text", b"walk", True)) == " walk"
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_old_and_new_ids_of_shared_tokens() -> None:
    old, new = wordpiece().to_str().encode(), byte_level().to_str().encode()
    pair = Pair.of(old, new)
    assert pair.old.surfaces[pair.shared[pair.new.ids[("text", b"walk", True)]]] == ("text", b"walk", True)
    assert len(pair.absent) + len(pair.shared) == pair.new.size


# ------------------------------------------------------------------------------------------- whole models


def permuted(content: bytes, order: np.ndarray) -> bytes:
    """The same tokenizer, with token ``i`` under the id ``order[i]``."""
    data = json.loads(content)
    data["model"]["vocab"] = {token: int(order[number]) for token, number in data["model"]["vocab"].items()}
    for item in data["added_tokens"]:
        item["id"] = int(order[item["id"]])
    for item in data["post_processor"].get("special_tokens", {}).values():
        item["ids"] = [int(order[number]) for number in item["ids"]]
    for side in ("sep", "cls"):
        if side in data["post_processor"]:
            data["post_processor"][side][1] = int(order[data["post_processor"][side][1]])
    return json.dumps(data).encode()


def opened(folder: Path, data: Path, task: str, **keys: Any) -> tuple[Any, Any, Any]:
    config = DataConfig(source=str(data), text="text", max_length=32, duplicates="drop")
    if task != "causal-lm":
        config = config.model_copy(update={"label": "label"})
    recipe = Recipe(
        teacher=TeacherConfig(model=str(folder), task=task),  # type: ignore[arg-type]
        data=config,
        stage=[{"kind": "student", **keys}],  # type: ignore[list-item]
    )
    raw = read_raw(config)
    model = load_model(recipe.teacher, data=config)
    made = transplant(model, load_data(config, model, seed=0, raw=raw), raw, recipe)
    assert made is not None
    return model, made, recipe.stage[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("transplant")
    for name, kind in (("bert", "bert"), ("gpt", "gpt")):
        checkpoint(root / name, kind)
    write(root / "data.csv", texts(60, 5))
    return {"bert": root / "bert", "gpt": root / "gpt", "data": root / "data.csv"}


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_a_permuted_vocabulary_is_the_same_model(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    task = "text-classification" if kind == "bert" else "causal-lm"
    content = (folders[kind] / "tokenizer.json").read_bytes()
    size = vocabulary_of(content).size
    order = np.concatenate([[0], 1 + np.random.default_rng(0).permutation(size - 1)])
    (tmp_path / "tokenizer.json").write_bytes(permuted(content, order))
    model, made, stage = opened(
        folders[kind], folders["data"], task, tokenizer=str(tmp_path / "tokenizer.json"), transplant="zero"
    )
    student, facts = settle(made.model.module, model, stage)
    inputs = made.data.splits["validation"].batch(np.arange(2))
    back = np.argsort(order)
    theirs = {**inputs, "input_ids": back[inputs["input_ids"]]}
    with torch.no_grad():
        own, other = (
            m(**{k: torch.from_numpy(v) for k, v in x.items()}) for m, x in ((student, inputs), (model.module, theirs))
        )
    assert torch.equal(own, other[..., torch.from_numpy(back)] if kind == "gpt" else other)
    assert f"{size} kept, 0 new" in facts[0].after
    assert made.model.provenance.digest != model.provenance.digest
    assert (
        made.data.digests["train"]
        != load_data(
            DataConfig(source=str(folders["data"]), text="text", max_length=32, duplicates="drop"), model, seed=0
        ).digests["train"]
    )


def test_a_language_model_takes_an_encoders_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    model, made, stage = opened(folders["gpt"], folders["data"], "causal-lm", tokenizer=str(folders["bert"]), atoms=8)
    pair = Pair.of(model.files["tokenizer.json"], made.model.files["tokenizer.json"])
    student, facts = settle(made.model.module, model, stage)
    (name, table), *more = table_parameters(student).items()
    assert not more, "the output is still tied to the embedding"
    old = table_parameters(model.module)[name]
    for new, before in list(pair.shared.items())[:20]:
        assert torch.equal(table[new], old[before])
    assert "8 atoms" in facts[0].reason
    foreign = load_model(TeacherConfig(model=str(folders["bert"]), task="text-classification")).module
    donor = next(iter(table_parameters(foreign).values())).detach()
    found = pursue(donor[pair.absent], donor[list(pair.shared)], 8)
    assert torch.allclose(table[pair.absent], found.combine(old[list(pair.shared.values())]), atol=1e-6)
    batch = {n: torch.from_numpy(a) for n, a in made.data.splits["train"].batch(np.arange(2)).items()}
    assert student(**batch).shape[-1] == pair.new.size == made.model.outputs[0].shape[-1]
    assert made.model.preprocess.eos_id == pair.new.role("eos")
    ready = make_student(student, StudentStage(kind="student", keep_layers=1), batch, seed=0)
    save_student(tmp_path, ready.module, ready.record)
    again = load_student(tmp_path, made.model.module)
    with torch.no_grad():
        assert torch.equal(again(**batch), ready.module(**batch))
    Tokenizer.from_str(made.model.files["tokenizer.json"].decode())


def test_other_starts(folders: dict[str, Path]) -> None:
    model, made, _ = opened(folders["gpt"], folders["data"], "causal-lm", tokenizer=str(folders["bert"]))
    pair = Pair.of(model.files["tokenizer.json"], made.model.files["tokenizer.json"])
    pieces, mean, zero = (next(iter(start_rows(pair, model, how).values())) for how in ("pieces", "mean", "zero"))
    assert torch.equal(zero[pair.absent], torch.zeros_like(zero[pair.absent]))
    old = next(iter(table_parameters(model.module).values())).detach()
    assert torch.allclose(mean[pair.absent[0]], old[: pair.old.size].mean(0))
    number = next(n for n in pair.absent if pair.new.surfaces[n][0] == "text" and len(pair.new.surfaces[n][1]) > 3)
    tokenizer = Tokenizer.from_str(model.files["tokenizer.json"].decode())
    ids = tokenizer.encode(words(pair.new.surfaces[number]), add_special_tokens=False).ids
    assert torch.allclose(pieces[number], old[ids].mean(0))


def test_what_cannot_be_exchanged_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no checkpoint folder"):
        opened(folders["gpt"], folders["data"], "causal-lm", tokenizer=str(folders["bert"] / "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(PlanError, match=r"not a tokenizer\.json"):
        opened(folders["gpt"], folders["data"], "causal-lm", tokenizer=str(tmp_path), transplant="mean")
    with pytest.raises(ValueError, match="need `tokenizer`"):
        StudentStage(kind="student", atoms=3)
    late = Recipe(stage=[{"kind": "prune", "heads": 0.5}, {"kind": "student", "tokenizer": "x"}])  # type: ignore[list-item]
    assert any("first stage" in item.what for item in recipe_problems(late, "checkpoint", ()))
