"""Batch norm folded into the layer before it, and which layers read and give what."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from compressor.errors import StageError  # noqa: E402
from compressor.models.placement import fold_norms, traffic_of  # noqa: E402
from compressor.models.rebuild import replay  # noqa: E402

pytestmark = pytest.mark.train


class Residual(nn.Module):
    """Two convolutions with norms, the second added to what the first reads; a pooled head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.a, self.norm_a = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.b, self.norm_b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False)
        self.last = nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, image):
        x = self.stem(image)
        y = torch.relu(self.norm_a(self.a(x)))
        x = torch.relu(x + self.norm_b(self.b(y)))
        x = nn.functional.max_pool2d(torch.relu(self.last(x)), 2)
        return self.head(x.flatten(1))


def network(seed=0):
    torch.manual_seed(seed)
    made = Residual()
    made.train()
    for _ in range(3):
        made(torch.randn(8, 1, 6, 6) * 2)
    return made.eval()


def test_folded_norms_change_no_output_and_are_replayed():
    module, image = network(), {"image": torch.randn(4, 1, 6, 6)}
    with torch.no_grad():
        before = module(**image)
        steps = fold_norms(module, image)
        assert torch.allclose(module(**image), before, atol=1e-5)
    assert steps == [
        {"op": "fold", "module": "a", "norm": "norm_a"},
        {"op": "fold", "module": "b", "norm": "norm_b"},
    ]
    assert not any(isinstance(part, nn.BatchNorm2d) for part in module.modules())
    again = replay(network(1), steps)
    again.load_state_dict(module.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(again(**image), module(**image))


def test_a_layer_that_is_read_before_its_norm_is_not_folded_silently():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)

        def forward(self, image):
            x = self.conv(image)
            return self.norm(x) + x

    module = Twice()
    module.train()(torch.randn(8, 1, 4, 4) + 3)
    with pytest.raises(StageError, match="cannot be folded"):
        fold_norms(module.eval(), {"image": torch.randn(2, 1, 4, 4)})


def test_outputs_that_meet_a_sum_are_exposed_and_those_behind_relu_and_pooling_are_not():
    module, image = network(), {"image": torch.randn(2, 1, 6, 6)}
    fold_norms(module, image)
    found = traffic_of(module, image)
    assert found.exposed == {"stem", "b"}
    assert found.dims == {"stem": 4, "a": 4, "b": 4, "last": 4, "head": 2}
    assert all(found.first[name] == name for name in found.dims)


def test_readers_of_one_tensor_are_known_together():
    from tests.unit.distil.toy import transformer

    ids = torch.randint(3, 50, (2, 5))
    found = traffic_of(transformer(1, 0), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    inside = "layers.0.attention."
    assert {found.first[inside + name] for name in ("query", "key", "value")} == {inside + "query"}
    assert found.dims["layers.0.feed.0"] == 3
