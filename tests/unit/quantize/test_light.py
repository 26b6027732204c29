"""The post-training path must work where torch is not installed."""

import subprocess
import sys

SCRIPT = """
import sys
import compressor.quantize, compressor.export.facts, compressor.export.onnx
import compressor.export.optimise, compressor.export.verify
heavy = {"torch", "transformers", "nncf", "datasets", "PIL", "onnxscript", "onnxruntime"} & set(sys.modules)
assert not heavy, heavy
"""


def test_importing_export_and_quantize_brings_no_heavy_library():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=120)
