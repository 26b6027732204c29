"""Networks that several tests of this folder use."""

from __future__ import annotations

import pytest
from torch import Tensor, nn


class TextWrapper(nn.Module):
    """Names in, logits out: how checkpoints reach the pruner."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


class ImageWrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


@pytest.fixture
def bert() -> nn.Module:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, vocab_size=50, num_labels=3
    )
    return TextWrapper(transformers.BertForSequenceClassification(config)).eval()


@pytest.fixture
def vit() -> nn.Module:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8
    )
    return ImageWrapper(transformers.ViTForImageClassification(config)).eval()


@pytest.fixture
def tokens() -> dict[str, Tensor]:
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(4, 8, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(0, 50, (4, 8), generator=generator), "attention_mask": mask}


@pytest.fixture
def pixels() -> dict[str, Tensor]:
    torch = pytest.importorskip("torch")
    return {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
