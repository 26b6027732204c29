"""``manifest.json``: everything a program needs to know to run a packaged model, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from compressor.config import Frozen
from compressor.types import Artifact, Figure, Measurement, TensorSpec
from targets.outcome import Row

MANIFEST_VERSION = "1.1"
Postprocess = Literal[
    "softmax",
    "probabilities",
    "sigmoid",
    "independent-probabilities",
    "tags",
    "next-token",
    "target-text",
    "embedding",
    "none",
]


class Tensor(Frozen):
    """An input or output. A dynamic dimension is a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @classmethod
    def of(cls, spec: TensorSpec) -> Tensor:
        return cls(name=spec.name, dtype=spec.dtype, shape=spec.shape)


class Model(Frozen):
    """The file that ships. ``portable`` is an ONNX file of the same weights, the same file where that is what ships."""

    name: str
    file: str
    format: Literal["onnx", "ort", "tensorrt-engine", "other"]
    runtime: str  # the target that runs it
    portable: str
    precision: str
    parameters: int
    quantization: dict[str, str]  # empty for fp32
    companions: tuple[str, ...] = ()  # files that must lie beside it


class Runtime(Frozen):
    """Settings of ONNX Runtime under which the figures were taken."""

    threads: int = 1
    graph_level: Literal["disabled", "basic", "extended", "all"] = "all"
    arena: bool = True


class Measured(Frozen):
    """A number and where it comes from."""

    value: float
    unit: str
    origin: Literal["measured", "proxy", "simulated", "estimated"]
    device: str
    detail: dict[str, float | int | str]


class Absent(Frozen):
    """A number that could not be had, and why."""

    unavailable: str
    hint: str = ""


class Output(Frozen):
    """What the first output means.

    ``softmax``: logits of one class; ``probabilities``: of one class, already; ``sigmoid``: logits of several labels;
    ``independent-probabilities``: of several labels, already; ``tags``: logits of a class for each token, of which the
    first of each word counts; ``next-token``: logits of the next token at each token; ``target-text``:
    the same of a target, for a source; ``embedding``: a unit vector.
    """

    kind: Postprocess


class SelfCheck(Frozen):
    """How far answers may be from the stored ones, relative to the largest of them, and why that far."""

    samples: int
    tolerance: float
    why: str


class FileEntry(Frozen):
    """A file of the package."""

    sha256: str
    bytes: int


class Manifest(Frozen):
    """The whole file. Readers refuse another major version."""

    manifest_version: str = MANIFEST_VERSION
    name: str
    profile: str
    title: str
    target: str
    device: str
    created: str
    run: str  # digest of the run
    task: str
    metric: str
    model: Model
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    preprocess: dict[str, Any]  # kind = image, text or raw, with its settings
    postprocess: Output
    labels: tuple[str, ...]
    runtime: Runtime
    promise_kept: bool
    verdict: str
    figures: dict[str, Measured | Absent]
    self_check: SelfCheck
    teacher: dict[str, str]  # source, digest, licence, revision
    teachers: tuple[dict[str, str], ...] = ()  # all of a panel, with weight and view
    platforms: tuple[str, ...] = ("python",)  # sample programs in the package, a folder each
    versions: dict[str, str]
    files: dict[str, FileEntry]  # all but manifest.json and SHA256SUMS


def figures_of(row: Row) -> dict[str, Measured | Absent]:
    """The figures of the shipped row with their origins."""
    names = ("validation", "test", "latency", "speedup", "file_bytes", "peak_memory")
    return {name: _figure(getattr(row, name)) for name in names}


def _figure(figure: Figure) -> Measured | Absent:
    if not isinstance(figure, Measurement):
        return Absent(unavailable=figure.reason or "no reason was recorded", hint=figure.hint)
    return Measured(
        value=figure.value,
        unit=figure.unit,
        origin=figure.origin.value,
        device=figure.device,
        detail=dict(figure.detail),
    )


def quantization_of(artifact: Artifact) -> dict[str, str]:
    """The scheme, with the precision, or nothing for fp32."""
    return {} if artifact.precision == "fp32" else {"precision": artifact.precision, **artifact.scheme}


def tolerance_of(artifact: Artifact) -> tuple[float, str]:
    """Accepted relative difference of the self-check.

    Float kernels differ in the order of their sums, a few units in the last place per layer; int8 kernels of another
    processor may round a quantization step differently, and steps add up through the layers.
    """
    if artifact.precision.startswith("int"):
        return 0.05, "int8 kernels of other processors round differently"
    return 1e-4, "float kernels of other processors sum in another order"


def runtime_of(row: Row, settings: Mapping[str, Any] | None) -> Runtime:
    """The profile's runtime table when it is given, otherwise the threads of the measurement."""
    if settings is not None:
        return Runtime(**{key: value for key, value in settings.items() if key in Runtime.model_fields})
    detail = row.latency.detail if isinstance(row.latency, Measurement) else {}
    return Runtime(threads=max(1, int(detail.get("threads", 1))))
