"""What timing needs of the operating system: clocks, a core of its own, a place at the head of the queue."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

try:
    import resource
except ImportError:  # not a POSIX system: preemption cannot be seen there
    resource = None  # type: ignore[assignment]

Priority = Literal["real-time", "normal"]


class Clock(Protocol):
    """Injectable, so that the timing loop is tested without waiting."""

    def now_ns(self) -> int:
        """Wall-clock time."""
        ...

    def cpu_ns(self) -> int:
        """CPU time of all threads of this process."""
        ...

    def preemptions(self) -> int:
        """How often a thread of this process lost its core against its will."""
        ...

    def load(self) -> float:
        """Mean number of runnable tasks of the last minute."""
        ...


class SystemClock:
    """The real one."""

    def now_ns(self) -> int:
        return time.perf_counter_ns()

    def cpu_ns(self) -> int:
        return time.process_time_ns()

    def preemptions(self) -> int:
        return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw

    def load(self) -> float:
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


@contextlib.contextmanager
def pinned(cores: int) -> Iterator[tuple[int, ...]]:
    """Keep this thread, and threads started inside, on ``cores`` cores; yields which (empty: the system has no
    pinning).

    The last usable cores are taken: the first ones handle most interrupts. Sessions must be opened inside.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield ()
        return
    before = os.sched_getaffinity(0)
    chosen = tuple(sorted(before)[-max(1, min(cores, len(before))) :])
    os.sched_setaffinity(0, chosen)
    try:
        yield chosen
    finally:
        os.sched_setaffinity(0, before)


def available_priority() -> Priority:
    """``real-time`` where this process may ask for it (root, or CAP_SYS_NICE)."""
    try:
        with real_time("real-time"):
            return "real-time"
    except OSError:
        return "normal"


@contextlib.contextmanager
def real_time(priority: Priority) -> Iterator[None]:
    """Round-robin real-time scheduling for every thread of this process, for the few ms of one turn.

    On a shared machine this is what keeps other processes out of a measurement; the kernel still leaves them 5 % of
    each second. Does nothing for ``normal``. Raises OSError where it is not permitted.
    """
    if priority == "normal":
        yield
        return
    if not hasattr(os, "sched_setscheduler"):
        raise OSError("no scheduler control on this system")
    threads = _threads()
    before = {}
    real = os.sched_param(os.sched_get_priority_min(os.SCHED_RR))
    try:
        for thread in threads:
            with contextlib.suppress(ProcessLookupError):  # threads of other libraries come and go meanwhile
                before[thread] = (os.sched_getscheduler(thread), os.sched_getparam(thread))
                os.sched_setscheduler(thread, os.SCHED_RR, real)
        yield
    finally:
        for thread, (policy, parameter) in before.items():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setscheduler(thread, policy, parameter)


def _threads() -> tuple[int, ...]:
    tasks = Path("/proc/self/task")
    return tuple(int(entry.name) for entry in tasks.iterdir()) if tasks.is_dir() else (0,)
