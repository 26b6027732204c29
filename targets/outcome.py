"""What came out for one profile: pure values that the report and the packages are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from compressor.types import Artifact, Figure, Measurement, StageResult
from targets.base import Compiled, Coverage


class State(StrEnum):
    """How far a candidate came on a profile."""

    EXECUTED = "executed"  # compiled and run on the device itself (this machine)
    PROXY = "executed on a stand-in"  # compiled; run on a stand-in, accuracy is `proxy`
    COMPILED = "compiled, not run here"
    FAILED = "failed"  # the compiler or the runtime refused it: see reason
    UNAVAILABLE = "unavailable"  # the tool chain is missing: see reason


@dataclass(frozen=True)
class Promise:
    """What the user accepts (from the recipe's ``[accept]``). None: no limit."""

    max_drop: float | None = 0.01  # absolute loss of the task metric against the teacher
    max_latency_ms: float | None = None
    max_size_mib: float | None = None
    min_speedup: float | None = None


@dataclass(frozen=True)
class Loyalty:
    """Agreement with the teacher on the same samples, both in 0..1 (M1: beyond-preserved-accuracy).

    ``label``: share of equal argmax. ``probability``: mean of 1 - sqrt(Jensen-Shannon divergence, natural log).
    """

    label: float
    probability: float


@dataclass(frozen=True)
class Nearness:
    """What the compiled file answers beside ONNX Runtime, here, on the ONNX file that it was compiled from."""

    worst: float  # largest absolute difference of an output
    reach: float  # largest absolute value of ONNX Runtime's outputs
    samples: int  # of the test set
    argmax: float | None = None  # share of samples of the same class, 0..1; None: the outputs are no classes


@dataclass(frozen=True)
class Row:
    """One artifact on one profile: a line of the report's table.

    ``latency`` is p50 in ms; its detail holds p90 p95 p99 mean ci95_low ci95_high rounds samples threads batch.
    ``speedup`` is the median over rounds of (teacher fp32 p50 / this p50) in the same round. Accuracies are the task's
    metric (0..1). ``test`` stays Unavailable for candidates that were not chosen: the test set is touched once.
    """

    artifact: Artifact
    state: State
    validation: Figure
    test: Figure
    latency: Figure
    speedup: Figure
    file_bytes: Figure
    peak_memory: Figure  # MiB, of a process that loads and runs only this model
    loyalty: Loyalty | None = None  # to the teacher, on the test set
    regression_loyalty: float | None = None  # nearness to the teacher's similarities, or its likelihoods of texts, 0..1
    agreement: float | None = None  # argmax equal to the same role's fp32 file, on the test set
    nearness: Nearness | None = None  # None: not tested, or ONNX Runtime here is what ran it
    compiled: Compiled | None = None
    coverage: Coverage | None = None
    shipped: bool = False
    reason: str = ""  # why it was rejected, why it ships, or why it has no figures

    @property
    def estimate(self) -> Measurement | None:
        """Latency in ms by the compiler's model of the device, where it has one; its detail says what was counted."""
        found = self.compiled.estimates if self.compiled is not None else ()
        return next((figure for figure in found if figure.unit == "ms"), None)


@dataclass(frozen=True)
class ProfileOutcome:
    """All rows of one profile and the decision of the never-worse gate."""

    profile: str
    title: str
    target: str
    device: str
    rows: tuple[Row, ...]  # teacher first, then null twin, then student fp32 and its variants
    promise: Promise
    kept: bool  # does what ships keep the promise?
    verdict: str  # one sentence for people
    missing: str = ""  # non-empty: the wanted target is not here (exit code 4)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def shipped(self) -> Row | None:
        return next((row for row in self.rows if row.shipped), None)


@dataclass(frozen=True)
class ParityRow:
    """Exported ONNX against the torch module, per output, over real samples."""

    artifact: str
    output: str
    worst: float  # largest absolute difference
    tolerance: float
    samples: int
    passed: bool


@dataclass(frozen=True)
class DataFacts:
    """The cut of the data: sizes and digests per split, and what the contamination check found."""

    source: str
    sizes: Mapping[str, int]
    digests: Mapping[str, str]
    duplicates_dropped: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What one integrity check says: ``clear``, a ``note`` to keep in mind, or an ``alarm``."""

    check: str
    state: str
    text: str


@dataclass(frozen=True)
class SeedRow:
    """Exported fp32 student and null twin of one seed, scored by the same runtime. ``stages``: in the store."""

    seed: int
    student_validation: Figure
    twin_validation: Figure
    student_test: Figure
    twin_test: Figure
    stages: tuple[str, ...] = ()


@dataclass(frozen=True)
class PairedSeeds:
    """Student against null twin over paired seeds: both arms of a seed share data, order, steps and first weights.

    ``mean``, ``low`` and ``high`` (90 % t-interval) are of student minus twin on ``split``, in the task's metric; for a
    perplexity in the mean log-likelihood of a token. None: not every seed has both figures, ``verdict`` says why.
    """

    profile: str  # whose runtime scored the files
    split: str  # that the verdict is on: test, or validation where nothing could be tested
    rows: tuple[SeedRow, ...]
    teacher_validation: Figure
    teacher_test: Figure
    wins: int
    verdict: str  # "5/5", "better", "no difference shown", "worse"
    mean: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class RunSummary:
    """Everything a report shows. ``recipe`` is the validated recipe as plain data."""

    name: str
    digest: str  # of recipe, profiles, model and data: the run folder's name
    created: str  # ISO 8601, UTC
    command: str
    task: str
    metric: str  # "accuracy", "Spearman against teacher"
    recipe: Mapping[str, Any]
    seed: int
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    teacher: Mapping[str, str]  # source, digest, licence, revision
    data: DataFacts
    stages: tuple[StageResult, ...]
    parity: tuple[ParityRow, ...]
    outcomes: tuple[ProfileOutcome, ...]
    rejected: Mapping[str, str] = field(default_factory=dict)  # variant never built -> why
    warnings: tuple[str, ...] = ()
    integrity: tuple[Finding, ...] = ()
    teachers: tuple[Mapping[str, str], ...] = ()  # further teachers, and views of their own
    paired_seeds: PairedSeeds | None = None  # of `run --seeds N`
