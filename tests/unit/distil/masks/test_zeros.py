"""Zeros that grow while a stage trains and that later stages keep: schedule, twin, average, best epoch, resume."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from compressor.config import validate  # noqa: E402
from compressor.distil.loop import distil  # noqa: E402
from compressor.errors import ConfigError  # noqa: E402
from compressor.models.rebuild import replay  # noqa: E402
from compressor.models.sparse import masked  # noqa: E402
from compressor.prune.sparsity import sparsify  # noqa: E402
from compressor.recipe import DistilStage, PruneStage  # noqa: E402
from tests.unit.distil.toy import bundle, convnet  # noqa: E402

pytestmark = pytest.mark.train
GROWING = {"sparsity": 0.75, "start": 0.2, "end": 0.6, "every": 1}


def stage(**settings):
    plain = {"kind": "distil", "epochs": 3, "batch": 24, "precision": "fp32", "objective": [{"use": "kd"}]}
    return validate(DistilStage, plain | settings, "recipe")


def run(folder, config, student=None, name="work", **more):
    student = student if student is not None else convnet(8, 5)
    settings = {"seed": 3, "teacher_digest": "t", "signals": {}} | more
    result = distil(student, convnet(8, 6), bundle(), config, work=folder / name, bank=folder / "bank", **settings)
    return result, student


def shares(module):
    return {name: float((weight == 0).float().mean()) for name, weight, _ in masked(module)}


def test_the_mask_follows_the_cubic_schedule_and_is_recorded(tmp_path):
    result, student = run(tmp_path, stage(masks=GROWING))
    assert set(shares(student)) == {"stage1.0.weight", "stage2.0.weight", "head.weight"}
    assert set(shares(student).values()) == {0.75}
    ends = [dict(record.values)["masks.sparsity"] for record in result.history]
    # 12 steps, updates at steps 2 to 7: after epoch 1 step 3 was the last, t = 1/5; epoch 2 ends complete
    assert ends[0] == pytest.approx(0.75 * (1 - 0.8**3), abs=0.01)
    assert ends[1:] == [0.75, 0.75]
    assert [fact.after for fact in result.facts if fact.action == "sparsified"] == ["75.0% zeros"] * 3
    rebuilt = replay(convnet(8, 5), json.loads(json.dumps([dict(step) for step in result.record])))
    rebuilt.load_state_dict(student.state_dict(), strict=True)
    assert shares(rebuilt) == shares(student)


def test_one_shot_two_of_four_squarehead_and_the_twin_keeps_its_masks_too(tmp_path):
    sparse = sparsify(convnet(8, 5), PruneStage(kind="prune", pattern="2:4", protect=["stage1"])).module
    before = {name: mask.clone() for name, _, mask in masked(sparse)}
    assert set(before) == {"stage2.0.weight", "head.weight"}
    for labels_only in (False, True):
        config = stage(objective=[{"use": "kd"}, {"use": "squarehead"}], ema=0.5, weight_decay=0.1)
        _, student = run(tmp_path, config, replay(sparse, []), f"twin-{labels_only}", labels_only=labels_only)
        for name, weight, mask in masked(student):
            assert torch.equal(mask, before[name])
            assert bool((weight[~mask] == 0).all())
            assert bool((weight[mask] != sparse.get_parameter(name)[mask]).any())  # the others were trained
        groups = student.stage2[0].weight.reshape(16, 2, 4, 3, 3)
        assert int((groups != 0).sum(2).max()) <= 2


def test_the_best_epoch_is_one_whose_masks_are_complete(tmp_path):
    scores = iter([0.9, 0.5, 0.6])
    config = stage(masks=GROWING | {"end": 0.5}, patience=5)
    result, student = run(tmp_path, config, score=lambda module: next(scores))
    assert result.best_epoch == 2
    assert set(shares(student).values()) == {0.75}


class StopError(Exception):
    """Raised in the middle of a run."""


def test_a_run_broken_while_the_mask_grows_ends_with_the_same_bytes(tmp_path):
    config = stage(masks=GROWING, ema=0.9, optimiser="sgd", learning_rate=0.01)
    _, calm = run(tmp_path, config, name="calm")

    def stop(kind, event):
        if kind == "epoch" and event["epoch"] == 0:
            raise StopError

    with pytest.raises(StopError):
        run(tmp_path, config, name="broken", on_event=stop)
    _, again = run(tmp_path, config, name="broken")
    left, right = calm.state_dict(), again.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_kinds_of_masks_that_exclude_each_other():
    for keys, text in (
        ({"masks": GROWING, "lora": {}}, "do not go together"),
        ({"masks": GROWING, "cofi": {"target": 0.5}}, "do not go together"),
        ({"cofi": {"target": 0.5}, "patience": 2}, "leave `patience` out"),
        ({"cofi": {"target": 0.5, "masks": ["layers"]}}, "name `heads`"),
        ({"masks": {"sparsity": 0.5, "start": 0.9}}, "must not come after"),
        ({"masks": {}}, "give `sparsity`"),
    ):
        with pytest.raises(ConfigError, match=text):
            stage(**keys)


def test_zeros_are_zeros_in_the_exported_file_and_the_masks_are_not_in_it(tmp_path):
    import onnx
    from onnx import numpy_helper

    from compressor.export.onnx import export_onnx
    from compressor.export.optimise import optimise
    from compressor.models.sparse import drop_masks
    from compressor.types import TensorSpec

    sparse = sparsify(convnet(8, 5), PruneStage(kind="prune", sparsity=0.75)).module
    image = {"image": bundle().splits["train"].batch(range(2))["image"]}
    specs = TensorSpec("image", "float32", ("batch", 1, 12, 12)), TensorSpec("logits", "float32", ("batch", 4))
    export_onnx(drop_masks(sparse), image, specs[:1], specs[1:], tmp_path / "raw.onnx", name="sparse", metadata={})
    optimise(tmp_path / "raw.onnx", tmp_path / "model.onnx")  # batch norm is folded into a masked convolution
    stored = [numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer]
    weights = [array for array in stored if array.dtype.kind == "f" and array.ndim >= 2]
    assert [float((weight == 0).mean()) for weight in weights] == [0.75] * 3
    assert not any(array.dtype == bool for array in stored)
