"""The smallest back end: ONNX's own reference evaluator, in numpy. Template, test double and documentation.

A new back end is this file with another tool chain: say what works here (``probe``), refuse what cannot work before it
is tried (``check``), make the device's file (``compile``), load it (``open``). It never measures time. One line in
``pyproject.toml`` registers it: ``[project.entry-points."compress_for_device.targets"]``.

The evaluator executes the standard's definition of every operator, in Python: right but slow, hence the node limit.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from compressor.errors import CompileError, RunError, sdk_errors
from compressor.machine import detect
from compressor.profile import HardwareProfile
from compressor.types import Array, Artifact, Format, Origin
from targets.base import Compiled, Missing, Ready, Session, TargetBackend

NODE_LIMIT = 2000  # a graph of this size takes seconds a run in Python; a profile may set `node_limit` in [options]


class NumpyReference(TargetBackend):
    """Runs any standard ONNX graph by the book."""

    name: ClassVar[str] = "numpy-reference"
    accepts: ClassVar[frozenset[Format]] = frozenset({Format.ONNX})
    summary: ClassVar[str] = "ONNX's reference evaluator in numpy: exact, slow; for checks and as a template"

    def probe(self) -> Ready | Missing:
        """Its answers are those of a simulator of the standard; its speed says nothing about any device."""
        try:
            import numpy
            import onnx
        except ImportError as error:
            return Missing(reason=f"{error.name or 'onnx'} is not installed", hint="pip install onnx numpy")
        versions = {"onnx": onnx.__version__, "numpy": numpy.__version__}
        return Ready(device=f"numpy on {detect().processor}", versions=versions, runs=Origin.SIMULATED)

    def check(self, artifact: Artifact, profile: HardwareProfile) -> tuple[str, ...]:
        with sdk_errors(CompileError, f"read `{artifact.name}`", hint="Is the file a valid ONNX model?"):
            return tuple(_refused(_load(artifact.path), profile))

    def compile(self, artifact: Artifact, profile: HardwareProfile, out: Path) -> Compiled:
        """Nothing to translate: the file is checked against the standard and copied."""
        import onnx

        if problems := self.check(artifact, profile):
            raise CompileError(
                "; ".join(problems), hint="Use a target that knows this operator, such as onnxruntime-cpu."
            )
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{artifact.name.replace('/', '-')}.onnx"
        with sdk_errors(CompileError, f"check `{artifact.name}`", hint="The file breaks the ONNX standard."):
            model = onnx.load(str(artifact.path))
            onnx.checker.check_model(model)
            shutil.copyfile(artifact.path, path)
        return Compiled(path=path, artifact=artifact, placed=len(model.graph.node))

    @contextmanager
    def open(self, compiled: Compiled, profile: HardwareProfile) -> Iterator[Session]:  # noqa: ARG002
        from onnx.reference import ReferenceEvaluator

        with sdk_errors(RunError, f"load `{compiled.path.name}` in the reference evaluator"):
            model = _load(compiled.path)
            evaluator = ReferenceEvaluator(model, new_ops=_bridges(model))
        yield ReferenceSession(evaluator)


class ReferenceSession:
    """One loaded graph."""

    def __init__(self, evaluator: Any) -> None:
        self._evaluator = evaluator
        self._names = list(evaluator.output_names)

    def run(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        with sdk_errors(RunError, "run the model in the reference evaluator"):
            return dict(zip(self._names, self._evaluator.run(None, dict(inputs)), strict=True))


def _load(path: Path) -> Any:
    import onnx

    return onnx.load(str(path), load_external_data=False)


def _bridges(model: Any) -> list[type]:
    """Operators that the standard defines and the evaluator lacks."""
    return [*_dequantize(model), *([_gelu()] if _standard_opset(model) >= 20 else [])]


def _dequantize(model: Any) -> list[type]:
    """Opsets 10 to 18 define DequantizeLinear as later ones do for integers, but the evaluator has it from 19 on only.

    The newest class is taken, because the evaluator hands it the attributes of the newest schema.
    """
    from onnx.reference.ops import op_dequantize_linear as module

    if not 10 <= _standard_opset(model) < 19:
        return []
    names = [name for name in vars(module) if name.startswith("DequantizeLinear_")]
    newest = getattr(module, max(names, key=lambda name: int(name.rpartition("_")[2])))
    return [type("DequantizeLinear", (newest,), {"op_domain": ""})]


def _gelu() -> type:
    """The function that the standard expands Gelu to depends on an attribute, which the evaluator does not resolve."""
    import math

    import numpy as np
    from onnx.reference.op_run import OpRun

    erf = np.vectorize(math.erf, otypes=[np.float64])

    def run(_self: Any, x: Array, approximate: str = "none") -> tuple[Array]:
        wide = x.astype(np.float64)
        if approximate == "tanh":
            inner = np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
        else:
            inner = erf(wide / math.sqrt(2))
        return ((0.5 * wide * (1 + inner)).astype(x.dtype),)

    return type("Gelu", (OpRun,), {"op_domain": "", "_run": run})


def _standard_opset(model: Any) -> int:
    return next((int(opset.version) for opset in model.opset_import if not opset.domain), 0)


def _refused(model: Any, profile: HardwareProfile) -> Iterator[str]:
    """Too many nodes, weights in other files, operators without a reference implementation."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.ops import load_op

    limit = int(profile.options.get("node_limit", NODE_LIMIT))
    if len(model.graph.node) > limit:
        yield f"{len(model.graph.node)} nodes, the reference evaluator takes {limit} (options.node_limit)"
    if any(tensor.external_data for tensor in model.graph.initializer):
        yield "weights in external files: the reference evaluator takes one file"
    versions = {opset.domain: opset.version for opset in model.opset_import}
    known = {(function.domain, function.name) for function in model.functions}
    known |= {("", operator.__name__) for operator in _bridges(model)}
    for node in model.graph.node:
        if (node.domain, node.op_type) in known:
            continue
        try:
            # operators that the standard defines by others (HardSwish) are run by an evaluator of their own
            load_op(node.domain, node.op_type, versions.get(node.domain), evaluator_cls=ReferenceEvaluator)
        except (ValueError, RuntimeError) as error:  # unknown domain; unknown or not implemented operator
            operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            why = type(error).__name__
            yield f"node `{node.name or node.output[0]}`: no reference implementation of {operator} ({why})"
