"""Run a model piece by piece over the calibration data: only the pieces' weights are in memory, never the model.

What is still needed behind a piece lies on disk, one file per tensor and batch. Pieces are cut on demand: to see a
tensor, just the nodes it depends on are run, each once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from compressor.errors import StageError, sdk_errors
from compressor.quantize.watch import Calibration, chunks
from compressor.quantize.weights.methods import Inputs
from compressor.types import Array

MASK = "attention_mask"  # padded positions teach a layer nothing
TINY = 1e-12  # positions that are zero stay zero
LARGE = 2**20  # bytes; bigger float weights are fed like inputs, which copies nothing


class Stream:
    """One pass over a graph whose nodes may be rewritten once they are due.

    ``read`` gives a stored tensor by name. Raises :class:`StageError` for empty data and for pieces that do not run.
    """

    def __init__(
        self, model: ModelProto, stored: Callable[[str], bool], read: Callable[[str], Array], calibration: Calibration,
        work: Path,
    ) -> None:  # fmt: skip
        self._model, self._stored, self._read, self._work = model, stored, read, work
        self._maker = {name: node for node in model.graph.node for name in node.output if name}
        self._order = {id(node): place for place, node in enumerate(model.graph.node)}
        self._done: set[int] = set()
        self._files: dict[str, list[Path]] = {}
        self._count = 0
        self._masks: list[Array | None] = []
        fed = {value.name for value in model.graph.input}
        for inputs in chunks(calibration):
            mask = inputs.get(MASK)
            self._masks.append(None if mask is None or mask.all() else mask.astype(bool))
            for name, array in inputs.items():
                if name in fed:
                    self._keep(name, array)
        if not self._masks:
            raise StageError("there is no calibration data", hint="Raise `data.calibration`, or give more samples.")

    def inputs(self, name: str) -> Inputs:
        """What calibration says of a tensor whose last axis counts a layer's input channels.

        Every position counts as much as any other: language models have a few (the first token) whose values are
        hundreds of times the rest's and would decide alone (perplexity 170 instead of 107 with fitted scales).
        """
        self._until(name)
        gram: Array | None = None
        total, rows = np.zeros(0, np.float32), 0
        for array, mask in zip(self._load(name), self._masks, strict=True):
            fits = mask is not None and mask.shape == array.shape[:-1]
            flat = np.asarray(array[mask] if fits else array.reshape(-1, array.shape[-1]), np.float32)
            flat = flat / np.maximum(np.sqrt(np.mean(flat**2, axis=1, keepdims=True)), TINY)
            made = flat.T @ flat
            gram = made if gram is None else np.add(gram, made, out=gram)
            size = np.abs(flat).sum(axis=0)
            total, rows = total + size if rows else size, rows + len(flat)
        assert gram is not None
        return Inputs(gram, total / max(1, rows))

    def divide(self, name: str, factor: Array) -> None:
        """Divide a tensor's last axis, as what makes it does from now on."""
        for path in self._files[name]:
            np.save(path, np.load(path) / factor)

    def _until(self, name: str) -> None:
        """Run what the tensor depends on, and forget what nothing else needs."""
        piece = self._due(name)
        if piece:
            self._run(piece, name)
        waiting = {read for node in self._model.graph.node if id(node) not in self._done for read in reads(node)}
        for gone in [known for known in self._files if known not in waiting and known != name]:
            for path in self._files.pop(gone):
                path.unlink()

    def _due(self, name: str) -> list[NodeProto]:
        found: dict[int, NodeProto] = {}
        pending = [name]
        while pending:
            node = self._maker.get(pending.pop())
            if node is not None and id(node) not in found and id(node) not in self._done:
                found[id(node)] = node
                pending += reads(node)
        return sorted(found.values(), key=lambda node: self._order[id(node)])

    def _run(self, piece: list[NodeProto], wanted: str) -> None:
        inside = {name for node in piece for name in node.output}
        taken = {name for node in piece for name in reads(node)} - inside
        self._done |= {id(node) for node in piece}
        after = {read for node in self._model.graph.node if id(node) not in self._done for read in reads(node)}
        outputs = sorted(inside & (after | {wanted}) - {""})
        fed = sorted(taken & set(self._files))
        weights = {name: self._read(name) for name in sorted(taken) if self._stored(name)}
        big = {name: array for name, array in weights.items() if array.dtype == np.float32 and array.nbytes > LARGE}
        small = [numpy_helper.from_array(array, name) for name, array in weights.items() if name not in big]
        first = {name: np.load(self._files[name][0], mmap_mode="r") for name in fed}
        session = self._session(piece, {**first, **big}, outputs, small)
        del weights, small
        for place in range(len(self._masks)):
            given = {name: np.load(self._files[name][place]) for name in fed}
            with sdk_errors(StageError, f"run the layers before `{wanted}` on calibration data", hint="Do they fit?"):
                for name, array in zip(outputs, session.run(outputs, {**given, **big}), strict=True):
                    self._keep(name, array)

    def _session(self, piece: list[NodeProto], fed: Mapping[str, Array], outputs: list[str], weights: Any) -> Any:
        """ONNX Runtime on these nodes alone, without arenas that would keep a piece's memory for the next."""
        import onnxruntime

        graph = GraphProto(name="piece", node=piece, initializer=weights)
        for name, array in fed.items():
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            graph.input.append(helper.make_tensor_value_info(name, kind, [None] * array.ndim))
        graph.output.extend(helper.make_empty_tensor_value_info(name) for name in outputs)
        model = ModelProto(ir_version=self._model.ir_version, graph=graph, functions=self._model.functions)
        model.opset_import.extend(self._model.opset_import)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        with sdk_errors(StageError, f"load the layers before `{outputs[0]}`", hint="Does the fp32 file run here?"):
            content = model.SerializeToString()
            return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def _keep(self, name: str, array: Array) -> None:
        path = self._work / f"{self._count}.npy"
        self._count += 1
        np.save(path, array)
        self._files.setdefault(name, []).append(path)

    def _load(self, name: str) -> Iterator[Array]:
        for path in self._files[name]:
            yield np.load(path)


def reads(node: NodeProto) -> list[str]:
    """Names a node reads, those of its nested graphs from outside included."""
    found = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            own = {name for inner in graph.node for name in inner.output}
            own |= {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
            wanted = [name for inner in graph.node for name in reads(inner)] + [value.name for value in graph.output]
            found += [name for name in wanted if name not in own]
    return found
