"""The child process that touches the vendor's library: one JSON request on stdin, one JSON reply on stdout.

A build may take minutes, gigabytes or the whole process with it (the enterprise runtime ends in SIGSEGV without a
driver), and Myelin writes to the C level's stderr. None of that may happen in the process that trains and measures.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from targets.backends.tensorrt.builder import Journal, RefusalError, build, load_module
from targets.isolation import serve


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Serve one request: ``{"do": "version"}`` or ``{"do": "build", ...}`` (see :func:`builder.build`)."""
    try:
        trt = load_module(request["flavour"])
    except ImportError as error:
        return {"ok": False, "stage": "import", "error": str(error), "nodes": []}
    if request["do"] == "version":
        return {"ok": True, "version": trt.__version__}
    journal = Journal()
    try:
        return {"ok": True, **build(trt, request, journal)}
    except RefusalError as error:
        return {"ok": False, "stage": error.stage, "error": str(error), "nodes": [dict(node) for node in error.nodes]}
    except OSError as error:
        return {"ok": False, "stage": "write", "error": str(error), "nodes": []}


if __name__ == "__main__":
    sys.exit(serve(answer))
