"""Masks that learn which units go: what they multiply and count, what is committed, and the run around them."""

from __future__ import annotations

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from compressor.data.types import DataBundle  # noqa: E402
from compressor.distil.loop import distil  # noqa: E402
from compressor.distil.masks import mask_problems  # noqa: E402
from compressor.distil.masks.cofi import LearntMasks, rehearse  # noqa: E402
from compressor.distil.objectives.base import Step  # noqa: E402
from compressor.masks import CoFi  # noqa: E402
from compressor.models.cost import count_parameters  # noqa: E402
from compressor.models.rebuild import load_student, replay, save_student  # noqa: E402
from compressor.recipe import DistilStage  # noqa: E402
from tests.unit.distil.toy import Sentences, bundle, convnet, transformer  # noqa: E402
from tests.unit.prune.conftest import bert, pixels, tokens, vit  # noqa: E402, F401

pytestmark = pytest.mark.train
ALL = CoFi(target=0.8)
LAYER = "model.bert.encoder.layer"


def drawn(masks, seed=0, closed=("layer.1.attention", "layer.2.intermediate")):
    """Masks in the middle of their learning; two sublayers are off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, gate in masks.plan.gates.items():
            values = torch.randn(gate.units, generator=generator) * 2 + 0.5
            if gate.kind == "layers":
                values.fill_(-5.0 if any(part in name for part in closed) else 2.0)
            masks._log_alpha(name).copy_(values)
    return masks


@torch.no_grad()
def outputs(module, example):
    return module.eval()(**example)


def test_open_masks_leave_the_student_as_it_is(bert, tokens):  # noqa: F811
    before = outputs(bert, tokens)
    masks = LearntMasks(bert, tokens, ALL, seed=0)
    with torch.no_grad():
        for name in masks.plan.gates:
            masks._log_alpha(name).fill_(30.0)
    assert torch.allclose(outputs(bert, tokens), before, atol=1e-5)
    assert {gate.kind for gate in masks.plan.gates.values()} == {"layers", "heads", "neurons", "hidden"}
    assert masks.plan.total == 4 * (4 * 32 * 32 + 2 * 32 * 64)  # the four layers, no embeddings, no pooler
    assert float(masks.sparsity().detach()) == pytest.approx(0.0, abs=1e-6)


def test_the_expected_sparsity_is_the_share_of_the_weights_that_goes(bert, tokens):  # noqa: F811
    masks = LearntMasks(bert, tokens, CoFi(target=0.5), seed=0)
    with torch.no_grad():
        for name, gate in masks.plan.gates.items():
            values = torch.full((gate.units,), 40.0)
            values[: gate.units // 2] = -40.0  # half of every vector; a single layer mask stays open
            masks._log_alpha(name).copy_(values)
    # half of the heads or neurons times half of the hidden width stays, of every matrix
    assert float(masks.sparsity().detach()) == pytest.approx(1 - 0.25, abs=1e-5)


def test_the_committed_student_computes_what_the_masked_one_does_and_is_smaller(bert, tokens, tmp_path):  # noqa: F811
    teacher, masks = copy.deepcopy(bert), drawn(LearntMasks(bert, tokens, ALL, seed=0))
    masked = outputs(bert, tokens)
    done = masks.commit(bert, lambda: tokens)
    assert torch.allclose(outputs(bert, tokens), masked, atol=1e-5)
    assert count_parameters(bert) < 0.7 * count_parameters(teacher)
    kinds = [step["op"] for step in done.steps]
    assert kinds.count("silence") == 2
    facts = {fact.layer: fact for fact in done.facts}
    assert facts[f"{LAYER}.1.attention.self.query"].after == "0 heads"
    assert facts[f"{LAYER}.2.intermediate.dense"].action == "dropped"
    assert all("learnt masks" in fact.reason for fact in done.facts if fact.action == "pruned")
    save_student(tmp_path, bert, done.steps)
    assert torch.equal(outputs(load_student(tmp_path, teacher), tokens), outputs(bert, tokens))
    _exported_equals(bert, masked, tokens, tmp_path)


def _exported_equals(module, wanted, example, folder):
    """The ONNX file has neither the masks nor what only fed the sublayers that went."""
    import onnx
    import onnxruntime

    from compressor.export.onnx import export_onnx
    from compressor.export.optimise import optimise
    from compressor.types import TensorSpec

    inputs = tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in example)
    arrays = {name: tensor.numpy() for name, tensor in example.items()}
    export_onnx(
        module, arrays, inputs, (TensorSpec("logits", "float32", ("batch", 3)),), folder / "raw.onnx",
        name="cofi", metadata={},
    )  # fmt: skip
    optimise(folder / "raw.onnx", folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, arrays)
    assert np.abs(logits - wanted.numpy()).max() <= 1e-4
    softmaxes = [node for node in onnx.load(folder / "model.onnx").graph.node if node.op_type == "Softmax"]
    assert len(softmaxes) == 3  # of four attentions


def test_a_vision_transformer_too_and_its_rehearsal(vit, pixels):  # noqa: F811
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    rehearse(vit, pixels, ALL, 4)
    assert all(torch.equal(before[name], tensor) for name, tensor in vit.state_dict().items())
    masks = drawn(LearntMasks(vit, pixels, CoFi(target=0.8, round_to=4), seed=0), seed=3)
    masked = outputs(vit, pixels)
    masks.commit(vit, lambda: pixels)
    assert torch.allclose(outputs(vit, pixels), masked, atol=1e-5)
    assert vit.model.vit.layernorm.normalized_shape[0] % 4 == 0
    assert vit.model.vit.layernorm.normalized_shape[0] < 32


def test_channels_of_a_convolutional_net_take_part():
    data = {"image": torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(1))}
    net = convnet(8, 2)
    masks = LearntMasks(net, data, CoFi(target=0.5, round_to=2), seed=0)
    assert [gate.kind for gate in masks.plan.gates.values()] == ["channels", "channels"]
    drawn(masks, seed=4)
    masked = outputs(net, data)
    masks.commit(net, lambda: data)
    assert torch.allclose(outputs(net, data), masked, atol=1e-5)
    assert net.stage2[0].out_channels < 16
    assert net.stage2[0].out_channels % 2 == 0


def stage(**settings):
    plain = {
        "kind": "distil",
        "epochs": 12,
        "batch": 16,
        "precision": "fp32",
        "learning_rate": 1e-3,
        "objective": [{"use": "kd"}, {"use": "layerwise", "weight": 0.1}],
        "cofi": {"target": 0.6},
    }
    return DistilStage.model_validate(plain | settings)


def run(folder, config, name="work", data=None, **more):
    student, teacher = transformer(3, 4, 16, 4), transformer(3, 4, 16, 4)
    settings = {"seed": 3, "teacher_digest": "t", "signals": {}} | more
    data = data or bundle(Sentences, train=160)
    result = distil(student, teacher, data, config, work=folder / name, bank=folder / "bank", **settings)
    return result, student


class StopError(Exception):
    """Raised in the middle of a run."""


def test_a_run_reaches_its_target_and_a_broken_one_ends_with_the_same_bytes(tmp_path):
    result, calm = run(tmp_path, stage(), "calm")
    values = [dict(record.values) for record in result.history]
    assert [value["cofi.target"] for value in values] == sorted(value["cofi.target"] for value in values)
    assert values[-1]["cofi.target"] == 0.6
    assert abs(values[-1]["cofi.sparsity"] - 0.6) <= 0.03
    assert count_parameters(calm) < count_parameters(transformer(3, 4, 16, 4))

    def stop(kind, event):
        if kind == "epoch" and event["epoch"] == 2:
            raise StopError

    with pytest.raises(StopError):
        run(tmp_path, stage(), "broken", on_event=stop)
    again, student = run(tmp_path, stage(), "broken")
    assert again.record == result.record
    assert again.facts == result.facts
    left, right = calm.state_dict(), student.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) for name in left)
    replayed = replay(transformer(3, 4, 16, 4), result.record)
    replayed.load_state_dict(left, strict=True)


def test_the_twin_learns_its_masks_from_labels_in_pieces_of_a_batch(tmp_path):
    config = stage(epochs=2, accumulate=2, objective=[{"use": "kd"}])
    result, twin = run(tmp_path, config, labels_only=True)
    assert result.teacher_forwards == 0
    assert [set(dict(record.terms)) for record in result.history] == [{"labels"}] * 2
    assert {fact.stage for fact in result.facts} == {"cofi"}
    assert torch.isfinite(outputs(twin, next(iter(_batches(bundle(Sentences, train=16)))))).all()


def _batches(data: DataBundle):
    yield {name: torch.from_numpy(array) for name, array in data.splits["train"].batch(np.arange(4)).items()}


def test_samples_depend_on_the_step_alone_and_say_which_blocks_live(bert, tokens):  # noqa: F811
    masks = drawn(LearntMasks(bert, tokens, ALL, seed=5), closed=("layer.1.", "layer.3.attention"))
    masks.train(True)
    name = f"{LAYER}.0.attention.self.query"
    step = masks.begin(Step(7, 20, 0))
    first = masks.value(name).detach()
    masks.begin(Step(8, 20, 0))
    assert not torch.equal(masks.value(name).detach(), first)
    masks.begin(Step(7, 20, 0))
    assert torch.equal(masks.value(name).detach(), first)
    assert len(step.alive) == 4
    assert step.alive[0]
    assert masks.target(Step(0, 20, 0)) == 0.0
    assert masks.target(Step(19, 20, 0)) == 0.8


def test_what_matches_nothing_is_a_problem_of_the_plan(bert, tokens):  # noqa: F811
    def places(**keys):
        return [item.where for item in mask_problems(stage(cofi={"target": 0.5, **keys}), "stage.0", bert, tokens)]

    assert places() == []
    assert places(protect=["nothing*"]) == ["stage.0.cofi.protect.0"]
    assert places(masks=["channels"]) == ["stage.0.cofi.masks"]
