"""Ends a build of RKNN-Toolkit2 that runs in circles. Runs in the environment of the tool chain ``rknn``.

The toolkit rewrites the graph until no rule of its applies. Rules may undo each other (in version 2.5.0
``unsqueeze_to_4d_transpose`` and ``swap_reshape_transpose_v2`` at a quantized input of three dimensions); then its log
says the same few rewrites for ever. One of the rules has to be switched off.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_STEP = re.compile(r"^D\s+(\w+): remove node = \[(.*?)\](?:, add node = \[(.*)\])?$")
_STEPS, _DIFFERENT = 300, 20  # so many rewrites one after the other, of which so few at most are different
_TAIL_BYTES = 1 << 17
_LOOK_SECONDS = 0.5


class Stuck(BaseException):
    """Raised in the midst of the toolkit, which catches every ``Exception``.

    ``rules``: what to switch off, best first; ``said``: what happened.
    """

    def __init__(self, rules: Sequence[str], said: str) -> None:
        super().__init__(said)
        self.rules, self.said = tuple(rules), said


def circle_of(log: str) -> Stuck | None:
    """The circle that a log ends in, if it does.

    Only rules that add nodes keep a circle going; of these, one that takes away as much is missed least.
    """
    lines = log.splitlines()[-_STEPS - 1 : -1]  # the last one may be cut short
    steps = [step for line in lines if (step := _STEP.match(line))]
    different = {step[0]: step for step in steps}
    if len(steps) < _STEPS or len(different) > _DIFFERENT:
        return None
    adding = sorted((not step[2], step[1]) for step in different.values() if step[3])
    rules = tuple(dict.fromkeys(rule for _, rule in adding))
    nodes = sorted({name for step in different.values() for name in re.findall(r"'([^']+)'", step[2])})
    every = sorted({step[1] for step in different.values()})
    return Stuck(rules, f"its rules {', '.join(every)} undo each other around {', '.join(nodes[:6])}")


def _last_words(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return " / ".join(line[:160] for line in lines[-2:]) or "nothing"


@contextlib.contextmanager
def watched(log: int, deadline: float) -> Iterator[None]:
    """Look at the log (a file descriptor) now and then; raises :class:`Stuck` at the block for a circle, or when
    ``deadline`` (of ``time.monotonic``) has passed."""

    left = False

    def look(_number: int, _frame: Any) -> None:
        nonlocal left
        if left:  # an alarm that was on its way while the block ended
            return
        size = os.fstat(log).st_size
        start = max(0, size - _TAIL_BYTES)
        text = COLOURS.sub("", os.pread(log, size - start, start).decode("utf-8", "replace"))
        circle = circle_of(text)
        if circle is None and time.monotonic() > deadline:
            circle = Stuck((), f"it did not end in time; it said at last: {_last_words(text)}")
        if circle is not None:
            left = True
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise circle

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _LOOK_SECONDS, _LOOK_SECONDS)
    try:
        yield
    finally:
        left = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        # never back to the default: an alarm that another thread has still to take would end the process
        signal.signal(signal.SIGALRM, signal.SIG_IGN if before is signal.SIG_DFL else before)
