"""Heads, neurons and layers of transformers, found by structure."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from compressor.models.rebuild import replay  # noqa: E402
from compressor.prune import check, prune  # noqa: E402
from compressor.recipe import PruneStage  # noqa: E402

pytestmark = pytest.mark.train


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bert(bert: nn.Module, tokens: dict[str, Tensor], implementation: str) -> None:
    bert.model.set_attn_implementation(implementation)
    config = PruneStage(kind="prune", heads=0.5, neurons=0.25, layers=1)
    pruned = prune(bert, tokens, config, [tokens], round_to=8)
    other = {"input_ids": torch.randint(0, 50, (2, 11)), "attention_mask": torch.ones(2, 11, dtype=torch.long)}
    for batch in (tokens, other):
        assert torch.allclose(pruned.module(**batch), pruned.masked(**batch), atol=1e-4)
    layers = pruned.module.model.bert.encoder.layer
    assert len(layers) == pruned.module.model.config.num_hidden_layers == 3
    assert bert.model.config.num_hidden_layers == len(bert.model.bert.encoder.layer) == 4
    attention = layers[0].attention.self
    assert (attention.num_attention_heads, attention.all_head_size, attention.attention_head_size) == (2, 16, 8)
    assert attention.query.out_features == layers[0].attention.output.dense.in_features == 16
    assert layers[0].intermediate.dense.out_features == 48
    assert pruned.macs_after < 0.55 * pruned.macs_before
    rebuilt = replay(bert, pruned.record)
    assert str(rebuilt) == str(pruned.module)


def test_vit(vit: nn.Module, pixels: dict[str, Tensor]) -> None:
    pruned = prune(vit, pixels, PruneStage(kind="prune", ratio=0.5, layers=2), [pixels])
    assert torch.allclose(pruned.module(**pixels), pruned.masked(**pixels), atol=1e-4)
    layer = pruned.module.model.vit.layers[1]
    assert (layer.attention.num_attention_heads, layer.attention.q_proj.out_features) == (2, 16)
    assert layer.mlp.fc1.out_features == 32
    assert len(pruned.module.model.vit.layers) == 2


@pytest.mark.parametrize("name", ["MPNet"])  # more of them: test_matrix.py
def test_other_encoders(name: str) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = getattr(transformers, f"{name}Config")(vocab_size=50, **sizes)
    module = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    batch = {"input_ids": torch.randint(3, 50, (3, 8)), "attention_mask": torch.ones(3, 8, dtype=torch.long)}
    pruned = prune(module, batch, PruneStage(kind="prune", heads=0.5, neurons=0.5, layers=1), [batch])
    assert torch.allclose(pruned.module(**batch).logits, pruned.masked(**batch).logits, atol=1e-4)
    assert not [fact for fact in pruned.facts if "fails" in fact.reason]
    assert {(f.before, f.after) for f in pruned.facts if "heads" in f.before} == {("4 heads", "2 heads")}


def test_the_block_that_does_nothing_is_dropped(bert: nn.Module, tokens: dict[str, Tensor]) -> None:
    for parameter in bert.model.bert.encoder.layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    idle = bert.model.bert.encoder.layer[2]
    with torch.no_grad():
        for dense in (idle.attention.output.dense, idle.output.dense):
            dense.weight.zero_(), dense.bias.zero_()
        for norm in (idle.attention.output.LayerNorm, idle.output.LayerNorm):
            norm.weight.fill_(1), norm.bias.zero_()
    pruned = prune(bert, tokens, PruneStage(kind="prune", layers=1), [tokens])
    assert [f.layer for f in pruned.facts if f.action == "dropped"] == ["model.bert.encoder.layer.2"]


def test_one_head_stays(bert: nn.Module, tokens: dict[str, Tensor]) -> None:
    config = PruneStage(kind="prune", heads=0.95)
    assert check(bert, tokens, config) == []
    pruned = prune(bert, tokens, config, [tokens])
    assert pruned.module.model.bert.encoder.layer[0].attention.self.num_attention_heads == 1
    assert torch.allclose(pruned.module(**tokens), pruned.masked(**tokens), atol=1e-4)


def test_more_layers_than_there_are(bert: nn.Module, tokens: dict[str, Tensor]) -> None:
    problems = check(bert, tokens, PruneStage(kind="prune", layers=4))
    assert [problem.where for problem in problems] == ["layers"]


def test_builtin_encoder_layer_loses_neurons_but_keeps_its_heads() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x).mean(dim=1))

    batch = {"x": torch.randn(2, 5, 16)}
    pruned = prune(Encoder().eval(), batch, PruneStage(kind="prune", ratio=0.5, layers=1), [batch])
    assert [layer.linear1.out_features for layer in pruned.module.encoder.layers] == [16, 16]
    assert torch.allclose(pruned.module(**batch), pruned.masked(**batch), atol=1e-4)
    assert any("MultiheadAttention" in fact.reason for fact in pruned.facts)
