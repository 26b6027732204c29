"""Check an ONNX file in a process of its own: ``python -m compressor.models.onnx_probe MODEL``.

The checker and ONNX Runtime are C++ code that reads a file nobody vouches for; if it crashes or hangs, only this child
dies. Prints one JSON object: ``{"inputs": [...], "outputs": [...], "fault": text}``, or ``{"error": kind, "message":
text}``.

A file that the checker faults but ONNX Runtime accepts is kept, with the fault as a note: files in the wild break rules
that no runtime minds (an output without a shape, a node out of order).
"""

from __future__ import annotations

import json
import sys
from typing import Any


def probe(path: str) -> dict[str, Any]:
    """What ONNX Runtime makes of the file, without optimising it (so that nothing is folded or unrolled)."""
    import onnx
    import onnxruntime

    fault = ""
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        fault = str(error)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - pybind raises eleven unrelated classes, all derived from Exception only
        return {"error": type(error).__name__, "message": fault or str(error)}
    return {
        "fault": fault,
        "inputs": [[value.name, value.type, value.shape] for value in session.get_inputs()],
        "outputs": [[value.name, value.type, value.shape] for value in session.get_outputs()],
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe(sys.argv[1])))
