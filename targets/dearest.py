"""Where a quantized file loses its time: the runtime's own times of every node, beside those of the float file.

"Slower than fp32" alone tells no one what to change; the operators that cost more in int8 do, and their nodes by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from compressor.errors import CompressError
from compressor.profile import HardwareProfile
from compressor.types import Array, Inputs
from targets import registry
from targets.base import Compiled
from targets.outcome import Row, State
from targets.trial import Deployment, latency_inputs

NodeTimes = Mapping[str, tuple[str, float]]  # node -> (operator, milliseconds)
SLOWER = "slower than fp32"
SHOWN = 2  # operators, and nodes of each
LEAST_SHARE = 0.05  # of the float file's time: less is not worth a name


@runtime_checkable
class TimesNodes(Protocol):
    """A back end whose runtime tells how long each node takes."""

    def node_times(self, compiled: Compiled, profile: HardwareProfile, inputs: Mapping[str, Array]) -> NodeTimes:
        """Median per node over some runs, the names as in the compiled file. Raises :class:`RunError`."""
        ...


def with_nodes(run: Deployment, rows: Sequence[Row]) -> tuple[Row, ...]:
    """``rows``; the reason of one that is slower than its float file names the nodes where that time goes."""
    plain = next((row for row in rows if row.artifact.role == "student" and row.artifact.precision == "fp32"), None)
    if plain is None or not any(SLOWER in row.reason for row in rows):
        return tuple(rows)
    before = _times(run, plain)
    return tuple(_named(run, row, before) if before and SLOWER in row.reason else row for row in rows)


def _named(run: Deployment, row: Row, before: NodeTimes) -> Row:
    told = lost_in(_times(run, row), before)
    return replace(row, reason=f"{row.reason}; {told}") if told else row


def _times(run: Deployment, row: Row) -> NodeTimes:
    """Empty where the runtime does not tell, or the device is not here."""
    name, profile = run.backend.resolve(row.artifact, run.profile)
    backend = registry.get(name)
    here = run.site is not None and run.site.state is State.EXECUTED
    if not here or row.compiled is None or not isinstance(backend, TimesNodes) or not run.data.latency_inputs:
        return {}
    sample: Inputs = latency_inputs(run, row.artifact)[0]
    try:
        return backend.node_times(row.compiled, profile, sample)
    except CompressError:
        return {}


def lost_in(quantized: NodeTimes, plain: NodeTimes) -> str:
    """The operators that take longer than in float, the most first, with their slowest nodes; empty: none by much.

    >>> lost_in({"m": ("QLinearMul", 0.5), "c": ("QLinearConv", 1.0)}, {"m": ("Mul", 0.1), "c": ("Conv", 2.0)})
    'lost in Mul (0.50 ms, in float 0.10; `m`)'
    """
    after, before = _sums(quantized), _sums(plain)
    least = LEAST_SHARE * sum(before.values())
    more = {name: time - before.get(name, 0.0) for name, time in after.items()}
    worst = [name for name in sorted(more, key=lambda name: -more[name])[:SHOWN] if more[name] > least]
    told = []
    for name in worst:
        nodes = sorted(
            (node for node in quantized if _family(quantized[node][0]) == name), key=lambda n: -quantized[n][1]
        )
        listed = ", ".join(f"`{node}`" for node in nodes[:SHOWN])
        told.append(f"{name} ({after[name]:.2f} ms, in float {before.get(name, 0.0):.2f}; {listed})")
    return f"lost in {' and '.join(told)}" if told else ""


def _sums(times: NodeTimes) -> dict[str, float]:
    found: dict[str, float] = {}
    for operator, time in times.values():
        found[_family(operator)] = found.get(_family(operator), 0.0) + time
    return found


def _family(operator: str) -> str:
    """The standard's operator that a fused or quantized one stands for."""
    return operator.removeprefix("QLinear").removeprefix("Fused")
