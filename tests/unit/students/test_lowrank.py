"""Low-rank layers: exact at full rank, best of their rank, committed to fewer multiply-accumulates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from compressor.models.cost import count_macs  # noqa: E402
from compressor.models.lowrank import energies, factorise, factors, largest_saving_rank, second_moments  # noqa: E402
from compressor.models.rebuild import load_student, save_student  # noqa: E402
from compressor.recipe import StudentStage  # noqa: E402
from compressor.students import check, make_student  # noqa: E402
from tests.unit.students.test_make_student import Text  # noqa: E402

pytestmark = pytest.mark.train


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(0)
    return Text(2).eval()


@pytest.fixture
def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.arange(24).reshape(3, 8), "attention_mask": torch.ones(3, 8, dtype=torch.long)}


def stage(**keys: Any) -> StudentStage:
    return StudentStage(kind="student", **keys)


def test_full_rank_is_exact(teacher: nn.Module, tokens: dict[str, Tensor]) -> None:
    wanted = teacher(**tokens)
    for path in ("model.bert.encoder.layer.0.intermediate.dense", "model.bert.embeddings.word_embeddings"):
        factorise(teacher, path, 32)
    assert torch.allclose(teacher(**tokens), wanted, atol=1e-5)


def test_error_is_the_sum_of_the_dropped_singular_values() -> None:
    matrix = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, second = factors(matrix, 5)
    values = torch.linalg.svdvals(matrix)
    assert first.shape == (5, 12)
    assert float((matrix - second @ first).square().sum()) == pytest.approx(float(values[5:].square().sum()))
    layer = nn.Linear(12, 20).double()
    layer.weight.data.copy_(matrix)
    assert float(energies(layer)[4]) == pytest.approx(float(values[:5].square().sum() / values.square().sum()))


def test_inputs_weigh_the_error() -> None:
    """With the inputs' second moment the outputs are nearer than without, and no pair of this rank is nearer."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Sequential(nn.Linear(16, 16, bias=False)).double()
    layer[0].weight.data.copy_(torch.randn(16, 16, generator=generator))
    data = torch.randn(500, 16, generator=generator).double() * torch.logspace(1, -1, 16).double()
    moments = second_moments(layer, ["0"], [{"input": data[:200]}, {"input": data[200:]}])
    assert torch.allclose(moments["0"], data.T @ data / 500)
    wanted = data @ layer[0].weight.T
    errors = {}
    for name, moment in (("weights", None), ("inputs", moments["0"])):
        first, second = factors(layer[0].weight.detach(), 4, moment)
        errors[name] = float((wanted - data @ first.T @ second.T).square().sum())
    assert errors["inputs"] < 0.9 * errors["weights"]
    best = float(torch.linalg.svdvals(wanted.detach())[4:].square().sum())
    assert errors["inputs"] == pytest.approx(best, rel=1e-3)


def test_padding_is_no_input() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.layer(x)

    data = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    found = second_moments(Masked(), ["layer"], [{"x": data, "attention_mask": mask}])["layer"]
    real = data[mask.bool()].double()
    assert torch.allclose(found, real.T @ real / 6)


def test_a_share_stays(teacher: nn.Module, tokens: dict[str, Tensor]) -> None:
    made = make_student(teacher, stage(rank=0.5), tokens, seed=0)
    changed = {fact.layer: fact for fact in made.facts}
    dense = made.module.model.bert.encoder.layer[0].intermediate.dense
    rank = round(0.5 * 32 * 48 / 80)
    assert dense[0].weight.shape == (rank, 32)
    assert dense[1].weight.shape == (48, rank)
    assert len(changed) == len(made.facts)
    assert count_macs(made.module, tokens) < 0.62 * count_macs(teacher, tokens)
    assert made.parameters_after < 0.6 * made.parameters_before
    assert made.module(**tokens).shape == (3, 2)


def test_ranks_are_rounded_and_stored(teacher: nn.Module, tokens: dict[str, Tensor], tmp_path: Path) -> None:
    made = make_student(teacher, stage(rank=0.6, rank_inputs=True), tokens, seed=0, calibration=[tokens], round_to=4)
    ranks = [step["rank"] for step in made.record]
    assert ranks
    assert all(rank % 4 == 0 for rank in ranks)
    save_student(tmp_path, made.module, made.record)
    assert torch.equal(load_student(tmp_path, teacher)(**tokens), made.module(**tokens))


def test_named_ranks_come_first(teacher: nn.Module, tokens: dict[str, Tensor]) -> None:
    made = make_student(teacher, stage(ranks={"*intermediate.dense": 7}), tokens, seed=0)
    assert [step["rank"] for step in made.record] == [7, 7]
    assert all(fact.reason for fact in made.facts)


def test_energy_chooses_the_rank(teacher: nn.Module, tokens: dict[str, Tensor]) -> None:
    layer = teacher.model.bert.encoder.layer[1].output.dense
    with torch.no_grad():
        layer.weight.copy_(torch.randn(32, 3) @ torch.randn(3, 48))
    made = make_student(teacher, stage(rank_energy=0.9999), tokens, seed=0)
    assert {step["module"]: step["rank"] for step in made.record} == {"model.bert.encoder.layer.1.output.dense": 3}
    assert torch.allclose(made.module(**tokens), teacher(**tokens), atol=1e-3)


def test_exported_file_has_the_smaller_products(teacher: nn.Module, tokens: dict[str, Tensor], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    import onnxruntime

    from compressor.export.onnx import export_onnx
    from compressor.export.optimise import optimise
    from compressor.models.onnx_facts import describe
    from compressor.types import TensorSpec

    specs = tuple(TensorSpec(name, "int64", (3, 8)) for name in tokens)
    arrays = {name: value.numpy() for name, value in tokens.items()}
    macs = {}
    for name, module in (
        ("teacher", teacher),
        ("student", make_student(teacher, stage(rank=0.5), tokens, seed=0).module),
    ):
        path = tmp_path / f"{name}.onnx"
        export_onnx(
            module, arrays, specs, (TensorSpec("logits", "float32", (3, 2)),), tmp_path / "raw.onnx",
            name=name, metadata={},
        )  # fmt: skip
        optimise(tmp_path / "raw.onnx", path)
        macs[name] = describe(path).macs or 0, count_macs(module, tokens), describe(path).parameters
        found = onnxruntime.InferenceSession(path).run(None, arrays)[0]
        assert np.allclose(found, module(**tokens).detach().numpy(), atol=1e-4)
    assert macs["student"][2] < 0.6 * macs["teacher"][2]
    if macs["teacher"][0]:
        saved = macs["student"][0] / macs["teacher"][0], macs["student"][1] / macs["teacher"][1]
        assert saved[0] == pytest.approx(saved[1], abs=0.05)


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        ({"ranks": {"nothing*": 4}}, "ranks.nothing*"),
        ({"ranks": {"*intermediate.dense": 30}}, "ranks.*intermediate.dense"),
        ({"rank": 0.5}, "rank"),
    ],
)
def test_requests_that_save_nothing(
    teacher: nn.Module, tokens: dict[str, Tensor], keys: dict[str, Any], where: str
) -> None:
    module: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(4, 1)) if where == "rank" else teacher
    batch = {"input": torch.randn(2, 4)} if where == "rank" else tokens
    assert [problem.where for problem in check(module, batch, stage(**keys))] == [where]


def test_largest_saving_rank() -> None:
    for rows, columns in ((10, 10), (384, 1536), (3, 5)):
        rank = largest_saving_rank(rows, columns)
        assert rank * (rows + columns) < rows * columns <= (rank + 1) * (rows + columns)
