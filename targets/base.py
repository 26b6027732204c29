"""The interface of a target back end. ``backends/numpy_reference.py`` is the smallest: template and example."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from compressor.errors import ConfigError
from compressor.profile import HardwareProfile
from compressor.types import Array, Artifact, Format, Measurement, Origin
from targets.static_graph import UNQUANTIZED as UNQUANTIZED


@dataclass(frozen=True)
class Ready:
    """The tool chain works here. ``runs`` is the origin of figures taken here; None: it compiles but cannot run."""

    device: str
    versions: Mapping[str, str]
    runs: Origin | None
    attached: bool = False  # the profile's own device is reached from here: figures are the device's
    why_not: str = ""  # when ``runs`` is None: the reason, for the report


@dataclass(frozen=True)
class Missing:
    """Not even compiling works here."""

    reason: str
    hint: str


@dataclass(frozen=True)
class NodeFact:
    """One node of the graph that the runtime really runs."""

    name: str
    operator: str
    quantized: bool
    reason: str = ""  # why a Conv, Gemm or MatMul stayed float


@dataclass(frozen=True)
class Coverage:
    """Kernel coverage: of the Conv/Gemm/MatMul in the graph the runtime really runs, how many run quantized."""

    quantized: int
    total: int
    left_float: tuple[NodeFact, ...] = ()


@dataclass(frozen=True)
class OverLimit:
    """A limit of the device that the compiled file misses. ``gap`` is how far, relative to the limit."""

    what: str
    gap: float


@dataclass(frozen=True)
class Compiled:
    """What a compiler made of an artifact. ``placed`` operations run on the device, ``fallback`` ones on the host."""

    path: Path
    artifact: Artifact
    placed: int
    fallback: tuple[str, ...] = ()
    estimates: tuple[Measurement, ...] = ()
    coverage: Coverage | None = None
    compile_seconds: float = 0.0
    notes: tuple[str, ...] = ()
    extra_files: tuple[Path, ...] = field(default=())  # go into the package beside ``path``
    source_files: tuple[Path, ...] = field(default=())  # go there too, but are not what the device stores
    over: tuple[OverLimit, ...] = field(default=())  # memory of the device that it does not fit: the gate rejects it


class Session(Protocol):
    """A loaded model. ``run`` returns every output by name; it must not keep references to its inputs."""

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]: ...


@runtime_checkable
class SelfTimed(Session, Protocol):
    """A session whose model runs where this process's clock does not reach: in a browser, on a board."""

    def times_ns(self, inputs: Mapping[str, Array], count: int) -> Sequence[int]:
        """Run ``count`` times on the same inputs; how long each run took over there, in ns."""
        ...


@runtime_checkable
class SelfWeighed(Session, Protocol):
    """A session whose model lives in a process of its own, which tells what it takes."""

    def resident_mib(self) -> tuple[float, float]:
        """Resident memory of that process in MiB: with the runtime, before it loaded the model; the highest so far."""
        ...


def option_problems(read: Callable[[HardwareProfile], object], profile: HardwareProfile) -> tuple[str, ...]:
    """What ``read``, a back end's reader of a profile's ``[options]``, finds wrong with them; empty: nothing."""
    try:
        read(profile)
    except ConfigError as error:
        return tuple(f"options.{problem}" for problem in error.problems)
    return ()


class TargetBackend(abc.ABC):
    """One runtime or compiler. SDK imports stand inside the methods; only ``measure.py`` measures time."""

    name: ClassVar[str]
    accepts: ClassVar[frozenset[Format]]
    summary: ClassVar[str]  # one line for `compress-for-device targets`
    memory_apart: ClassVar[str] = ""  # why the memory of this process says nothing about the model; empty: it does
    float_error: ClassVar[float] = 1e-4  # relative, of a float32 file; larger where it is computed in float16

    @abc.abstractmethod
    def probe(self) -> Ready | Missing:
        """Say what works on this machine. Cheap; never raises."""

    def check(self, artifact: Artifact, profile: HardwareProfile) -> tuple[str, ...]:
        """What the compiler would refuse in this artifact, in words that name the node. Empty: nothing known."""
        return ()

    def deciding_options(self, compiled: Compiled, profile: HardwareProfile) -> Mapping[str, Any]:
        """The options that answers depend on: where they are equal, profiles share what a file answered."""
        longest = profile.runtime.max_sequence  # files with fixed shapes pad to it
        return {**profile.options, **({} if longest is None else {"longest": longest})}

    def entrants(self, artifact: Artifact, profile: HardwareProfile) -> tuple[Artifact, ...]:
        """The artifact as it takes part: itself, or in a race once per runtime, with ``runtime`` and its own name."""
        return (artifact,)

    def resolve(self, artifact: Artifact, profile: HardwareProfile) -> tuple[str, HardwareProfile]:
        """Name and profile of the target that really runs ``artifact``: this one, or in a race the runtime's."""
        return self.name, profile

    @abc.abstractmethod
    def compile(self, artifact: Artifact, profile: HardwareProfile, out: Path) -> Compiled:
        """Make the device's file in folder ``out``. Raises :class:`compressor.errors.CompileError`."""

    @abc.abstractmethod
    def open(self, compiled: Compiled, profile: HardwareProfile) -> AbstractContextManager[Session]:
        """Load the compiled model. Raises :class:`compressor.errors.RunError` (also where ``probe().runs`` is None)."""
