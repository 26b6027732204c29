"""The one exception tree.

    CompressError
    ├── ConfigError          a file, key or option is wrong                exit code 2
    │   └── PackageError         a package is not what was packed              2
    ├── PlanError            the request cannot be carried out (all problems at once)   2
    ├── StageError           a stage broke while running                   1
    └── TargetError          a device tool chain                           1
        ├── TargetUnavailable    it is not installed or cannot run here    4
        ├── CompileError         it refused the model                      1
        ├── RunError             the compiled model failed while running   1
        └── DeviceLost           an attached device does not answer any more   1

Every error carries a one-sentence ``hint``: what the user can do about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


class CompressError(Exception):
    """Root of every error this package raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a request: ``where`` names the key (``stage.0.prune.ratio``), file or input."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class ProblemList(CompressError):
    """An error that lists every problem found, so that the user mends them in one go."""

    exit_code = 2

    def __init__(self, subject: str, problems: Sequence[Problem], *, hint: str = "") -> None:
        self.subject = subject
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{subject} has {count} problem{'s' if count != 1 else ''}:"
        super().__init__("\n".join([head, *(f"  {problem}" for problem in self.problems)]), hint=hint)


class ConfigError(ProblemList):
    """A recipe, profile, manifest or option that does not validate."""

    @classmethod
    def single(cls, subject: str, where: str, what: str, *, hint: str = "") -> ConfigError:
        return cls(subject, [Problem(where, what)], hint=hint)


class PackageError(ConfigError):
    """A package, or a file of it, is damaged, missing, or not what was packed."""


class PlanError(ProblemList):
    """Recipe, profile, model and data do not fit together; raised before anything is computed."""

    @classmethod
    def single(cls, where: str, what: str, *, hint: str = "") -> PlanError:
        return cls("the plan", [Problem(where, what)], hint=hint)


class StageError(CompressError):
    """A stage failed while running (NaN loss, full disk); what was finished before stays usable."""


class TargetError(CompressError):
    """A device tool chain failed."""


class TargetUnavailable(TargetError):
    """The tool chain is not installed or cannot work on this machine."""

    exit_code = 4


class CompileError(TargetError):
    """The tool chain refused the model."""


class RunError(TargetError):
    """The compiled model failed while running."""


class DeviceLost(TargetError):
    """An attached device does not answer any more. It is no fault of a model: the run ends, and can be resumed."""


@contextmanager
def sdk_errors(kind: type[TargetError] | type[StageError], doing: str, *, hint: str = "") -> Iterator[None]:
    """Turn whatever a vendor SDK throws into ``kind``. The only broad ``except`` of the project.

    >>> with sdk_errors(CompileError, "parse the graph"):
    ...     raise RuntimeError("bad node")
    Traceback (most recent call last):
    compressor.errors.CompileError: could not parse the graph: RuntimeError: bad node
    """
    try:
        yield
    except CompressError:
        raise
    except Exception as error:
        raise kind(f"could not {doing}: {type(error).__name__}: {error}", hint=hint) from error
