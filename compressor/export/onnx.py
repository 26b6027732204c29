"""A torch module to one portable ONNX file with torch's dynamo exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.errors import StageError
from compressor.models.onnx_graph import save_model, set_metadata
from compressor.types import Array, TensorSpec

if TYPE_CHECKING:
    import onnx
    from torch import nn

DEFAULT_OPSET = 20  # first with Gelu; every target of this project reads it
OUTPUT_PREFIX = "output of the model: "  # no value inside is called so
NOISY_LOGGERS = ("torch.onnx", "torch.export", "torch._dynamo", "torch.fx", "onnxscript", "onnx_ir")


def export_onnx(
    module: nn.Module,
    example: Mapping[str, Array],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    path: Path,
    *,
    name: str,
    metadata: Mapping[str, str],
    opset: int = DEFAULT_OPSET,
) -> None:
    """Write ``module`` as one ONNX file whose bytes depend only on the module, the specs and the library versions.

    ``example`` holds one array per input, batch first; an input dimension given as a string stays dynamic. A batch of
    one is doubled, because a traced size of 1 would be taken for a constant. Weights stay inside (2 GiB at most).

    Raises :class:`StageError`, naming the operator where the exporter names one.
    """
    import torch

    example = {spec.name: _at_least_two(example, spec) for spec in inputs}
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad(), _plain_attention(module):
            tensors = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in example.items()}
            _check_outputs(module, tensors, outputs)
            model = _export(module, tensors, inputs, outputs, opset)
    finally:
        for part in training:  # one by one: a frozen part may stand in evaluation mode inside a training module
            part.training = True
    _strip(model)
    _declare(model, inputs, outputs)
    model.graph.name = name
    set_metadata(model, {"name": name, **metadata})
    save_model(model, path)


def _at_least_two(example: Mapping[str, Array], spec: TensorSpec) -> Array:
    if spec.name not in example:
        known = ", ".join(example)
        raise StageError(f"no example for input `{spec.name}`", hint=f"The example has: {known or 'nothing'}.")
    array = np.asarray(example[spec.name], dtype=np.dtype(spec.dtype))
    if spec.shape and isinstance(spec.shape[0], str) and len(array) == 1:
        array = np.repeat(array, 2, axis=0)
    return array


def _check_outputs(module: nn.Module, tensors: Mapping[str, Any], outputs: Sequence[TensorSpec]) -> None:
    """Refuse auxiliary heads and the like before the exporter turns them into numbered outputs."""
    import torch
    from torch.utils import _pytree

    wanted = ", ".join(spec.name for spec in outputs)
    try:
        leaves = _pytree.tree_leaves(module(**tensors))
    except (TypeError, RuntimeError, ValueError, IndexError) as error:
        hint = f"forward() must take {', '.join(tensors)} by name, at batch size 2."
        raise StageError(f"the model does not run on the example: {error}", hint=hint) from error
    made = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if len(made) != len(outputs):
        message = (
            f"in evaluation mode the model returns {len(made)} tensors, but the export needs {len(outputs)} ({wanted})"
        )
        hint = "Return only the final output from forward() when `self.training` is false (no auxiliary heads)."
        raise StageError(message, hint=hint)
    for tensor, spec in zip(made, outputs, strict=True):
        if tensor.ndim != len(spec.shape):
            message = f"output `{spec.name}` has {tensor.ndim} dimensions, but {len(spec.shape)} were declared"
            raise StageError(message, hint=f"The model returned shape {tuple(tensor.shape)}.")


def _export(
    module: nn.Module,
    tensors: Mapping[str, Any],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    opset: int,
) -> onnx.ModelProto:
    import torch

    shapes = {
        spec.name: {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}
        for spec in inputs
    }
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (),
                kwargs=dict(tensors),
                dynamo=True,
                opset_version=opset,
                input_names=[spec.name for spec in inputs],
                output_names=[OUTPUT_PREFIX + spec.name for spec in outputs],
                dynamic_shapes=shapes,
                verbose=False,
                external_data=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        raise _export_error(error) from error
    if program is None:
        raise StageError("the exporter returned nothing", hint="Check the torch release.")
    proto: onnx.ModelProto = program.model_proto
    _name_outputs(proto, [spec.name for spec in outputs])
    return proto


def _name_outputs(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Give the outputs their names; a value inside that has one already (an embedding's `embedding`) steps aside."""
    wanted = {OUTPUT_PREFIX + name: name for name in names} | {name: f"{name}_inside" for name in names}
    for node in model.graph.node:
        for values in (node.input, node.output):
            for place, value in enumerate(values):
                values[place] = wanted.get(value, value)
    for part in (model.graph.output, model.graph.initializer, model.graph.value_info):
        for item in part:  # type: ignore[attr-defined]
            item.name = wanted.get(item.name, item.name)


