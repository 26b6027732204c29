"""Pruning of a decoder of transformers: rotary positions, grouped queries, attention computed by hand (eager)."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from compressor.distil.generation import generate  # noqa: E402
from compressor.models.structure.units import find_groups  # noqa: E402
from compressor.models.wrappers import TextModel  # noqa: E402
from compressor.prune import prune  # noqa: E402
from compressor.recipe import PruneStage  # noqa: E402

pytestmark = pytest.mark.train
QUERIES, KEYS, SIZE = 9, 3, 4


def llama() -> TextModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=36, intermediate_size=48, num_hidden_layers=2, num_attention_heads=QUERIES,
        num_key_value_heads=KEYS, head_dim=SIZE, max_position_embeddings=64, tie_word_embeddings=True, use_cache=False,
        attn_implementation="eager",
    )  # fmt: skip
    return TextModel(transformers.LlamaForCausalLM(config)).eval()


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_every_layer_has_its_key_value_heads_as_units_and_its_gated_neurons() -> None:
    found = [group for group in find_groups(llama(), tokens()) if not group.hard and not group.soft]
    assert [(group.kind, group.units, group.width) for group in found] == [("heads", 3, 12), ("neurons", 48, 1)] * 2


def test_a_key_value_head_goes_with_its_queries_and_the_cache_still_works() -> None:
    model, batch = llama(), tokens()
    made = prune(model, batch, PruneStage(kind="prune", heads=0.34, neurons=0.5), [batch])
    for layer in made.module.model.model.layers:
        attention = layer.self_attn
        rows = [getattr(attention, name).weight.shape for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        assert rows == [(24, 36), (8, 36), (8, 36), (36, 24)]
        assert (attention.head_dim, attention.num_key_value_groups) == (SIZE, QUERIES // KEYS)
        assert layer.mlp.down_proj.weight.shape == (36, 24)
    with torch.no_grad():
        torch.testing.assert_close(made.module(**batch), made.masked(**batch), rtol=0, atol=1e-5)
        ids = batch["input_ids"]
        for _ in range(4):
            ids = torch.cat([ids, made.module(ids, torch.ones_like(ids))[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(made.module, batch["input_ids"], 4).ids, ids)
