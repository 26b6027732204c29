"""Students that drop tokens: equal to masking them, masked ones first, the same numbers in ONNX."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from compressor.export.onnx import export_onnx  # noqa: E402
from compressor.models.cost import count_macs  # noqa: E402
from compressor.models.onnx_facts import describe  # noqa: E402
from compressor.models.rebuild import replay  # noqa: E402
from compressor.models.tokens import choose, cls_attention, take  # noqa: E402
from compressor.models.wrappers import ImageModel, Pooling, TextModel  # noqa: E402
from compressor.recipe import Recipe, StudentStage  # noqa: E402
from compressor.students import check, make_student  # noqa: E402
from compressor.types import TensorSpec  # noqa: E402

pytestmark = pytest.mark.train
WIDTH, HEADS, LENGTH = 32, 4, 12


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    torch.manual_seed(1)
    config = transformers.BertConfig(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=HEADS, intermediate_size=48, vocab_size=50,
        num_labels=3, initializer_range=0.4,
    )  # fmt: skip
    return TextModel(transformers.BertForSequenceClassification(config)).eval()


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(1)
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=HEADS, intermediate_size=48, image_size=16,
        patch_size=4, initializer_range=0.4,
    )  # fmt: skip
    return ImageModel(transformers.ViTForImageClassification(config)).eval()


@pytest.fixture(scope="module")
def texts() -> dict[str, Tensor]:
    ids = torch.randint(5, 50, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture(scope="module")
def pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def stage(*pairs: tuple[int, int], **keys: object) -> StudentStage:
    drops = [{"after": after, "keep": keep} for after, keep in pairs]
    return StudentStage(kind="student", drop_tokens=drops, **keys)  # type: ignore[arg-type]


def test_masked_tokens_go_first_and_the_first_one_stays() -> None:
    scores = torch.tensor([[0.0, 0.3, 0.2, 0.9, 0.5]])
    assert choose(scores, torch.tensor([[1, 1, 1, 0, 0]]), 3).tolist() == [[0, 1, 2]]
    assert choose(scores, torch.tensor([[1, 1, 1, 0, 0]]), 4).tolist() == [[0, 1, 2, 3]]
    assert choose(scores, None, 2).tolist() == [[0, 3]]
    assert choose(scores, None, 9).tolist() == [[0, 3, 4, 1, 2]], "a shorter text keeps everything"


def test_rows_are_taken_by_sample() -> None:
    table, index = torch.arange(24.0).reshape(2, 3, 4), torch.tensor([[2, 0], [1, 1]])
    assert torch.equal(take(table, 1, index), torch.stack([table[0, [2, 0]], table[1, [1, 1]]]))
    mask = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert torch.equal(take(mask, 3, index)[1], mask[0][:, :, [1, 1]])


def test_score_is_the_models_own_attention(bert: nn.Module, texts: dict[str, Tensor]) -> None:
    whole = copy.deepcopy(bert.model.bert)
    whole.set_attn_implementation("eager")
    seen = whole(**texts, output_attentions=True, output_hidden_states=True)
    attention = whole.encoder.layer[1].attention.self
    query, key = (
        part(seen.hidden_states[1]).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for part in (attention.query, attention.key)
    )
    assert torch.allclose(
        cls_attention(query, key, texts["attention_mask"]), seen.attentions[1][:, :, 0].mean(1), atol=1e-6
    )


@pytest.mark.parametrize("score", ["attention", "norm"])
def test_dropping_is_masking_from_there_on(bert: nn.Module, texts: dict[str, Tensor], score: str) -> None:
    made = make_student(bert, stage((0, 8), (1, 5), token_score=score), texts, seed=0)
    state = made.module.token_drop
    with torch.no_grad():
        found = made.module(**texts)
    kept = state.seen["index"]
    assert kept.shape == (3, 5)
    assert (kept[:, 0] == 0).all()
    assert set(kept[1].tolist()) <= set(range(7)), "masked tokens stay only where there are too few others"
    whole = copy.deepcopy(bert)
    whole.model.set_attn_implementation("eager")
    for layer in whole.model.bert.encoder.layer[2:]:
        layer.register_forward_pre_hook(lambda _, args: (args[0], only, *args[2:]))  # `only` is made below
    middle = replay(bert, made.record)
    with torch.no_grad():
        middle(**texts)
    assert torch.equal(middle.token_drop.seen["index"], kept), "the record says it all"
    single = make_student(bert, stage((1, 5), token_score=score), texts, seed=0)
    with torch.no_grad():
        alone = single.module(**texts)
    kept = single.module.token_drop.seen["index"]
    allowed = torch.zeros(3, LENGTH).scatter(1, kept, 1.0) * texts["attention_mask"]
    only = torch.where(allowed[:, None, None] > 0, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        assert torch.allclose(alone, whole(**texts), atol=1e-5)
    assert not torch.allclose(found, alone, atol=1e-3)


def test_keeping_everything_changes_nothing(bert: nn.Module, texts: dict[str, Tensor]) -> None:
    made = make_student(bert, stage((1, 64)), texts, seed=0)
    with torch.no_grad():
        assert torch.allclose(made.module(**texts), bert(**texts), atol=1e-5)


def test_mean_pooling_and_rotary_tables_follow(texts: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=HEADS, intermediate_size=48, vocab_size=50,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, initializer_range=0.4,
    )  # fmt: skip
    model = TextModel(transformers.ModernBertModel(config), Pooling("mean")).eval()
    made = make_student(model, stage((0, 64)), texts, seed=0)
    with torch.no_grad():  # order changes, so that tables and masks must have followed
        assert torch.allclose(made.module(**texts), model(**texts), atol=1e-5)
    assert made.record[0]["score"] == "norm"
    assert "attention" in check(model, texts, stage((0, 6), token_score="attention"))[0].what


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_onnx_is_the_same_and_cheaper(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    import onnxruntime

    module = request.getfixturevalue(kind)
    example: dict[str, Tensor] = request.getfixturevalue("texts" if kind == "bert" else "pictures")
    config = stage((0, 8), (1, 4))
    assert not check(module, example, config)
    made = make_student(module, config, example, seed=0)
    arrays = {name: tensor.numpy() for name, tensor in example.items()}
    shape: tuple[int | str, ...] = ("batch", "sequence") if kind == "bert" else ("batch", 3, 16, 16)
    inputs = [TensorSpec(name, str(array.dtype), shape) for name, array in arrays.items()]
    classes = int(made.module(**example).shape[-1])
    path = tmp_path / "model.onnx"
    export_onnx(
        made.module, arrays, inputs, [TensorSpec("logits", "float32", ("batch", classes))], path, name="x", metadata={}
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    lengths = (LENGTH, 6, 3) if kind == "bert" else (LENGTH,)
    for length in lengths:  # 3 tokens are fewer than are kept
        batch = {name: array[:2, :length] if kind == "bert" else array for name, array in arrays.items()}
        with torch.no_grad():
            wanted = made.module(**{name: torch.from_numpy(array) for name, array in batch.items()}).numpy()
        assert np.abs(session.run(None, batch)[0] - wanted).max() < 1e-4
    facts = describe(path, {"sequence": LENGTH})
    assert facts.operators["TopK"] == 2
    own = {"GatherElements"} if kind == "bert" else set()  # BERT's token types
    assert {"GatherElements", "NonZero"} & set(facts.operators) == own
    total = LENGTH if kind == "bert" else 17
    assert count_macs(module, example) - count_macs(made.module, example) == planned(total, (8, 4))
    assert facts.macs == count_macs(made.module, example)


def planned(total: int, later: tuple[int, ...]) -> int:
    """What blocks 1, 2 save, less the two scores: projections, both attention products, feed-forward."""
    saved = 0
    for tokens in later:
        saved += (total - tokens) * (4 * WIDTH * WIDTH + 2 * WIDTH * 48) + (total**2 - tokens**2) * 2 * WIDTH
    return saved - (total + later[0]) * WIDTH


def test_what_cannot_be_dropped_is_refused(
    bert: nn.Module, vit: nn.Module, texts: dict[str, Tensor], pictures: dict[str, Tensor]
) -> None:
    assert "3 blocks" in check(bert, texts, stage((2, 4)))[0].what
    assert "17 tokens" in check(vit, pictures, stage((0, 17)))[0].what
    assert "matches nothing" in check(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), pictures, stage((0, 4)))[0].what
    tags = TextModel(transformers.BertForTokenClassification(bert.model.config)).eval()
    assert "every token" in check(tags, texts, stage((0, 4)))[0].what
    with pytest.raises(ValueError, match="fewer tokens"):
        stage((0, 4), (1, 4))


def test_a_prune_stage_cannot_follow() -> None:
    from compressor.plan import recipe_problems

    drop = {"kind": "student", "drop_tokens": [{"after": 1, "keep": 8}]}
    student = {"kind": "student", "keep_layers": 3}
    wrong = Recipe(stage=[drop, {"kind": "prune", "heads": 0.5}])  # type: ignore[list-item]
    assert ["before the tokens" in item.what for item in recipe_problems(wrong, "checkpoint", ())] == [True]
    fine = Recipe(stage=[student, {"kind": "prune", "heads": 0.5}, drop])  # type: ignore[list-item]
    assert not recipe_problems(fine, "checkpoint", ())
