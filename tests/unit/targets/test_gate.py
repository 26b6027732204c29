"""The never-worse gate on tables of figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from compressor.types import Artifact, Format, Measurement, Origin, Unavailable
from targets.base import Compiled, Coverage, NodeFact
from targets.gate import PAIRED_ERROR, confirmed, decide
from targets.outcome import Promise, Row, State

AWAY = Unavailable("no board attached")
LOSSY = Coverage(1, 9, tuple(NodeFact(f"conv{i}", "Conv", False, "reads its weight at run time") for i in range(8)))
FULL = Coverage(9, 9)


def number(value, unit="1", width=0.0):
    detail = {"ci95_low": value * (1 - width), "ci95_high": value * (1 + width)} if width else {}
    return Measurement(value, unit, Origin.MEASURED, "here", detail)


def row(name, role="student", precision="fp32", accuracy=0.9, ms=1.0, kib=100, coverage=None, estimate=None, **other):
    """``ms`` None: latency cannot be measured. The teacher takes 8 ms."""
    artifact = Artifact(name, role, Path(f"{name}.onnx"), Format.ONNX, precision, (), (), name, 0)
    estimates = () if estimate is None else (Measurement(estimate, "ms", Origin.ESTIMATED, "compiler"),)
    values = {
        "artifact": artifact,
        "state": State.EXECUTED if ms is not None else State.PROXY,
        "validation": number(accuracy) if accuracy is not None else Unavailable("crashed"),
        "test": AWAY,
        "latency": number(ms, "ms", 0.01) if ms is not None else AWAY,
        "speedup": number(8.0 / ms, "x", 0.01) if ms is not None else AWAY,
        "file_bytes": number(kib * 1024, "bytes"),
        "peak_memory": AWAY,
        "coverage": coverage,
        "compiled": Compiled(Path(f"{name}.onnx"), artifact, 9, estimates=estimates),
    }
    return Row(**{**values, **other})


def teacher(ms=8.0, **other):
    return row("teacher", "teacher", accuracy=0.92, ms=ms, kib=4000, **other)


def shipped(decision):
    return [item.artifact.name for item in decision.rows if item.shipped]


def reason(decision, name):
    return next(item.reason for item in decision.rows if item.artifact.name == name)


def test_the_fastest_inside_the_promise_ships():
    rows = [
        teacher(),
        row("fp32", ms=2.0, accuracy=0.919),
        row("a", precision="int8-static", ms=1.0, accuracy=0.912, coverage=FULL),
        row("b", precision="int8-static", ms=0.5, accuracy=0.80, coverage=FULL),
        row("c", precision="int8-static", ms=1.5, accuracy=0.918, coverage=FULL),
    ]
    decision = decide(rows, Promise(max_drop=0.01))
    assert shipped(decision) == ["a"]
    assert decision.kept
    assert "8.00x as fast as the teacher" in decision.verdict
    assert reason(decision, "b") == "rejected: it loses 12.00 points on validation, 1.00 are allowed"
    assert "a is 1.50x as fast" in reason(decision, "c")


def test_a_model_that_quantization_only_slows_ships_as_fp32_and_says_so():
    rows = [
        teacher(),
        row("fp32", ms=1.0, accuracy=0.92, kib=400),
        row("static", precision="int8-static", ms=1.8, accuracy=0.92, kib=100, coverage=LOSSY),
        row("dynamic", precision="int8-dynamic", ms=9.0, accuracy=0.92, kib=100, coverage=LOSSY),
    ]
    decision = decide(rows, Promise())
    assert shipped(decision) == ["fp32"]
    assert decision.kept
    assert "quantization only slows this model down" in decision.verdict
    told = reason(decision, "static")
    assert "slower than fp32: 1.80x its p50" in told
    assert "8 of 9 Conv/Gemm/MatMul do not run quantized (8: reads its weight at run time)" in told


def test_differences_inside_the_confidence_interval_are_no_reason_to_reject():
    rows = [teacher(), row("fp32", ms=1.0, kib=400), row("int8", precision="int8", ms=1.01, kib=100)]
    decision = decide(rows, Promise(max_drop=0.05))
    assert shipped(decision) == ["int8"]
    assert "as fast as fp32" in reason(decision, "int8")


def test_among_equally_fast_files_of_equal_size_the_more_accurate_ships():
    rows = [
        teacher(),
        row("fp32", ms=2.0, kib=400),
        row("tensor", precision="int8", ms=1.00, kib=100, accuracy=0.913),
        row("channel", precision="int8", ms=1.02, kib=103, accuracy=0.919),
        row("small", precision="int8", ms=1.03, kib=101, accuracy=0.90),
    ]
    assert shipped(decide(rows, Promise(max_drop=0.05))) == ["channel"]


def test_a_student_slower_than_its_teacher_breaks_the_promise():
    decision = decide([teacher(), row("fp32", ms=10.0, accuracy=0.92)], Promise())
    assert not decision.kept
    assert shipped(decision) == ["fp32"]
    assert "slower than what went in (teacher): 1.25x its p50" in decision.verdict


def test_what_alone_fits_the_size_ships_though_it_is_slower_and_says_so():
    rows = [teacher(), row("fp32", kib=800), row("small", precision="mixed-size", ms=1.5, kib=200)]
    assert shipped(decide(rows, Promise(max_drop=0.05))) == ["fp32"]
    decision = decide(rows, Promise(max_drop=0.05, max_size_mib=0.25))
    assert decision.kept
    assert shipped(decision) == ["small"]
    assert "it is slower than fp32: 1.50x its p50, whose file has 0.78 MiB where 0.25 are allowed" in decision.verdict
    both = decide([*rows, row("quick", precision="int8", ms=0.9, kib=210)], Promise(max_drop=0.05, max_size_mib=0.25))
    assert shipped(both) == ["quick"]
    assert "slower" not in both.verdict


@pytest.mark.parametrize(
    ("promise", "told"),
    [
        (Promise(max_size_mib=0.05), "its file has 0.10 MiB, the limit is 0.05"),
        (Promise(max_latency_ms=0.5), "its p50 is 1.000 ms, the limit is 0.5 ms"),
        (Promise(min_speedup=20), "it is 8.00x as fast as the teacher, 20x is wanted"),
        (Promise(max_drop=0.001), "it loses 2.00 points on validation, 0.10 are allowed"),
    ],
)
def test_every_limit_is_named_when_missed_and_the_best_so_far_ships(promise, told):
    decision = decide([teacher(), row("fp32")], promise)
    assert not decision.kept
    assert shipped(decision) == ["fp32"]
    assert told in decision.verdict
    assert decision.verdict.startswith("the promise is not kept: fp32 ships as the best so far, but")


def test_of_infeasible_candidates_the_nearest_one_that_keeps_the_accuracy_ships():
    rows = [
        teacher(),
        row("fp32", ms=2.0, accuracy=0.92),
        row("near", precision="int8", ms=0.6, accuracy=0.915),
        row("wrong", precision="int8", ms=0.4, accuracy=0.5),
    ]
    decision = decide(rows, Promise(max_latency_ms=0.5))
    assert shipped(decision) == ["near"]
    assert "its p50 is 0.600 ms" in decision.verdict


def test_when_none_keeps_the_accuracy_the_most_accurate_ships():
    rows = [teacher(), row("fp32", accuracy=0.85), row("int8", precision="int8", ms=0.3, accuracy=0.84)]
    decision = decide(rows, Promise())
    assert shipped(decision) == ["fp32"]
    assert not decision.kept


def test_a_drop_of_exactly_the_limit_is_inside_it():
    assert decide([teacher(), row("fp32", accuracy=0.92 - 0.01)], Promise(max_drop=0.01)).kept


def test_without_a_drop_limit_accuracy_does_not_matter():
    assert decide([teacher(), row("fp32", accuracy=0.1)], Promise(max_drop=None)).kept


def test_teacher_and_student_may_be_the_same_file():
    same = row("model", "teacher", accuracy=0.92, ms=8.0, kib=400)
    rows = [same, row("model-fp32", accuracy=0.92, ms=8.0, kib=400), row("int8", precision="int8", ms=12.0, kib=100)]
    decision = decide(rows, Promise(max_drop=0.05))
    assert shipped(decision) == ["model-fp32"]
    assert reason(decision, "int8").count("slower than") == 1


def test_failed_rows_and_the_null_twin_never_ship():
    twin = row("twin", "null-twin", ms=0.1, kib=1, accuracy=0.99)
    broken = row("broken", precision="int8", ms=0.1, kib=1, accuracy=None, state=State.FAILED, reason="bad node")
    decision = decide([teacher(), twin, row("fp32", accuracy=0.92), broken], Promise())
    assert shipped(decision) == ["fp32"]
    assert reason(decision, "broken") == "bad node"
    assert reason(decision, "twin") == ""


def test_nothing_ships_when_everything_failed():
    broken = row("fp32", state=State.FAILED, reason="unsupported operator")
    decision = decide([teacher(), broken], Promise())
    assert shipped(decision) == []
    assert not decision.kept
    assert "fp32: unsupported operator" in decision.verdict


def test_without_latency_the_smallest_accurate_file_ships_and_thin_coverage_does_not():
    rows = [
        teacher(ms=None),
        row("fp32", ms=None, accuracy=0.92, kib=400),
        row("static", precision="int8", ms=None, accuracy=0.915, kib=110, coverage=FULL),
        row("dynamic", precision="int8", ms=None, accuracy=0.92, kib=90, coverage=LOSSY),
    ]
    decision = decide(rows, Promise(max_latency_ms=1.0))
    assert shipped(decision) == ["static"]
    assert "latency cannot be measured here" in decision.verdict
    assert "the limits on latency are not verified" in decision.verdict
    assert "likely slower than fp32 (not measured)" in reason(decision, "dynamic")


def test_without_latency_a_compilers_estimates_decide_when_all_have_one():
    rows = [
        teacher(ms=None, estimate=8.0),
        row("fp32", ms=None, accuracy=0.92, kib=50, estimate=2.0),
        row("int8", precision="int8", ms=None, accuracy=0.92, kib=100, estimate=1.0, coverage=FULL),
    ]
    decision = decide(rows, Promise())
    assert shipped(decision) == ["int8"]
    assert "lowest latency estimate" in decision.verdict


def test_unknown_accuracy_does_not_keep_a_promise():
    rows = [teacher(), row("fp32", accuracy=0.92), row("mute", precision="int8", ms=0.2, accuracy=None)]
    decision = decide(rows, Promise())
    assert shipped(decision) == ["fp32"]
    assert "its accuracy is unknown (crashed)" in reason(decision, "mute")


def test_without_a_teacher_the_students_fp32_file_is_the_baseline():
    rows = [row("fp32", accuracy=0.90, ms=2.0), row("int8", precision="int8", ms=1.0, accuracy=0.80)]
    decision = decide(rows, Promise())
    assert shipped(decision) == ["fp32"]
    assert decision.kept


def test_validation_chooses_and_test_judges():
    """A loss on the test set that was not to be is told, with how well it is known, and nothing else is chosen."""
    rows = [
        teacher(test=number(0.92)),
        row("fp32", ms=2.0, accuracy=0.919, test=number(0.92)),
        row("a", precision="int8-static", ms=1.0, accuracy=0.915, coverage=FULL, test=number(0.899)),
    ]
    promise = Promise(max_drop=0.01)
    decision = decide(rows, promise)
    assert decision.kept
    judged = confirmed(decision, promise)
    assert not judged.kept
    assert shipped(judged) == ["a"], "the test set chooses nothing"
    assert judged.verdict.startswith(
        "the promise is kept on validation and not on the test set: it loses 2.10 points on test, 1.00 are allowed. a"
    )
    assert confirmed(decide(rows, Promise(max_drop=0.021)), Promise(max_drop=0.021)).kept, "exactly the limit is inside"
    assert confirmed(decide(rows, Promise(max_drop=None)), Promise(max_drop=None)).kept, "nothing was asked for"

    error = Measurement(0.899, "1", Origin.MEASURED, "here", {PAIRED_ERROR: 0.005})
    known = replace(decision, rows=tuple(replace(item, test=error) if item.shipped else item for item in decision.rows))
    assert "(the loss is known to within 0.98 points at 95 %)" in confirmed(known, promise).verdict


def test_a_miss_by_a_hair_does_not_read_as_a_hit():
    rows = [teacher(test=number(0.92)), row("fp32", ms=2.0, accuracy=0.919, test=number(0.90997))]
    promise = Promise(max_drop=0.01)
    assert "it loses 1.003 points on test, 1.000 are allowed" in confirmed(decide(rows, promise), promise).verdict


def test_test_figures_judge_nothing_where_there_are_none():
    promise = Promise(max_drop=0.01)
    for other in ({"test": AWAY}, {"test": number(0.5)}):
        rows = [teacher(), row("fp32", ms=2.0, accuracy=0.919, **other)]
        decision = decide(rows, promise)
        assert confirmed(decision, promise) == decision
    missed = decide([teacher(test=number(0.9)), row("fp32", accuracy=0.5, test=number(0.5))], promise)
    assert confirmed(missed, promise) == missed, "it says already that the promise is not kept"
    plain = row("fp32", ms=2.0, accuracy=0.9, test=number(0.9))
    int8 = row("a", precision="int8-static", accuracy=0.9, coverage=FULL, test=number(0.8))
    assert not confirmed(decide([plain, int8], promise), promise).kept, "without a teacher the fp32 file is the measure"


def test_perplexity_is_judged_on_test_as_a_ratio():
    def of(value):
        return number(value, "perplexity")

    rows = [
        replace(teacher(), validation=of(20.0), test=of(20.0)),
        replace(row("fp32", ms=2.0), validation=of(20.5), test=of(23.0)),
    ]
    promise = Promise(max_drop=0.05)
    judged = confirmed(decide(rows, promise), promise)
    assert "its perplexity is 15.0% higher on test, 5.1% is allowed" in judged.verdict
