"""Several teachers: combination, weights, dropping, views of their own, and the bank of the largest logits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from compressor.data.types import DataBundle  # noqa: E402
from compressor.distil import ensemble, top  # noqa: E402
from compressor.distil.loop import distil  # noqa: E402
from compressor.distil.objectives.base import Batch, Step  # noqa: E402
from compressor.distil.objectives.logits import KnowledgeDistillation, TopKKl  # noqa: E402
from compressor.distil.panel import Panel, Teacher, view_problems  # noqa: E402
from compressor.models.types import LoadedModel, Provenance, RawInput  # noqa: E402
from compressor.recipe import DistilStage  # noqa: E402
from compressor.types import TensorSpec  # noqa: E402
from tests.unit.distil.toy import bundle, convnet  # noqa: E402

pytestmark = pytest.mark.train
T = torch.tensor([[2.0, 1, 0, -1], [0, 3, 1, -2], [1, 1, 2, 0]])
S = torch.tensor([[1.0, 0, 0.5, -0.5], [0.5, 1, 0, 0], [0, 2, 1, -1]])


def loaded(module: object, name: str, task: str = "image-classification", onnx: Path | None = None) -> LoadedModel:
    return LoadedModel(
        kind="factory",
        task=task,
        module=module,
        onnx=onnx,
        inputs=(TensorSpec("image", "float32", ("batch", 1, 12, 12)),),
        outputs=(TensorSpec("logits", "float32", ("batch", 4)),),
        labels=tuple("abcd"),
        preprocess=RawInput(),
        provenance=Provenance(name, f"sha256:{name}", "MIT"),
    )


def panel(*modules: object, weights: str = "fixed", drop: float = 0.0, clean: bool = False) -> Panel:
    names = ["main", "second", "third"]
    found = tuple(
        Teacher(name, loaded(module, name), 1.0, clean, None) for name, module in zip(names, modules, strict=False)
    )
    return Panel(found, weights, drop)


def test_combined_logits_are_the_mean_of_the_probabilities() -> None:
    weights = torch.tensor([[0.25, 0.75]] * 3)
    got = torch.softmax(ensemble.combined([T, S], weights), -1)
    want = 0.25 * torch.softmax(T, -1) + 0.75 * torch.softmax(S, -1)
    assert torch.allclose(got, want, atol=1e-6)
    alone = ensemble.combined([T, S], torch.tensor([[1.0, 0.0]] * 3))
    assert torch.allclose(torch.softmax(alone, -1), torch.softmax(T, -1), atol=1e-6)


def test_combined_embeddings_are_unit_vectors_between_them() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    got = ensemble.combined([a, b], torch.tensor([[0.5, 0.5]]), embedding=True)
    assert torch.allclose(got, torch.full((1, 2), math.sqrt(0.5)))


def test_weights_per_sample() -> None:
    flat, sure = torch.zeros(1, 4), torch.tensor([[20.0, 0, 0, 0]])
    base, right, wrong = torch.tensor([0.5, 0.5]), torch.tensor([0]), torch.tensor([1])
    confident = ensemble.sample_weights("confidence", base, [flat, sure], right)
    assert confident[0, 1] > 0.999
    assert ensemble.sample_weights("agreement", base, [flat, sure], right)[0, 1] == pytest.approx(0.8, abs=1e-3)
    assert ensemble.sample_weights("agreement", base, [flat, sure], wrong)[0, 1] < 1e-3
    unknown = ensemble.sample_weights("agreement", base, [flat, sure], torch.tensor([-100]))
    assert torch.allclose(unknown, base[None])


def test_the_farthest_teacher_always_stays() -> None:
    coins = torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
    logits = [S[:1].repeat(200, 1), T[:1].repeat(200, 1), -3 * T[:1].repeat(200, 1)]
    weights = ensemble.dropped(torch.full((200, 3), 1 / 3), logits, S[:1].repeat(200, 1), coins, 0.5)
    assert (weights[:, 2] > 0).all()
    assert torch.allclose(weights.sum(1), torch.ones(200))
    assert 0.35 < float((weights[:, 0] == 0).float().mean()) < 0.65
    every = ensemble.dropped(torch.full((200, 3), 1 / 3), logits, S[:1].repeat(200, 1), coins, 0.0)
    assert torch.allclose(every, torch.full((200, 3), 1 / 3))


def test_fitted_weights_are_those_of_the_highest_likelihood() -> None:
    random = np.random.default_rng(0)
    correct = np.stack([random.uniform(0.5, 1, 400), random.uniform(0, 0.6, 400)], 1)
    found = ensemble.fitted_weights(correct)
    grid = np.linspace(0, 1, 1001)
    best = grid[np.argmax([np.log(correct @ [w, 1 - w] + 1e-30).sum() for w in grid])]
    assert found.sum() == pytest.approx(1)
    assert found[0] == pytest.approx(best, abs=5e-3)


def run(tmp_path: Path, wanted: Panel | None, module: object, data: DataBundle | None = None, **settings: object):
    student = convnet(3, 5)
    config = DistilStage.model_validate(
        {"kind": "distil", "epochs": 2, "batch": 32, "objective": [{"use": "kd"}], "precision": "fp32"} | settings
    )
    notes = []
    result = distil(
        student,
        module,
        data or bundle(),
        config,
        seed=3,
        work=tmp_path / "work",
        bank=tmp_path / "bank",
        teacher_digest="t",
        signals={},
        panel=wanted,
        on_event=lambda kind, fields: notes.append((kind, dict(fields))),
    )
    return student, result, notes


def equal(first: object, second: object) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_twice_the_same_teacher_teaches_as_once(tmp_path: Path) -> None:
    teacher = convnet(8, 6)
    once, _, _ = run(tmp_path / "a", None, teacher)
    twice, result, _ = run(tmp_path / "b", panel(teacher, convnet(8, 6)), teacher)
    assert equal(once, twice)
    assert result.cached
    assert result.teacher_forwards == 2 * 96
    assert len([path for path in (tmp_path / "b" / "bank").iterdir() if path.is_dir()]) == 2


@pytest.mark.parametrize("weights", ["learned", "confidence", "agreement"])
def test_cached_and_online_panels_agree(tmp_path: Path, weights: str) -> None:
    modules = convnet(8, 6), convnet(6, 9)
    cached, result, notes = run(tmp_path / "a", panel(*modules, weights=weights, drop=0.5), modules[0])
    online, other, _ = run(tmp_path / "b", panel(*modules, weights=weights, drop=0.5), modules[0], cache="off")
    assert equal(cached, online)
    assert result.cached
    assert not other.cached
    assert any("weights of the teachers" in str(fields.get("text")) for _, fields in notes)


def test_a_clean_teacher_has_one_bank_for_all_views(tmp_path: Path) -> None:
    teacher = convnet(8, 6)
    _, result, _ = run(tmp_path, panel(teacher, clean=True), teacher, augment=["shift"], views=2)
    assert result.teacher_forwards <= 96 + 16
    assert len([path for path in (tmp_path / "bank").iterdir() if path.is_dir()]) == 1


def test_an_onnx_file_teaches_logits(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from compressor.export.onnx import export_onnx

    second, main = convnet(6, 9), convnet(8, 6)
    path, spec = tmp_path / "second.onnx", loaded(second, "second")
    export_onnx(
        second,
        {"image": np.zeros((2, 1, 12, 12), np.float32)},
        spec.inputs,
        spec.outputs,
        path,
        name="second",
        metadata={},
    )
    file = Teacher("second", loaded(None, "second", onnx=path), 1.0, False, None)
    first = Teacher("main", loaded(main, "main"), 1.0, False, None)
    by_file, _, _ = run(tmp_path / "a", Panel((first, file), "fixed", 0.0), main)
    by_module, _, _ = run(tmp_path / "b", panel(main, second), main)
    assert equal(by_file, by_module)


def test_the_bucketed_bank_is_used_by_kd_as_documented() -> None:
    for tau in (1.0, 2.0):
        found = top.top_signals(T, 2, [tau])
        kd = KnowledgeDistillation(KnowledgeDistillation.Options(temperature=tau))
        other = TopKKl(TopKKl.Options(temperature=tau, k=2, tail=0.0))
        batch, step = Batch(None, None), Step(0, 1, 0)
        got, want = (term.sum / term.count for term in (kd({"logits": S}, found, batch, step),
                                                        other({"logits": S}, {"logits": T}, batch, step)))  # fmt: skip
        full = kd({"logits": S}, {"logits": T}, batch, step)
        assert float(got) == pytest.approx(float(want), rel=1e-5)
        assert float(got) <= float(full.sum / full.count) + 1e-6
    everything = top.top_signals(T, 4, [1.0])
    kd = KnowledgeDistillation(KnowledgeDistillation.Options(temperature=1.0))
    assert float(kd({"logits": S}, everything, batch, step).sum) / 3 == pytest.approx(0.341269, abs=1e-5)


def test_top_logits_are_cached_in_half_precision(tmp_path: Path) -> None:
    teacher = convnet(8, 6)
    _, result, _ = run(tmp_path, None, teacher, cache_logits=2)
    assert result.cached
    assert result.cache_bytes == 96 * (2 * 2 + 2 * 4 + 4)
    names = {path.name for path in (tmp_path / "bank").rglob("*.npy") if "done" not in path.name}
    assert names == {"logits.top.npy", "logits.index.npy", "logits.rest@2.npy"}


def test_impossible_wishes_are_named() -> None:
    stage = DistilStage(kind="distil", cache_logits=2)
    both = view_problems(panel(None, None), stage, [("kd", frozenset({"logits"})), ("tvd", frozenset({"logits"}))], "s")
    assert [problem.what.split(";")[0] for problem in both] == ["works with one teacher", "`tvd` reads all logits"]
