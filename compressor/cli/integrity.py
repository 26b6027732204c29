"""The findings of the integrity checks, for the report: contamination, canary, power, teacher hacking, provenance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from compressor.types import Measurement, StageResult

if TYPE_CHECKING:
    from compressor.cli.session import Session
    from targets.outcome import Finding, ProfileOutcome, Row

CLASSES = ("image-classification", "text-classification")


def findings(
    session: Session,
    outcomes: Sequence[ProfileOutcome],
    stages: Sequence[StageResult],
    other_seeds: Sequence[Sequence[StageResult]] = (),
) -> tuple[Finding, ...]:
    """Everything that the checks have to say about this run; ``other_seeds``: the stages of further pairs."""
    found = [
        *_contamination(session),
        *_written(session, stages),
        *_canaries(session, outcomes),
        *_power(session, outcomes),
        *_hacking(stages),
    ]
    for number, more in enumerate(other_seeds, 1):
        found += _hacking(more, f", seed {session.recipe.seed + number}")
    return tuple(found)


def _contamination(session: Session) -> Iterator[Finding]:
    from targets.outcome import Finding

    data = session.data
    exact = f"{data.duplicates_dropped} equal samples were dropped from training" if data.duplicates_dropped else ""
    parts = ", ".join(name for name in data.splits if name not in ("test", "fresh"))
    yield Finding("contamination, equal samples", "clear", exact or f"none between test and {parts}")
    if not data.near:
        off = session.recipe.data.near_duplicates == "off"
        why = "switched off" if off else "not looked for (plain arrays, or pictures too many to decode)"
        yield Finding("contamination, near duplicates", "note", why)
    for item in data.near:
        examples = f": {'; '.join(item.examples)}" if item.examples else ""
        text = f"{item.count} of {item.samples:,} samples of {item.part} are nearly in {item.against} ({item.how})"
        policy = " and were dropped" if item.count and session.recipe.data.near_duplicates == "drop" else ""
        state = "alarm" if item.count and item.part.startswith("data of teacher") else "note" if item.count else "clear"
        yield Finding(f"contamination, {item.part}", state, f"{text}{policy}{examples}")


def _written(session: Session, stages: Sequence[StageResult]) -> Iterator[Finding]:
    """Text that the teacher wrote for the student, against the test text: equal runs of tokens."""
    from compressor.data.overlap import RUN_TOKENS, sharing
    from compressor.stages.sequences import FILE
    from targets.outcome import Finding

    for stage in stages:
        path = stage.folder / FILE
        if stage.stage != "seq-kd" or not path.is_file():
            continue
        with np.load(path, allow_pickle=False) as stored:
            rows = stored["labels"]
        for against in ("test", "fresh"):
            labels = session.data.splits[against].labels if against in session.data.splits else None
            if labels is None:
                continue
            count = sharing(rows, labels)
            text = f"{count} of {len(rows):,} sequences of the teacher hold {RUN_TOKENS} tokens in a row of {against}"
            state = "alarm" if count > 0.01 * len(rows) else "note" if count else "clear"
            yield Finding(f"contamination, teacher-made text ({against})", state, text)


def _shipped(outcomes: Sequence[ProfileOutcome]) -> Iterator[tuple[str, Row, float]]:
    """Profile, row and test score of what ships, each file once."""
    seen: set[str] = set()
    for outcome in outcomes:
        row = outcome.shipped
        if row is not None and isinstance(row.test, Measurement) and row.artifact.digest not in seen:
            seen.add(row.artifact.digest)
            yield outcome.profile, row, row.test.value


def _canaries(session: Session, outcomes: Sequence[ProfileOutcome]) -> Iterator[Finding]:
    from compressor.distil.probes.canary import SIGMAS, canary
    from targets.outcome import Finding

    if session.model.task not in CLASSES:
        return
    for profile, row, test in _shipped(outcomes):
        found = _fresh_score(session, row)
        if found is None:
            continue
        other, score, samples = found
        seen = canary(test, len(session.data.splits["test"]), score, samples)
        text = (
            f"{profile}: {100 * test:.2f} % on test, {100 * score:.2f} % on {other} ({samples:,} samples): "
            f"gap {100 * seen.gap:+.2f} points, {seen.sigmas:+.1f} standard errors"
        )
        more = f"; above {SIGMAS:g}: test samples are probably in somebody's training data" if seen.alarm else ""
        yield Finding("canary", "alarm" if seen.alarm else "clear", text + more)


def _fresh_score(session: Session, row: Row) -> tuple[str, float, int] | None:
    """Name, score and size of the set beside the benchmark: the fresh one, or validation, which was not trained on."""
    fresh = session.data.splits.get("fresh")
    if fresh is None:
        held = session.data.splits["validation"]
        return ("validation", row.validation.value, len(held)) if isinstance(row.validation, Measurement) else None
    if fresh.labels is None or row.artifact.path.suffix != ".onnx":
        return None
    import onnxruntime

    from compressor.evaluate import SplitEvalSet, predict, score

    opened = onnxruntime.InferenceSession(row.artifact.path, providers=["CPUExecutionProvider"])
    names = [output.name for output in opened.get_outputs()]
    outputs = predict(
        lambda inputs: dict(zip(names, opened.run(None, dict(inputs)), strict=True)),
        SplitEvalSet(fresh),
        64,
        specs=row.artifact.inputs,
        task=session.model.task,
    )
    value = score(session.model.task, outputs, np.asarray(fresh.labels), names=session.data.labels)
    return "fresh", float(value), len(fresh)


def _power(session: Session, outcomes: Sequence[ProfileOutcome]) -> Iterator[Finding]:
    from compressor.distil.probes.power import power_statement
    from targets.outcome import Finding

    if session.model.task not in CLASSES:
        return
    for profile, row, test in _shipped(outcomes):
        known = row.loyalty is not None
        discordant = 1 - row.loyalty.label if row.loyalty is not None else 2 * test * (1 - test)
        text = power_statement(
            len(session.data.splits["test"]), discordant, estimated=not known, seeds=session.request.seeds
        )
        yield Finding("power", "note", f"{profile}, against the teacher: {text}")


def _hacking(stages: Sequence[StageResult], which: str = "") -> Iterator[Finding]:
    from targets.outcome import Finding

    for number, stage in enumerate(stages):
        path = stage.folder / "divergences.json"
        if path.is_file():
            verdict = json.loads(path.read_text())["verdict"]
            state = "alarm" if verdict["alarm"] else "clear"
            yield Finding(f"teacher hacking, stage {number} ({stage.stage}){which}", state, str(verdict["text"]))
