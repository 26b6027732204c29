"""Quantization-aware training: what it puts into the student, that it learns, resumes, and is refused where it must."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from compressor.config import validate  # noqa: E402
from compressor.distil.loop import distil  # noqa: E402
from compressor.distil.rounding import problems  # noqa: E402
from compressor.errors import ConfigError, StageError  # noqa: E402
from compressor.models.fakequant import rounding, settled, trained_layers  # noqa: E402
from compressor.models.rebuild import load_student, replay, save_student  # noqa: E402
from compressor.models.sparse import masked  # noqa: E402
from compressor.profile import QuantizationRules  # noqa: E402
from compressor.prune.sparsity import sparsify  # noqa: E402
from compressor.recipe import DistilStage, PruneStage  # noqa: E402
from tests.unit.distil.toy import Sentences, bundle, convnet, transformer  # noqa: E402

pytestmark = pytest.mark.train


def stage(**settings):
    plain = {"kind": "distil", "epochs": 2, "batch": 24, "objective": [{"use": "kd"}]}
    return validate(DistilStage, plain | settings, "recipe")


def run(folder, config, student=None, name="work", **more):
    student = student if student is not None else convnet(8, 5)
    settings = {"seed": 3, "teacher_digest": "t", "signals": {}} | more
    result = distil(student, convnet(8, 6), bundle(), config, work=folder / name, bank=folder / "bank", **settings)
    return result, student


def test_layers_round_learn_and_are_rebuilt_from_the_record(tmp_path):
    result, student = run(tmp_path, stage(qat={"weights": "int4", "int8": ["stage1"], "protect": ["head"]}))
    schemes = {name: layer.scheme for name, layer in rounding(student)}
    assert {name: scheme.precision for name, scheme in schemes.items()} == {"stage1.0": "int8", "stage2.0": "int4"}
    assert (schemes["stage2.0"].positive, schemes["stage1.0"].positive) == (True, False)  # behind a ReLU
    assert schemes["stage2.0"].output == "both"  # it meets an average
    assert {fact.layer: fact.action for fact in result.facts}["head"] == "left-float"
    for layer in trained_layers(student):
        assert (layer.codes.astype("float32") * layer.scale.reshape(-1, 1, 1, 1) == layer.value).all()
        assert len(set(layer.codes.flatten().tolist())) <= 2 ** (8 if layer.precision == "int8" else 4)
    save_student(tmp_path, student, json.loads(json.dumps([dict(step) for step in result.record])))
    again, image = load_student(tmp_path, convnet(8, 5)), torch.randn(3, 1, 12, 12)
    with torch.no_grad():
        assert torch.equal(again(image), student.eval()(image))
        plain = settled(student)
        assert not list(rounding(plain))
        assert torch.equal(plain.head(torch.ones(64)), student.head(torch.ones(64)))


def test_ranges_and_latent_weights_move_and_the_twin_rounds_as_well(tmp_path):
    first = stage(qat={"weights": "ternary", "quantizer": "dlt"}, learning_rate=1e-9)
    _, still = run(tmp_path, first, name="still")
    for labels_only in (False, True):
        config = stage(qat={"weights": "ternary", "quantizer": "dlt"}, learning_rate=0.01, ema=0.5)
        result, student = run(tmp_path, config, name=f"moved-{labels_only}", labels_only=labels_only)
        before, after = still.state_dict(), student.state_dict()
        assert before.keys() == after.keys()
        for key in ("weight", "weight_log_scale", "weight_shift", "input_log_scale"):
            assert not torch.allclose(before[f"stage2.0.{key}"], after[f"stage2.0.{key}"], atol=1e-6), key
        assert (result.teacher_forwards == 0) == labels_only


class StopError(Exception):
    """Raised in the middle of a run."""


def test_a_broken_run_ends_with_the_same_bytes(tmp_path):
    config = stage(qat={"weights": "int3"}, ema=0.9, accumulate=2)
    _, calm = run(tmp_path, config, name="calm")

    def stop(kind, event):
        if kind == "epoch" and event["epoch"] == 0:
            raise StopError

    with pytest.raises(StopError):
        run(tmp_path, config, name="broken", on_event=stop)
    result, again = run(tmp_path, config, name="broken")
    left, right = calm.state_dict(), again.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    done, third = run(tmp_path, config, name="broken")  # a finished run is read back
    assert done.record == result.record
    assert all(torch.equal(left[name], tensor) for name, tensor in third.state_dict().items())


def test_zeros_of_an_earlier_stage_stay_zero(tmp_path):
    sparse = sparsify(convnet(8, 5), PruneStage(kind="prune", sparsity=0.75)).module
    _, student = run(tmp_path, stage(qat={"weights": "int4"}, weight_decay=0.1), replay(sparse, []))
    kept = {name: mask for name, _, mask in masked(student)}
    assert set(kept) == {"stage1.0.weight", "stage2.0.weight", "head.weight"}
    values = {layer.name: torch.from_numpy(layer.value) for layer in trained_layers(student)}
    assert all(bool((values[name.removesuffix(".weight")][~mask] == 0).all()) for name, mask in kept.items())
    with pytest.raises(StageError, match="zeros to keep"):
        run(tmp_path, stage(qat={"weights": "ternary", "quantizer": "dlt"}), replay(sparse, []), "shifted")


def test_what_reads_one_tensor_shares_one_range_and_the_rules_decide(tmp_path):
    rules = QuantizationRules(activation="int8", symmetric_activation=True, per_channel=False, quantize_bias=False)
    student = transformer(1, 5)
    distil(
        student, transformer(1, 6), bundle(Sentences), stage(epochs=1, qat={}), seed=1, work=tmp_path / "w",
        bank=tmp_path / "b", teacher_digest="t", signals={}, rules=rules,
    )  # fmt: skip
    inside = student.layers[0].attention
    assert inside.query.input_log_scale is inside.key.input_log_scale is inside.value.input_log_scale
    for layer in trained_layers(student):
        assert len(layer.scale) == 1
        assert layer.bias_codes is None
        assert layer.reads.zero == 128


def test_contradictions_are_refused_before_anything_runs():
    for keys, text in (
        ({"qat": {}, "lora": {}}, "do not go together"),
        ({"qat": {}, "cofi": {"target": 0.5}}, "do not go together"),
        ({"qat": {}, "rounds": 2}, "do not go together"),
        ({"qat": {}, "precision": "bf16"}, "rounds in float32"),
        ({"qat": {"quantizer": "twn"}}, "makes ternary weights"),
        ({"qat": {"weights": "ternary", "quantizer": "minmax"}}, "ternary weights take"),
        ({"qat": {"quantizer": "minmax"}}, "fewer bits than 8"),
        ({"qat": {"group": 32}}, "float"),
    ):
        with pytest.raises(ConfigError, match=text):
            stage(**keys)
    config = stage(qat={"protect": ["nothing*"], "int8": ["stage9"]}, objective=[{"use": "dual-head"}])
    image = {"image": torch.randn(2, 1, 12, 12)}
    found = {item.where: item.what for item in problems(config, "stage.1.distil", convnet(4, 0), image)}
    assert found["stage.1.distil.qat.protect.0"] == "`nothing*` matches no module"
    assert "stage.1.distil.qat.int8.0" in found
    assert "puts a part into the student" in found["stage.1.distil.objective.0.use"]
    nothing = problems(stage(qat={"protect": ["*"]}), "stage.1.distil", convnet(4, 0), image)
    assert [item.where for item in nothing] == ["stage.1.distil.qat"]


def test_feature_direction_ignores_the_size_of_a_hidden_state():
    from compressor.distil.objectives.base import Batch, Context, Step
    from compressor.distil.objectives.features import CosineMatch
    from compressor.recipe import Match

    objective = CosineMatch(match=Match(student="hidden[i]", teacher="hidden[g(i)]", proj="none"))
    assert not objective.bind({"hidden": 2}, {"hidden": 2})
    names = sorted(objective.needs.student)
    student, teacher = ({name: torch.randn(2, 3, 4) for name in names} for _ in range(2))
    objective.prepare(Context(student, teacher, torch.Generator(), "cpu"))
    batch = Batch(None, torch.ones(2, 3))
    scaled = {**student, names[0]: 7 * student[names[0]]}
    plain, grown = (objective(s, teacher, batch, Step(0, 1, 0)).sum for s in (student, scaled))
    assert float(plain) == pytest.approx(float(grown), abs=1e-5)
