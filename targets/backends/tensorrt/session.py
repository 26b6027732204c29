"""Execute an engine on a GPU.

Written against the bindings' API; it runs only where :func:`cuda.probe_cuda` finds a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from compressor.errors import RunError, sdk_errors
from compressor.types import Array
from targets.backends.tensorrt.builder import Journal, make_logger
from targets.backends.tensorrt.cuda import DeviceMemory, Gpu


class EngineSession:
    """A deserialised engine with one execution context (profile 0) and buffers that are reused between calls."""

    def __init__(self, trt: Any, engine: Any, memory: DeviceMemory, journal: Journal) -> None:
        self._trt = trt
        self._engine = engine
        self._memory = memory
        self._journal = journal
        self._context = engine.create_execution_context()
        if self._context is None:
            raise RunError("no execution context: " + _reasons(journal))
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = tuple(name for name in names if is_input[name])
        self.outputs = tuple(name for name in names if not is_input[name])

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Copy in, execute, copy out.

        Raises RunError for missing inputs and for shapes outside the optimisation profile.
        """
        with sdk_errors(RunError, "execute the engine"):
            kept = [self._bind_input(name, inputs) for name in self.inputs]
            results = self._bind_outputs()
            if not self._context.execute_async_v3(self._memory.stream):
                raise RunError("execution failed: " + _reasons(self._journal))
            for name, array in results.items():
                self._memory.download(name, array)
            self._memory.synchronize()
            del kept  # host arrays must outlive the asynchronous copies
            return results

    def close(self) -> None:
        """Let the execution context go before its buffers do."""
        self._context = None

    def _bind_input(self, name: str, inputs: Mapping[str, Array]) -> Array:
        if name not in inputs:
            raise RunError(f"input `{name}` is missing", hint=f"The engine wants {', '.join(self.inputs)}.")
        array = np.ascontiguousarray(inputs[name], dtype=self._trt.nptype(self._engine.get_tensor_dtype(name)))
        if not self._context.set_input_shape(name, array.shape):
            raise RunError(
                f"input `{name}` of shape {array.shape} is outside the optimisation profile",
                hint="Raise `max_batch`, `max_sequence` or `shapes` in the profile's options and compile again.",
            )
        self._context.set_tensor_address(name, self._memory.upload(name, array))
        return array

    def _bind_outputs(self) -> dict[str, Array]:
        unknown = self._context.infer_shapes()
        if unknown:
            raise RunError(f"shapes of {', '.join(unknown)} cannot be inferred")
        results: dict[str, Array] = {}
        for name in self.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            if -1 in shape:
                raise RunError(f"output `{name}` has a shape that depends on the data: {shape}")
            results[name] = np.empty(shape, dtype=self._trt.nptype(self._engine.get_tensor_dtype(name)))
            self._context.set_tensor_address(name, self._memory.reserve(name, results[name].nbytes))
        return results


def _reasons(journal: Journal) -> str:
    return "; ".join(journal.errors) or "the runtime gave no reason"


def check_validity(trt: Any, runtime: Any, plan: bytes) -> None:
    """RTX says before loading whether an engine fits this GPU and this release."""
    validity, diagnostics = runtime.get_engine_validity(plan)
    if validity == trt.EngineValidity.INVALID:
        raise RunError(
            f"the engine does not fit this GPU, driver or TensorRT-RTX release (diagnostics {int(diagnostics):#x})",
            hint="Engines are tied to the exact TensorRT-RTX release and to compute.capability: compile again here.",
        )


@contextmanager
def open_engine(trt: Any, path: Path, gpu: Gpu, flavour: str) -> Iterator[EngineSession]:
    """Load an engine file. Call only with a GPU that ``probe_cuda`` found."""
    journal = Journal()
    plan = path.read_bytes()
    with DeviceMemory(gpu) as memory:
        with sdk_errors(RunError, f"load `{path.name}`"):
            runtime = trt.Runtime(make_logger(trt, journal))
            if flavour == "rtx":
                check_validity(trt, runtime, plan)
            engine = runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise RunError("the engine cannot be deserialised: " + _reasons(journal))
            session = EngineSession(trt, engine, memory, journal)
        try:
            yield session
        finally:
            session.close()
