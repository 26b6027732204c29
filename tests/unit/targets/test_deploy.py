"""One profile from start to end, with the real runtime; timing is real but short."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import onnxruntime
import pytest

from compressor.errors import CompileError
from compressor.evaluate import ArrayEvalSet, FirstSamples
from compressor.profile import load_profile
from compressor.types import Measurement, Origin, Unavailable, file_digest
from targets import registry
from targets.backends.numpy_reference import NumpyReference
from targets.backends.onnxruntime_cpu import OnnxRuntimeCpu
from targets.base import Missing, OverLimit, Ready
from targets.deploy import Candidates, EvaluationData, deploy
from targets.measure import Settings
from targets.outcome import Promise, State
from tests.unit.targets.conftest import artifact, images, write_cnn

SHORT = Settings(turn_ms=2, min_rounds=8, max_rounds=16, warm_budget_s=0.2, precision=1.0)


def labels_of(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"image": inputs})[0].argmax(axis=1)


@pytest.fixture
def data(models):
    validation, test = images(60, 11), images(50, 12)
    return EvaluationData(
        task="image-classification",
        validation=ArrayEvalSet({"image": validation}, labels_of(models["fp32"], validation)),
        test=ArrayEvalSet({"image": test}, labels_of(models["fp32"], test)),
        latency_inputs=[{"image": validation[i : i + 1]} for i in range(4)],
    )


@pytest.fixture
def candidates(models):
    """The teacher is the student's own file, so that accuracies are known: 1.0."""
    return Candidates(
        teacher=artifact(models["fp32"], "teacher", "teacher"),
        null_twin=artifact(models["wide"], "twin", "null-twin"),
        student=artifact(models["fp32"], "student"),
        variants=(
            artifact(models["static"], "student/static", precision="int8-static"),
            artifact(models["dynamic"], "student/dynamic", precision="int8-dynamic"),
        ),
    )


def run(name, candidates, data, out, **options):
    profile = load_profile(name)
    options.setdefault("promise", Promise(max_drop=0.1))
    promise = options.pop("promise")
    backend = options.pop("backend", None) or registry.get(profile.target)
    return deploy(profile, backend, candidates, data, promise, out, settings=SHORT, **options)


def by_name(outcome):
    return {row.artifact.name: row for row in outcome.rows}


def test_this_machine_is_measured_and_something_ships(candidates, data, tmp_path):
    events = []
    before = {item.path: file_digest(item.path) for item in candidates.ordered()}
    outcome = run("this-machine", candidates, data, tmp_path, on_event=lambda name, facts: events.append((name, facts)))
    rows = by_name(outcome)
    assert list(rows) == ["teacher", "twin", "student", "student/static", "student/dynamic"]
    assert all(row.state is State.EXECUTED for row in outcome.rows)
    teacher, student = rows["teacher"], rows["student"]
    assert teacher.validation.value == student.validation.value == 1.0
    assert teacher.latency == student.latency, "one file is measured once"
    assert student.speedup.value == 1.0
    assert student.latency.origin is Origin.MEASURED
    assert {"p90", "p95", "p99", "mean", "ci95_low", "ci95_high", "rounds", "samples", "threads", "batch"} <= set(
        student.latency.detail
    )
    assert student.peak_memory.value > student.peak_memory.detail["baseline"] > 10
    assert rows["student/static"].coverage.quantized == 4
    assert rows["student/dynamic"].coverage.quantized == 1
    assert outcome.shipped is not None
    assert outcome.shipped.reason.startswith("ships: ")
    assert any("timing" in facts["text"] for name, facts in events)
    assert {path: file_digest(path) for path in before} == before, "input files are never touched"


def test_test_split_is_touched_only_by_what_the_report_quotes(candidates, data, tmp_path):
    outcome = run("raspberry-pi-5", candidates, data, tmp_path)
    rows = by_name(outcome)
    for row in outcome.rows:
        quoted = row.shipped or row.artifact.role != "student" or row.artifact.precision == "fp32"
        assert isinstance(row.test, Measurement if quoted else Unavailable)
    assert rows["student"].test.value == 1.0
    assert rows["student"].loyalty.label == 1.0
    assert rows["student"].loyalty.probability == pytest.approx(1.0)
    assert rows["teacher"].loyalty is None
    assert rows["student/static"].shipped
    assert rows["student/static"].agreement > 0.9
    assert rows["student/static"].loyalty.probability > 0.9


def test_what_a_compiler_changed_is_told_beside_the_onnx_file(candidates, data, tmp_path):
    """The numpy reference is another runtime; ONNX Runtime beside itself would say nothing."""
    other = run("numpy-reference", candidates, data, tmp_path / "a")
    row = other.shipped
    assert row is not None
    assert row.nearness.argmax == 1.0
    assert row.nearness.samples == len(data.test)
    assert row.nearness.worst < 0.05 * row.nearness.reach
    assert {item.nearness for item in other.rows if not item.shipped} == {None}
    assert row.test.origin is Origin.SIMULATED
    assert by_name(other)["twin"].test.origin is Origin.PROXY, "what does not ship is tested without the simulator"
    assert by_name(other)["twin"].validation.origin is Origin.SIMULATED
    same = run("raspberry-pi-5", candidates, data, tmp_path / "b")
    assert {row.nearness for row in same.rows} == {None}


