"""The child process that compiles for the NPU: one JSON request on stdin, one JSON reply on stdout."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from targets.isolation import serve


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compile ``onnx`` with ``shapes`` for ``platform`` and write ``blob``."""
    import openvino

    core = openvino.Core()
    try:
        model = core.read_model(request["onnx"])
        model.reshape({name: list(shape) for name, shape in request["shapes"].items()})
        config = {"NPU_PLATFORM": request["platform"], "NPU_COMPILER_TYPE": "PLUGIN"}
        blob = core.compile_model(model, "NPU", config).export_model()
    except RuntimeError as error:  # all that OpenVINO raises
        return {"ok": False, "error": str(error)}
    Path(request["blob"]).write_bytes(bytes(blob))
    return {"ok": True, "operations": len(model.get_ordered_ops())}


if __name__ == "__main__":
    sys.exit(serve(answer))
