"""Encoder-decoder models: pairs as the models see them, exact losses, caches, targets that models write."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from compressor import students  # noqa: E402
from compressor.data.types import DataBundle  # noqa: E402
from compressor.distil.generation import write_targets  # noqa: E402
from compressor.distil.loop import distil  # noqa: E402
from compressor.distil.objectives.base import Step  # noqa: E402
from compressor.distil.objectives.features import HiddenMatch  # noqa: E402
from compressor.distil.rollouts import OnPolicy, batch_of  # noqa: E402
from compressor.distil.step import label_term  # noqa: E402
from compressor.errors import ConfigError, PlanError  # noqa: E402
from compressor.evaluate import SplitEvalSet, predict, written  # noqa: E402
from compressor.language import Rollouts  # noqa: E402
from compressor.models.signals import SignalTap, available  # noqa: E402
from compressor.models.structure.blocks import find_block_lists  # noqa: E402
from compressor.models.types import LoadedModel  # noqa: E402
from compressor.recipe import DataConfig, DistilStage, Match, Recipe, StudentStage, TeacherConfig  # noqa: E402
from tests.unit.distil import text2text as toy  # noqa: E402

pytestmark = pytest.mark.train
KINDS = ("t5", "bart", "marian")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    return {kind: toy.loaded(toy.save(tmp_path_factory.mktemp(kind), kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def teacher(models: dict[str, LoadedModel]) -> LoadedModel:
    return models["t5"]


@pytest.fixture(scope="module")
def data(teacher: LoadedModel) -> DataBundle:
    return toy.bundle(teacher)


def tensors(arrays):
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def test_the_decoder_reads_what_stands_before_each_token(data, teacher):
    split = data.splits["validation"]
    index = np.arange(3)
    made, labels = split.batch(index), split.labels[index]
    real = labels != -100
    assert set(made) == {spec.name for spec in teacher.inputs}
    assert (made["decoder_input_ids"][:, 0] == 0).all()  # T5 begins with its padding token
    width = made["decoder_input_ids"].shape[1]
    assert np.array_equal(made["decoder_input_ids"][:, 1:][real[:, 1:width]], labels[:, : width - 1][real[:, 1:width]])
    assert np.array_equal(made["decoder_attention_mask"], real[:, :width])
    assert [row[keep][-1] for row, keep in zip(labels, real, strict=True)] == [1, 1, 1]  # the end is learned
    texts = [split.targets.decode(row[keep].tolist()) for row, keep in zip(labels, real, strict=True)]
    assert texts == list(split.targets.references[:3])


def test_targets_are_cut_with_their_end_and_told(teacher):
    cut = dataclasses.replace(teacher, preprocess=teacher.preprocess.model_copy(update={"target_length": 3}))
    found = toy.bundle(cut)
    assert found.splits["train"].labels.shape[1] == 3
    assert (found.splits["train"].labels == 1).any(axis=1).all()
    assert any("targets of train are longer than 3 tokens" in note for note in found.notes)


@pytest.mark.parametrize("kind", KINDS)
def test_plan_knows_the_task_without_torch_and_the_one_line_form_halves_both_sides(models, kind):
    from compressor.cli.session import default_stages
    from compressor.models.inspection import inspect_model

    facts = inspect_model(TeacherConfig(model=models[kind].provenance.source))
    assert (facts.task, facts.layers, facts.labels) == ("text2text-generation", 2, ())
    stages = default_stages(Recipe(), models[kind]).stage
    assert (stages[0].keep_layers, stages[0].decoder_layers) == (1, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_transformers_and_padding_changes_nothing(models, kind):
    loaded = models[kind]
    assert loaded.task == "text2text-generation"
    split = toy.bundle(loaded).splits["train"]
    inputs, labels = tensors(split.batch(np.arange(8))), torch.from_numpy(split.labels[:8]).long()
    logits = loaded.module(**inputs)
    batch = batch_of(labels, inputs, by_token=True)
    term = label_term(logits, batch)
    labels = labels[:, : logits.shape[1]]
    own = loaded.module.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels)
    assert float(term.sum / term.count) == pytest.approx(float(own.loss), rel=1e-5)
    assert int(term.count) == int((labels != -100).sum()) == int(inputs["decoder_attention_mask"].sum())
    wide = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in inputs.items()}
    again = loaded.module(**wide)[:, : logits.shape[1]]
    keep = inputs["decoder_attention_mask"] != 0
    assert float((again - logits)[keep].abs().max()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_three_ways_of_greedy_writing_agree(models, kind):
    loaded = models[kind]
    split = toy.bundle(loaded).splits["validation"]
    sources = split.source.batch(np.arange(8))
    cached = write_targets(loaded.module, tensors(sources), 6)

    def call(inputs):
        with torch.no_grad():
            return loaded.module(**tensors(inputs)).numpy()

    plain = written.write(call, sources, split.targets)
    own = loaded.module.model.generate(**tensors(sources), max_new_tokens=6, do_sample=False, num_beams=1,
                                       bad_words_ids=[[0]], use_cache=True)  # fmt: skip
    for row, real, ids, hugging in zip(cached.ids, cached.mask, plain, own, strict=True):
        mine = [token for token in row[1:][real[1:] != 0].tolist() if token != 1]
        theirs = [token for token in hugging[1:].tolist() if token not in (0, 1)]
        assert mine == ids == theirs


def test_a_wider_beam_is_at_least_as_likely(teacher, data):
    sources = tensors(data.splits["validation"].source.batch(np.arange(1)))

    def likelihood(made):
        logits = teacher.module(**sources, decoder_input_ids=made.ids[:, :-1],
                                decoder_attention_mask=made.mask[:, :-1]).log_softmax(-1)  # fmt: skip
        return float((logits.gather(2, made.ids[:, 1:, None])[..., 0] * made.mask[:, 1:]).sum())

    greedy, beam = (write_targets(teacher.module, sources, 2, beams=beams) for beams in (1, 4))
    assert likelihood(beam) >= likelihood(greedy) - 1e-5


def test_teacher_forced_rows_are_the_models_own_loss(teacher, data):
    split = SplitEvalSet(data.splits["validation"])

    def run(inputs):
        with torch.no_grad():
            return {"logits": teacher.module(**tensors(inputs)).numpy()}

    found = predict(run, split, 3, task="text2text-generation")
    inputs, labels = tensors(split.split.batch(np.arange(8))), torch.from_numpy(split.labels).long()
    own = teacher.module.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                               labels=labels[:, : inputs["decoder_input_ids"].shape[1]])  # fmt: skip
    assert found[:, 0].sum() / found[:, 1].sum() == pytest.approx(float(own.loss), rel=1e-5)
    assert split.digest != SplitEvalSet(data.splits["calibration"]).digest


def train(tmp_path: Path, teacher: LoadedModel, data: DataBundle, name: str, **settings: object):
    torch.manual_seed(3)
    student = toy.model("t5", layers=1).eval()
    from compressor.models.wrappers import EncoderDecoder

    student = EncoderDecoder(student)
    labels_only = bool(settings.pop("labels_only", False))
    stage = {
        "kind": "distil", "epochs": 2, "batch": 16, "precision": "fp32", "cache": "off",
        "objective": [{"use": "kd", "options": {"temperature": 1.0}}],
    }  # fmt: skip
    result = distil(
        student, teacher.module, data, DistilStage.model_validate(stage | settings), seed=3, work=tmp_path / name,
        bank=tmp_path / "bank", teacher_digest="t", signals={}, labels_only=labels_only,
    )  # fmt: skip
    return student.state_dict(), result


def test_cached_pieces_and_whole_vocabulary_train_as_online(tmp_path, teacher, data):
    online, result = train(tmp_path, teacher, data, "online")
    cached, kept = train(tmp_path, teacher, data, "cached", cache="on")
    assert kept.cached
    assert not result.cached
    assert all(float((online[name] - cached[name]).abs().max()) < 1e-4 for name in online)
    top, _ = train(tmp_path, teacher, data, "top", cache="on", cache_logits=len(toy.KNOWN))
    assert all(float((online[name] - top[name]).abs().max()) < 1e-3 for name in online)
    cut, _ = train(tmp_path, teacher, data, "cut", accumulate=2)
    assert all(float((online[name] - cut[name]).abs().max()) < 1e-4 for name in online)


def test_the_twin_learns_from_targets_alone_and_features_of_both_sides_teach(tmp_path, teacher, data):
    twin, result = train(tmp_path, teacher, data, "twin", labels_only=True)
    assert result.teacher_forwards == 0
    objectives = [
        {"use": "hidden", "match": {"student": "encoder.hidden[-1]", "teacher": "encoder.hidden[-1]"}},
        {"use": "hidden", "match": {"map": "last"}},
        {"use": "minilm-relations", "options": {"part": "encoder"}},
    ]
    taught, found = train(tmp_path, teacher, data, "features", cache="auto", objective=objectives)
    assert not found.cached  # an encoder's signals are not kept
    assert all(np.isfinite(record.loss) for record in found.history)
    assert any(not torch.equal(twin[name], taught[name]) for name in twin)


def test_encoder_features_count_the_tokens_of_the_source(teacher, data):
    inputs = tensors(data.splits["train"].batch(np.arange(6)))
    batch = batch_of(torch.from_numpy(data.splits["train"].labels[:6]).long(), inputs, by_token=True)
    for name, mask in (("encoder.hidden[-1]", "attention_mask"), ("hidden[-1]", "decoder_attention_mask")):
        objective = HiddenMatch(match=Match(student=name, teacher=name, proj="none"))
        counts = available(teacher.module)
        assert objective.bind(counts, counts) == []
        (signal,) = objective.needs.student
        with SignalTap(teacher.module, [signal]) as tap:
            states = tap(inputs)[signal]
        objective.pairs = [(signal, signal)]
        objective._projections = torch.nn.ModuleList([torch.nn.Identity()])
        term = objective({signal: states}, {signal: states + 2.0}, batch, Step(0, 1, 0))
        assert int(term.count) == int(inputs[mask].sum())
        assert float(term.sum / term.count) == pytest.approx(4.0, rel=1e-5)


def test_what_the_student_wrote_is_taught_at_every_token_with_its_end(teacher, data):
    inputs = tensors(data.splits["train"].batch(np.arange(5)))
    rollouts = OnPolicy(Rollouts(fraction=1.0, max_new_tokens=4, temperature=0.0), teacher.module, seed=1)
    found, batch = rollouts.batch(inputs, 0)
    made = write_targets(teacher.module, {name: inputs[name] for name in ("input_ids", "attention_mask")}, 4)
    assert torch.equal(found["decoder_input_ids"], made.ids[:, :-1])
    assert torch.equal(batch.response, made.mask[:, 1:] != 0)
    assert torch.equal(batch.mask, found["decoder_attention_mask"])
    assert bool((batch.labels == -100).all())
    assert bool(batch.student_made.all())


def test_on_policy_training_repeats(tmp_path, teacher, data):
    settings = {"rollouts": {"fraction": 0.5, "max_new_tokens": 4, "replay": 0.5, "buffer": 2}}
    first, _ = train(tmp_path, teacher, data, "first", **settings)
    again, _ = train(tmp_path, teacher, data, "again", **settings)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_shallow_decoder_still_writes_and_its_record_rebuilds_it(models):
    from compressor.models.rebuild import replay

    for kind, loaded in models.items():
        split = toy.bundle(loaded).splits["train"]
        example = tensors(split.batch(np.arange(2)))
        stage = StudentStage(kind="student", keep_layers=2, decoder_layers=1)
        made = students.make_student(loaded.module, stage, example, seed=0)
        counts = available(made.module)
        assert (counts["encoder.hidden"], counts["hidden"]) == (3, 2), kind
        again = replay(loaded.module, made.record)
        assert torch.equal(again(**example), made.module(**example))
        sources = {name: example[name] for name in ("input_ids", "attention_mask")}
        assert write_targets(made.module, sources, 4).ids.shape[1] > 1


def test_the_layer_with_t5s_position_bias_stays(models):
    example = tensors(toy.bundle(models["t5"]).splits["train"].batch(np.arange(2)))
    stage = StudentStage(kind="student", decoder_layers=(1,))
    (problem,) = students.check(models["t5"].module, example, stage)
    assert problem.where == "decoder_layers"
    assert "position bias" in problem.what
    assert students.check(models["bart"].module, example, stage) == []
    lists = find_block_lists(models["t5"].module, example)
    assert {blocks.container: blocks.positions for blocks in lists} == {
        "model.encoder.block": (1,),
        "model.decoder.block": (1,),
    }


def test_what_does_not_fit_is_refused_with_its_key(teacher):
    from compressor.data import load_data
    from compressor.data.raw import RawData, RawPart
    from compressor.models import load_model
    from compressor.plan import task_problems

    no_targets = RawData({"train": RawPart("texts", toy.raw().parts["train"].samples)}, (), "x")
    with pytest.raises(PlanError, match="has no targets"):
        load_data(toy.DATA, teacher, seed=0, raw=no_targets)
    numbers = RawData({"train": RawPart("texts", toy.raw().parts["train"].samples, [1] * 60)}, (), "x")
    with pytest.raises(PlanError, match="is a int, not a text"):
        load_data(toy.DATA, teacher, seed=0, raw=numbers)
    with pytest.raises(PlanError, match="needs a checkpoint"):
        load_model(TeacherConfig(model="x.onnx", task="translation"))
    with pytest.raises((PlanError, ConfigError), match="one source text"):
        load_model(TeacherConfig(model=teacher.provenance.source), data=DataConfig(text_pair="b"))
    recipe = Recipe.model_validate(
        {
            "teacher": {"max_length": 64},
            "stage": [
                {"kind": "student", "vocabulary": "corpus"},
                {"kind": "distil", "augment": ["token-drop"], "rollouts": {"beside": True, "max_new_tokens": 99}},
            ],
        }
    )
    places = {problem.where for problem in task_problems(recipe, "translation", positions=24)}
    assert {"teacher.max_length", "stage.0.student.vocabulary", "stage.1.distil.augment"} <= places
    assert {"stage.1.distil.rollouts.beside", "stage.1.distil.rollouts.max_new_tokens"} <= places
    other = Recipe.model_validate({"stage": [{"kind": "student", "decoder_layers": 1}]})
    assert [p.where for p in task_problems(other, "causal-lm")] == ["stage.0.student.decoder_layers"]
