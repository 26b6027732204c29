"""Structure records and student files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

from compressor.errors import StageError  # noqa: E402
from compressor.models.cost import count_macs, macs_by_layer  # noqa: E402
from compressor.models.rebuild import indices_of, load_student, ranges_of, replay, save_student  # noqa: E402
from compressor.prune import prune  # noqa: E402
from compressor.recipe import PruneStage, StudentStage  # noqa: E402
from compressor.students import make_student  # noqa: E402

pytestmark = pytest.mark.train

TOKENS = {"input_ids": torch.arange(2, 18).reshape(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}


class MaskedLm(nn.Module):
    """The decoder's matrix is the embedding matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = transformers.BertConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=60
        )
        self.model = transformers.BertForMaskedLM(config)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


@given(st.sets(st.integers(0, 200)))
def test_ranges_are_the_indices(indices: set[int]) -> None:
    assert indices_of(ranges_of(sorted(indices))).tolist() == sorted(indices)


def test_student_file_round_trip_with_tied_weights(tmp_path: Path) -> None:
    teacher = MaskedLm().eval()
    made = make_student(teacher, StudentStage(kind="student", keep_layers=2, hidden_size=24), TOKENS, seed=0)
    pruned = prune(made.module, TOKENS, PruneStage(kind="prune", heads=0.5, neurons=0.5), [TOKENS])
    record = made.record + pruned.record
    with torch.no_grad():  # as training would
        for parameter in pruned.module.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    save_student(tmp_path, pruned.module, record)
    loaded = load_student(tmp_path, teacher)
    assert torch.equal(loaded(**TOKENS), pruned.module(**TOKENS))
    model = loaded.model
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.bert.embeddings.word_embeddings.weight.shape == (60, 24)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["record.json", "student.safetensors"]
    stored = sum(parameter.numel() for parameter in loaded.parameters()) * 4
    assert (tmp_path / "student.safetensors").stat().st_size < stored + 8192  # the shared matrix is stored once
    assert teacher.model.bert.embeddings.word_embeddings.weight.shape == (60, 32)


def test_same_student_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        made = make_student(MaskedLm().eval(), StudentStage(kind="student", hidden_size=24), TOKENS, seed=0)
        save_student(tmp_path / name, made.module, made.record)
    for file in ("record.json", "student.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_record_is_data() -> None:
    pruned = prune(MaskedLm().eval(), TOKENS, PruneStage(kind="prune", ratio=0.5, layers=1), [TOKENS])
    again = replay(MaskedLm(), json.loads(json.dumps(pruned.record)))
    assert str(again) == str(pruned.module)
    assert {step["op"] for step in pruned.record} == {"cut", "drop", "set"}


@pytest.mark.parametrize(
    "step",
    [
        {"op": "cut", "tensor": "0.weight", "axis": 0, "keep": [[0, 9]]},
        {"op": "cut", "tensor": "5.weight", "axis": 0, "keep": [[0, 1]]},
        {"op": "cut", "tensor": "0.weight", "axis": 0, "keep": []},
        {"op": "set", "module": "0", "attribute": "forward", "value": 3},
        {"op": "set", "module": "0", "attribute": "in_features", "value": "os.system"},
        {"op": "drop", "container": "", "keep": [7]},
        {"op": "run", "code": "pass"},
        {"tensor": "0.weight"},
    ],
)
def test_record_that_does_not_fit(step: dict[str, object]) -> None:
    with pytest.raises(StageError, match="step 0 of the structure record") as caught:
        replay(nn.Sequential(nn.Linear(3, 4)), [step])
    assert caught.value.hint


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="cannot be read"):
        load_student(tmp_path, nn.Linear(3, 4))
    save_student(tmp_path, nn.Linear(3, 4), [])
    with pytest.raises(StageError, match="does not fit its record"):
        load_student(tmp_path, nn.Linear(3, 5))
    (tmp_path / "student.safetensors").write_bytes(b"broken")
    with pytest.raises(StageError, match="cannot be read"):
        load_student(tmp_path, nn.Linear(3, 4))


def test_macs_by_hand() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 7))
    expected = {"0": 3 * 8 * 9 * 25, "3": 8 * 25 * 7}
    batch = {"input": torch.zeros(4, 3, 5, 5)}
    assert count_macs(module, batch) == sum(expected.values())
    found = macs_by_layer(module, batch)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_macs_of_attention(implementation: str) -> None:
    module = MaskedLm().eval()
    module.model.set_attn_implementation(implementation)
    layer = 4 * 8 * 32 * 32 + 2 * 8 * 32 * 48 + 2 * 8 * 8 * 32  # projections, feed-forward, both products; 8 tokens
    assert macs_by_layer(module, TOKENS)["model.bert.encoder"] == 3 * layer
