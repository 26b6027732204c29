"""Runs in a tool chain's own environment: the standard library and what the worker script imports, nothing else.

``python -I runner.py WORKER.py`` reads one JSON request from stdin, calls ``answer(request)`` of the worker and writes
one JSON reply to stdout. With ``{"action": "stay"}`` it stays and answers one request per line until stdin ends.
Whatever else is printed, by C code too, goes to stderr. What the worker raises becomes ``{"ok": false, "error": ...}``.

Our own packages can be imported, so that a worker may consist of several modules; what lies beside them where they are
installed cannot.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _offer_own_packages() -> None:
    """``compressor`` and ``targets`` by the folders they lie in, without their parent folder on the search path."""
    root = Path(__file__).resolve().parents[2]
    for name in ("compressor", "targets"):
        folder = root / name
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


def _load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("worker", Path(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _reply(worker: Any, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"ok": True, **worker.answer(request)}
    except Exception as error:  # noqa: BLE001  a vendor's library may raise anything; the parent makes it a typed error
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}


def main(path: str) -> int:
    """Serve the worker at ``path``."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _offer_own_packages()
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker: Any = None
    staying = False
    with stream:
        for line in sys.stdin:
            request = json.loads(line)
            if request.get("action") == "stay":
                staying = True
                continue
            worker = worker or _load(path)
            stream.write(json.dumps(_reply(worker, request)) + ("\n" if staying else ""))
            stream.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
