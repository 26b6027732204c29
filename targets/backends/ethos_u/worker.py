"""Runs in the environment of the tool chain ``ethos-u`` (see targets/toolchains/runner.py): one call of Vela."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """``smoke``: import the compiler, read its version. ``compile``: run Vela with ``arguments``, return its words."""
    from ethosu.vela import vela

    if request["action"] == "smoke":
        return {"version": version("ethos-u-vela"), "accelerators": vela.__name__}
    with _spoken() as words:
        code = _code(vela.main, list(request["arguments"]))
    text = "".join(words)
    if code:
        raise RuntimeError(f"vela ended with code {code}: {text.strip()[-600:]}")
    return {"text": text, "version": version("ethos-u-vela")}


def _code(main: Any, arguments: list[str]) -> int:
    try:
        return int(main(arguments) or 0)
    except SystemExit as stop:  # argparse and some of Vela's refusals
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


@contextmanager
def _spoken() -> Iterator[list[str]]:
    """Everything written to stdout and stderr inside, by Vela's C++ part too."""
    words: list[str] = []
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        try:
            yield words
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            stream.seek(0)
            words.append(stream.read().decode("utf-8", "replace"))