def _export_error(error: BaseException) -> StageError:
    """The innermost cause, with the operator's name when one is mentioned."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__
    text = "\n".join(str(part) for part in chain)
    operator = re.search(
        r"\b((?:aten|prims|torch\.ops\.\w+|torchvision|[a-z_]+)[.:]{1,2}[a-z_0-9]+(?:\.[A-Za-z_]+)?)\b", text
    )
    named = re.search(r"(?:function for|target='?|OpOverload\(op=')\W*([\w.:]+)", text)
    found = (named or operator).group(1) if (named or operator) else ""  # type: ignore[union-attr]
    first = next((line for line in str(chain[-1]).splitlines() if line.strip()), type(chain[-1]).__name__)
    hint = "Data-dependent control flow and Python-side sizes cannot be exported; keep forward() to tensor operations."
    if "specialized" in text or "Constraints violated" in text:
        hint = "A dimension declared dynamic is fixed by the model's code; declare its size, or free it in the code."
    return StageError(f"export to ONNX failed{f' at `{found}`' if found else ''}: {first.strip()}", hint=hint)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs, warns and prints; none of it concerns the user of a successful export."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith(NOISY_LOGGERS)]
    before = [(logger, logger.level) for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in before:
            logger.setLevel(level)


@contextlib.contextmanager
def _plain_attention(module: nn.Module) -> Iterator[None]:
    """Trace transformers models with their plain attention: scaled-dot-product attention leaves a NaN guard, and more
    shape arithmetic, in every layer (166 against 130 nodes for a three-layer BERT), which no runtime fuses away."""
    changed = []
    for part in module.modules():
        config = getattr(part, "config", None)
        kind = getattr(config, "_attn_implementation", None)
        if kind not in (None, "eager") and hasattr(part, "set_attn_implementation"):
            changed.append((part, kind))
    try:
        for part, _ in changed:
            part.set_attn_implementation("eager")
        yield
    finally:
        for part, kind in changed:
            part.set_attn_implementation(kind)


def _strip(model: onnx.ModelProto) -> None:
    """Remove stack traces, paths and module names: they are private, differ between checkouts, and cost file size."""
    model.doc_string = ""
    del model.metadata_props[:]
    graphs: list[Any] = [model.graph, *model.functions]
    for graph in graphs:
        graph.doc_string = ""
        del graph.metadata_props[:]
        del graph.value_info[:]  # stale shapes make ONNX Runtime's dynamic quantizer fail on transposed Gemm
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
    for part in (model.graph.input, model.graph.output, model.graph.initializer):
        for value in part:  # type: ignore[attr-defined]
            value.doc_string = ""
            del value.metadata_props[:]


def _declare(model: onnx.ModelProto, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Give dimensions their declared names, after checking that none was fixed while tracing."""
    for specs, values, kind in ((inputs, model.graph.input, "input"), (outputs, model.graph.output, "output")):
        found = {value.name: value for value in values}
        for spec in specs:
            if spec.name not in found:
                raise StageError(f"the exported graph lost {kind} `{spec.name}`", hint="The model does not use it.")
            dims = found[spec.name].type.tensor_type.shape.dim
            for dim, size in zip(dims, spec.shape, strict=True):
                if isinstance(size, int):
                    dim.dim_value = size
                elif dim.HasField("dim_value"):
                    hint = f"Something in forward() fixes it to {dim.dim_value} (a reshape with a Python number?)."
                    raise StageError(f"dimension `{size}` of {kind} `{spec.name}` is not dynamic any more", hint=hint)
                else:
                    dim.dim_param = size
