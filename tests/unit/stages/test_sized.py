"""The size budget while planning, which precisions a profile has, and that no weight-only file is mixed."""

import numpy as np
import pytest

from compressor.profile import HardwareProfile, load_profile
from compressor.quantize import Variant
from compressor.recipe import PruneStage, QuantizeStage, Recipe
from compressor.stages import mixed
from compressor.stages.sized import size_problems, sized_candidate, storable
from tests import onnx_models

QUANTIZE = QuantizeStage(kind="quantize")
MIB = 2**20


def recipe(limit, *stages, drop=0.01):
    return Recipe.model_validate(
        {"name": "r", "teacher": {"model": "m.onnx"}, "data": {"source": "d"}}
        | {"accept": {"max_size_mib": limit, "max_drop": drop}, "stage": [stage.model_dump() for stage in stages]}
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return onnx_models.cnn(tmp_path_factory.mktemp("m") / "m.onnx")


@pytest.fixture(scope="module")
def machine():
    return load_profile("this-machine")


def test_too_small_a_budget_is_refused_with_figures(model, machine):
    few = onnx_models.artifact(model).parameters
    (found,) = size_problems(recipe(0.9 * few / 2 / MIB, QUANTIZE), [machine], model)
    assert found.where == "accept.max_size_mib"
    assert f"{few:,} parameters" in found.what
    assert "int4" in found.what
    assert size_problems(recipe(1.1 * few / 2 / MIB, QUANTIZE), [machine], model) == []
    (found,) = size_problems(recipe(1.1 * few / 2 / MIB), [machine], model)
    assert "fp32" in found.what, "nothing quantizes"
    cut = PruneStage(kind="prune", ratio=0.5)
    assert size_problems(recipe(1e-6, cut, QUANTIZE), [machine], model) == [], "what a cut leaves is not known yet"


def test_precisions_are_the_profiles(machine):
    assert storable(machine) == ("int4", "int8", "fp16", "fp32")
    assert storable(load_profile("geforce-rtx-4070")) == ("int8", "fp16", "fp32")
    assert storable(load_profile("stm32f746g-disco")) == ("int8", "fp32")
    none = machine.model_dump() | {"quantization": {"int8": False}}
    assert storable(HardwareProfile.model_validate(none)) == ("fp32",)


class Judge:
    """A scorer that knows its scores."""

    baseline = 0.9

    def __init__(self, scores):
        self.scores = scores

    def __call__(self, artifact):
        return self.scores[artifact.name]


def test_nothing_is_made_when_a_small_file_keeps_the_promise(model, machine):
    source = onnx_models.artifact(model)
    run = type("Run", (), {"recipe": recipe(source.file_bytes / MIB, QUANTIZE)})()
    scorer = Judge({"student/fp32": 0.9})
    assert sized_candidate(run, source, QUANTIZE, machine, [], [], scorer) == (None, "")
    scorer = Judge({"student/fp32": 0.8})
    found, why = sized_candidate(run, source, QUANTIZE, machine, [], [], scorer)
    assert found is None
    assert (
        why == "the fp32 student itself loses 10.00 points on validation, 1.00 are allowed: no precision can mend that"
    )


def test_weight_only_files_are_no_base_beside_an_int8_file(model, machine, monkeypatch):
    source = onnx_models.artifact(model)
    weights = Variant("int8-weights-ort", "onnxruntime", "weights", group=32)
    static = Variant("int8-static-per-channel-ort", "onnxruntime", "static")
    scores = {"student/fp32": 0.9, "w": 0.7, "s": 0.5}
    taken = []

    def stored(_run, _student, variant, *_):
        taken.append(variant.name)
        return source

    monkeypatch.setattr(mixed, "_stored", stored)
    monkeypatch.setattr(mixed, "settled", lambda variant, _: variant)
    run = type("Run", (), {"recipe": recipe(None, QUANTIZE)})()
    files = [(weights, _named(source, "w")), (static, _named(source, "s"))]
    for given in (files, files[:1]):
        mixed.mixed_candidate(run, source, QUANTIZE, machine.quantization, given, Judge(scores))
    assert taken == [static.name, weights.name]


def _named(source, name):
    import dataclasses

    return dataclasses.replace(source, name=name)


def test_the_scorer_runs_its_reference_when_it_is_asked(model):
    class Data:
        labels = np.arange(3)

    scorer = mixed.Scorer.__new__(mixed.Scorer)
    scorer.task, scorer.names, scorer.data, scorer.known = "image-classification", (), Data(), {}
    scorer._reference = onnx_models.artifact(model)
    runs = []
    scorer._outputs = lambda artifact: runs.append(artifact) or np.eye(3)
    assert runs == []
    assert scorer.baseline == 1.0
    assert scorer.baseline == 1.0
    assert len(runs) == 1