def test_a_simulator_does_not_run_what_can_never_run_on_the_device(candidates, data, tmp_path):
    """The teacher, and a file that does not fit, are scored by ONNX Runtime, and their rows say so."""

    class Small(NumpyReference):
        opened: ClassVar[list[str]] = []

        def compile(self, artifact, profile, out):
            compiled = super().compile(artifact, profile, out)
            over = (OverLimit("it needs 9 KiB of flash, the board has 1", 8.0),) if artifact.name == "student" else ()
            return replace(compiled, over=over)

        def open(self, compiled, profile):
            self.opened.append(compiled.artifact.name)
            return super().open(compiled, profile)

    rows = by_name(run("numpy-reference", candidates, data, tmp_path, backend=Small()))
    assert not {"teacher", "student"} & set(Small.opened)
    assert {"twin", "student/static"} <= set(Small.opened)
    for name in ("teacher", "student"):
        assert rows[name].validation.origin is Origin.PROXY
        assert rows[name].validation.device.startswith("ONNX Runtime on ")
        assert rows[name].state is State.COMPILED
    assert rows["student/static"].validation.origin is Origin.SIMULATED
    assert "flash" in rows["student"].reason


def test_a_teacher_that_the_target_refuses_is_still_what_students_are_judged_by(candidates, data, tmp_path):
    class Picky(OnnxRuntimeCpu):
        def compile(self, artifact, profile, out):
            if artifact.role == "teacher":
                raise CompileError("it has an operator that nobody knows")
            return super().compile(artifact, profile, out)

    for profile in ("raspberry-pi-5", "this-machine"):
        outcome = run(profile, candidates, data, tmp_path / profile, backend=Picky())
        teacher, shipped = by_name(outcome)["teacher"], outcome.shipped
        assert teacher.state is State.FAILED
        assert teacher.reason == "it has an operator that nobody knows"
        assert teacher.validation.origin is Origin.PROXY
        assert teacher.test.origin is Origin.PROXY
        assert isinstance(teacher.latency, Unavailable)
        assert shipped is not None
        assert outcome.kept, outcome.verdict
        assert shipped.loyalty is not None, "the teacher's answers are there"
    assert by_name(outcome)["student"].latency.origin is Origin.MEASURED


def test_a_simulator_runs_as_much_as_the_recipe_says(candidates, data, tmp_path):
    fewer = replace(data, simulated=7)
    rows = by_name(run("numpy-reference", candidates, fewer, tmp_path / "a"))
    assert {row.validation.detail["samples"] for row in rows.values()} == {7}, "the teacher is compared on the same"
    assert rows["student"].test.detail["samples"] == len(data.test)
    tested = run("numpy-reference", candidates, replace(fewer, simulated_test=9), tmp_path / "c")
    assert {row.test.detail["samples"] for row in tested.rows if isinstance(row.test, Measurement)} == {9}
    assert f"a simulator: test is its first 9 of {len(data.test)} samples" in tested.notes
    outcome = run("raspberry-pi-5", candidates, replace(fewer, simulated_test=9), tmp_path / "b")
    assert by_name(outcome)["student"].test.detail["samples"] == len(data.test)
    assert by_name(outcome)["student"].validation.detail["samples"] == len(data.validation)
    first = FirstSamples(data.validation, 7)
    assert len(first) == 7
    assert first.digest != FirstSamples(data.validation, 6).digest
    whole = next(data.validation.batches(len(data.validation)))
    for size in (3, 7, 64):
        parts = list(first.batches(size))
        np.testing.assert_array_equal(np.concatenate([inputs["image"] for inputs, _ in parts]), whole[0]["image"][:7])
        np.testing.assert_array_equal(np.concatenate([labels for _, labels in parts]), first.labels)


def test_a_simulator_says_how_far_it_is_and_leaves_only_whole_sets_behind(candidates, data, tmp_path, monkeypatch):
    monkeypatch.setattr("targets.trial.EVALUATION_BATCH", 5)
    cache: dict[str, np.ndarray] = {}
    told: list[str] = []
    deploy_to = {"cache": cache, "on_event": lambda name, event: told.append(event["text"])}
    run("numpy-reference", candidates, data, tmp_path, **deploy_to)
    assert not [key for key in cache if '"batch"' in key]
    assert cache
    total = len(data.validation)
    assert any(f"of {total} samples of student through the simulator" in text for text in told)


def test_a_device_elsewhere_gets_accuracy_by_proxy_and_no_latency(candidates, data, tmp_path):
    outcome = run("raspberry-pi-5", candidates, data, tmp_path)
    assert outcome.device == "Broadcom BCM2712, 4x Arm Cortex-A76"
    for row in outcome.rows:
        assert row.state is State.PROXY
        assert row.validation.origin is Origin.PROXY
        assert row.validation.device == registry.probe("onnxruntime-cpu").device
        assert "no raspberry-pi-5 attached" in row.latency.reason
    assert outcome.kept
    assert "cannot be measured here" in outcome.verdict


