"""The un-optimised int8 file in LiteRT's reference kernels: what Arm and TensorFlow call bit-exact.

Float files need no bits to be exact: the optimised kernels answer them, thirty times faster for a transformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.errors import RunError
from compressor.types import Array
from targets.tflite.interface import encode_all, read_interface


class ReferenceCall:
    """One run over ONNX inputs of exactly the file's shapes."""

    def __init__(self, path: Path, *, exact: bool = True) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        self.interface = read_interface(path)
        self.shapes = {port.name: port.onnx_shape for port in self.interface.inputs}
        kernels = OpResolverType.BUILTIN_REF if exact else OpResolverType.BUILTIN
        self._interpreter: Any = Interpreter(model_path=str(path), experimental_op_resolver_type=kernels)
        self._interpreter.allocate_tensors()
        runner = self._interpreter.get_signature_runner("serving_default")
        self._places = {name: item["index"] for name, item in runner.get_input_details().items()}
        self._results = {name: item["index"] for name, item in runner.get_output_details().items()}

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        try:
            for port, array in zip(self.interface.inputs, encode_all(self.interface, inputs), strict=True):
                self._interpreter.set_tensor(self._places[port.name], array)
            self._interpreter.invoke()
            return {
                port.name: port.decode(self._interpreter.get_tensor(self._results[port.name]))
                for port in self.interface.outputs
            }
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            raise RunError(f"could not run the model: {type(error).__name__}: {error}") from error
