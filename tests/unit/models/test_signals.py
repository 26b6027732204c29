"""Named signals equal what the model itself reports, on whole and on pruned modules."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from torch import nn  # noqa: E402

from compressor.errors import PlanError  # noqa: E402
from compressor.models import SignalTap, available, load_model  # noqa: E402
from compressor.recipe import TeacherConfig  # noqa: E402
from examples.fashion_mnist.model import ResNet9  # noqa: E402

pytestmark = pytest.mark.train


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 50, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


@pytest.fixture
def bert(bert_folder: Path) -> nn.Module:
    return load_model(TeacherConfig(model=str(bert_folder))).module


def test_available(bert: nn.Module, vit_folder: Path, encoder_folder: Path) -> None:
    assert available(bert) == {
        "hidden": 4,
        "logits": 1,
        "q": 3,
        "k": 3,
        "v": 3,
        "qkv": 3,
        "attn": 3,
        "mask": 1,
        "pooled": 1,
    }
    vit = load_model(TeacherConfig(model=str(vit_folder))).module
    assert (available(vit)["hidden"], available(vit)["qkv"]) == (3, 2)
    assert available(load_model(TeacherConfig(model=str(encoder_folder))).module)["pooled"] == 1
    assert available(ResNet9()) == {"hidden": 4, "logits": 1, "pooled": 1}


def test_bert_signals_are_the_models_own(bert: nn.Module) -> None:
    data = inputs()
    wanted = [
        "logits",
        "probs",
        "hidden[0]",
        "hidden[2]",
        "hidden[-1]",
        "attn[1]",
        "q[0]",
        "k[0]",
        "v[0]",
        "qkv[0]",
        "pooled",
        "mask",
    ]
    with torch.no_grad():
        own = bert.model(**data, output_hidden_states=True, output_attentions=True)
        with SignalTap(bert, wanted) as tap:
            got = tap(data)
    assert list(got) == wanted
    for name, index in (("hidden[0]", 0), ("hidden[2]", 2), ("hidden[-1]", 3)):
        assert torch.equal(got[name], own.hidden_states[index])
    assert torch.equal(got["attn[1]"], own.attentions[1])
    assert torch.equal(got["logits"], own.logits)
    torch.testing.assert_close(got["probs"].sum(1), torch.ones(2))
    assert torch.equal(got["mask"], data["attention_mask"])
    assert got["qkv[0]"].shape == (3, 2, 4, 7, 8)
    assert torch.equal(got["qkv[0]"], torch.stack([got["q[0]"], got["k[0]"], got["v[0]"]]))
    scores = got["q[0]"] @ got["k[0]"].transpose(-1, -2) / 8**0.5  # attention from the signals = the model's own
    scores = scores.masked_fill(data["attention_mask"][:, None, None] == 0, -1e30)
    torch.testing.assert_close(torch.softmax(scores, -1), own.attentions[0])
    head = bert.model.classifier
    torch.testing.assert_close(nn.functional.linear(got["pooled"], head.weight, head.bias), own.logits)


def test_vit_signals(vit_folder: Path) -> None:
    vit = load_model(TeacherConfig(model=str(vit_folder))).module
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = vit.model(pixel_values=pixels, output_hidden_states=True)
        with SignalTap(vit, ["hidden[0]", "hidden[-1]", "qkv[-1]", "mask"]) as tap:
            got = tap({"pixel_values": pixels})
    assert got["qkv[-1]"].shape == (3, 2, 2, 17, 16)
    assert torch.equal(got["hidden[0]"], own.hidden_states[0])
    assert got["hidden[-1]"].shape == (2, 17, 32)
    assert torch.equal(got["mask"], torch.ones(2, 17, dtype=torch.int64))


def test_embeddings_pool_before_normalisation(encoder_folder: Path) -> None:
    module = load_model(TeacherConfig(model=str(encoder_folder))).module
    with torch.no_grad(), SignalTap(module, ["pooled", "logits"]) as tap:
        got = tap(inputs())
    torch.testing.assert_close(nn.functional.normalize(got["pooled"], dim=1), got["logits"])


def test_pruned_transformer(bert: nn.Module) -> None:
    """Two layers left, one head of four cut from the first, half of its neurons gone."""
    encoder = bert.model.bert.encoder
    encoder.layer = nn.ModuleList([encoder.layer[0], encoder.layer[2]])
    attention = encoder.layer[0].attention
    for name in ("query", "key", "value"):
        old = getattr(attention.self, name)
        new = nn.Linear(32, 24)
        new.load_state_dict({"weight": old.weight[:24], "bias": old.bias[:24]})
        setattr(attention.self, name, new)
    attention.output.dense = nn.Linear(24, 32)
    encoder.layer[0].intermediate.dense = nn.Linear(32, 24)
    encoder.layer[0].output.dense = nn.Linear(24, 32)
    assert available(bert)["hidden"] == 3
    with SignalTap(bert, ["qkv[0]", "qkv[1]", "attn[0]", "hidden[-1]"]) as tap:
        got = tap(inputs())
    assert got["qkv[0]"].shape == (3, 2, 3, 7, 8)
    assert got["qkv[1]"].shape == (3, 2, 4, 7, 8)
    assert got["attn[0]"].shape == (2, 3, 7, 7)


def test_convolutional_stages(bert: nn.Module) -> None:
    module = ResNet9(stem=4, widths=(6, 8, 10)).eval()
    image = torch.rand(2, 1, 28, 28)
    with SignalTap(module, ["hidden[0]", "hidden[3]", "hidden[-1]", "pooled", "logits"]) as tap:
        got = tap({"image": image})
    assert got["hidden[0]"].shape == (2, 4, 28, 28)
    assert got["hidden[3]"].shape == (2, 10, 3, 3)
    assert torch.equal(got["hidden[3]"], got["hidden[-1]"])
    torch.testing.assert_close(got["hidden[3]"].mean((2, 3)), got["pooled"])


def test_mapping_names_modules() -> None:
    module = ResNet9(stem=4, widths=(6, 8, 10)).eval()
    mapping = {"hidden[0]": "stage1.0", "hidden[1]": "stage3"}
    assert available(module, mapping)["hidden"] == 2
    with SignalTap(module, ["hidden[0]", "hidden[-1]"], mapping) as tap:
        got = tap({"image": torch.rand(2, 1, 28, 28)})
    assert got["hidden[0]"].shape == (2, 6, 28, 28)
    assert got["hidden[-1]"].shape == (2, 10, 3, 3)
    with pytest.raises(PlanError, match=r"no such module: hidden\[0\] = `stage9`.*did you mean"):
        available(module, {"hidden[0]": "stage9"})


def test_fused_projection_in_a_factory_model() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 2
            self.qkv = nn.Linear(8, 24)
            self.out = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, length, _ = x.shape
            q, k, v = self.qkv(x).reshape(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
            mixed = torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v
            return self.out(mixed.transpose(1, 2).reshape(batch, length, 8))

    module = nn.Sequential(nn.Sequential(Attention(), Attention()), nn.Linear(8, 3))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    x = torch.rand(2, 5, 8)
    with SignalTap(Net(), ["qkv[1]", "hidden[1]", "hidden[-1]", "attn[0]"]) as tap:
        got = tap({"x": x})
    second = module[0][1].qkv(module[0][0](x)).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(got["qkv[1]"], second)
    torch.testing.assert_close(got["hidden[1]"], module[0][0](x))
    torch.testing.assert_close(got["attn[0]"].sum(-1), torch.ones(2, 2, 5))


def test_no_hook_stays(bert: nn.Module) -> None:
    before = hooks(bert)
    with SignalTap(bert, ["hidden[1]", "qkv[0]", "pooled", "mask"]) as tap:
        tap(inputs())
        assert hooks(bert) > before
    assert hooks(bert) == before
    with SignalTap(bert, ["hidden[1]"]) as tap, pytest.raises(TypeError):
        tap({"nonsense": torch.zeros(1)})
    assert hooks(bert) == before


def test_gradients_flow(bert: nn.Module) -> None:
    with SignalTap(bert, ["hidden[-1]", "qkv[0]"]) as tap:
        got = tap(inputs())
        (got["hidden[-1]"].square().sum() + got["qkv[0]"].square().sum()).backward()
    layer = bert.model.bert.encoder.layer[0].attention.self.query
    assert layer.weight.grad is not None
    assert float(layer.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", ["hidden[9]", "hidden[-5]", "qkv[3]", "hiden[0]", "hidden[x]", "tokens"])
def test_unknown_signals_are_refused_at_once(bert: nn.Module, name: str) -> None:
    with pytest.raises(PlanError, match="the model has no") as caught:
        SignalTap(bert, [name])
    assert "hidden x4" in caught.value.hint
    assert hooks(bert) == 0