def test_profiles_that_share_a_runtime_score_a_file_once(candidates, data, tmp_path, monkeypatch):
    cache: dict[str, np.ndarray] = {}
    run("raspberry-pi-5", candidates, data, tmp_path / "a", cache=cache)
    assert len(cache) == 7  # 4 files on validation; teacher = student, twin and what ships on test

    def refuse(self, compiled, profile):
        raise AssertionError("scored again")

    monkeypatch.setattr(OnnxRuntimeCpu, "open", refuse)
    again = run("laptop-x86-vnni", candidates, data, tmp_path / "b", cache=cache)
    assert again.shipped is not None


def test_a_broken_variant_fails_and_the_rest_goes_on(candidates, data, models, tmp_path):
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(models["static"].read_bytes()[:500])
    variants = (*candidates.variants, artifact(bad, "student/bad", precision="int8-static"))
    outcome = run("raspberry-pi-5", replace(candidates, variants=variants), data, tmp_path / "out")
    row = by_name(outcome)["student/bad"]
    assert row.state is State.FAILED
    assert "could not load `student/bad`" in row.reason
    assert isinstance(row.latency, Unavailable)
    assert outcome.shipped is not None


def test_a_missing_target_is_an_outcome_not_a_crash(candidates, data, tmp_path):
    class Gone(OnnxRuntimeCpu):
        def probe(self):
            return Missing("the SDK is not installed", "Install it.")

    outcome = run("raspberry-pi-5", candidates, data, tmp_path, backend=Gone())
    assert outcome.missing == "the SDK is not installed"
    assert not outcome.kept
    assert {row.state for row in outcome.rows} == {State.UNAVAILABLE}
    assert outcome.shipped is None


def test_a_probe_that_raises_is_a_missing_target(candidates, data, tmp_path):
    class Broken(OnnxRuntimeCpu):
        def probe(self):
            raise OSError("libsdk.so: not found")

    assert "libsdk.so" in run("raspberry-pi-5", candidates, data, tmp_path, backend=Broken()).missing


class CompilesOnly(OnnxRuntimeCpu):
    """A tool chain for a device that is not here."""

    def probe(self):
        return Ready("cross compiler", {"sdk": "1"}, runs=None, why_not="no accelerator on this machine")

    def compile(self, artifact, profile, out):
        if artifact.precision == "int8-dynamic":
            raise CompileError("DynamicQuantizeLinear is not supported")
        return super().compile(artifact, profile, out)


def test_compiled_but_not_run_here_has_accuracy_by_proxy(candidates, data, tmp_path):
    outcome = run("raspberry-pi-5", candidates, data, tmp_path, backend=CompilesOnly())
    rows = by_name(outcome)
    assert rows["student"].state is State.COMPILED
    assert rows["student"].validation.origin is Origin.PROXY
    assert rows["student"].validation.device.startswith("ONNX Runtime on ")
    assert rows["student"].latency.reason == "no accelerator on this machine"
    assert rows["student/dynamic"].state is State.FAILED
    assert rows["student/dynamic"].reason == "DynamicQuantizeLinear is not supported"
    assert outcome.shipped.artifact.name == "student/static"


def test_a_promise_that_is_missed_says_by_how_much(candidates, data, tmp_path):
    promise = Promise(max_drop=0.1, max_size_mib=0.0001)
    outcome = run("raspberry-pi-5", candidates, data, tmp_path, promise=promise)
    assert not outcome.kept
    assert "MiB, the limit is 0.0001" in outcome.verdict
    assert outcome.shipped is not None


def test_static_batch_models_are_scored_and_timed(data, tmp_path):
    path = write_cnn(tmp_path / "four.onnx", batch=4)
    student = artifact(path, "student", batch=4)
    outcome = run(
        "this-machine", Candidates(None, None, student), data, tmp_path / "out", promise=Promise(max_drop=None)
    )
    row = outcome.rows[0]
    assert row.latency.detail["batch"] == 4
    assert row.validation.detail["samples"] == 60
    assert isinstance(row.speedup, Unavailable)


def test_unlabelled_classification_is_agreement_with_the_teacher(candidates, data, tmp_path):
    unlabelled = replace(data, validation=ArrayEvalSet(data.validation.arrays), test=None)
    outcome = run("raspberry-pi-5", candidates, unlabelled, tmp_path)
    assert by_name(outcome)["student"].validation.value == 1.0
    assert by_name(outcome)["twin"].validation.value < 1.0
    assert "no test split" in by_name(outcome)["student"].test.reason


def test_wrong_profile_options_are_named(candidates, data, tmp_path):
    profile = load_profile("raspberry-pi-5").model_copy(update={"options": {"thread": 3}})
    outcome = deploy(profile, OnnxRuntimeCpu(), candidates, data, Promise(), tmp_path)
    assert outcome.shipped is None
    assert "options.thread: unknown option" in outcome.rows[0].reason
