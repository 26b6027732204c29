"""Structure records: how a student differs from its teacher, as data.

A student is stored as ``record.json`` (these steps) and ``student.safetensors`` (its weights). To load it, the steps
are replayed on a copy of the teacher's module and the weights are loaded strictly, so no class, code or pickle is
stored.

Steps:

- ``{"op": "cut", "tensor": "conv1.weight", "axis": 0, "keep": [[0, 5], [7, 9]]}``: keep these ranges (end excluded);
- ``{"op": "drop", "container": "encoder.layer", "keep": [0, 2, 4]}``: keep these elements of a module list;
- ``{"op": "factory", "arguments": {"width": 8}}``: what the teacher's factory makes with these; the first step only;
- ``{"op": "set", "module": "attention", "attribute": "num_heads", "value": 3}``: a number that the code reads;
- ``{"op": "head", "module": "head", "kind": "subclass", "subclasses": 5}``: another head, see
  :mod:`compressor.models.heads`;
- ``{"op": "exits", "blocks": ["stage1"], "widths": [16], "classes": 10, "mode": "outputs"}``: exits at blocks;
- ``{"op": "ids"}``: the tables have the ids of the smaller vocabulary, see :mod:`compressor.models.vocabulary`;
- ``{"op": "factorise", "module": "encoder.fc1", "rank": 64}``: two layers for one, see
  :mod:`compressor.models.lowrank`;
- ``{"op": "silence", "module": "layer.1.output.dense"}``: a sublayer went, see :mod:`compressor.models.silent`;
- ``{"op": "mask", "tensor": "conv1.weight", "pattern": "2:4"}``: zeros that stay zero, see
  :mod:`compressor.models.sparse`;
- ``{"op": "tokens", "score": "attention", "drops": [{"block": "encoder.layer.2", "keep": 64}], "readers": {}}``: tokens
  that go no further, see :mod:`compressor.models.tokens`;
- ``{"op": "fold", "module": "conv1", "norm": "bn1"}``: a batch norm went into the layer before it, see
  :mod:`compressor.models.placement`;
- ``{"op": "round", "module": "conv1", "precision": "int8", ...}``: the layer rounds, see
  :mod:`compressor.models.fakequant`.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import StageError
from compressor.models import heads
from compressor.types import write_atomic

Record = Sequence[Mapping[str, Any]]
RECORD_FILE = "record.json"
WEIGHTS_FILE = "student.safetensors"


def replay(module: nn.Module, record: Record) -> nn.Module:
    """A deep copy of ``module`` with every step of ``record`` applied; weights are those of the kept parts.

    A record that begins with another call of the teacher's factory goes on from what that makes.

    Raises :class:`StageError` when a step does not fit the module (the record belongs to another teacher).
    """
    if record and record[0].get("op") == "factory":
        from compressor.models.factory import remake

        student, record = remake(module, record[0]["arguments"]), record[1:]
    else:
        student = copy.deepcopy(module)
    apply(student, record)
    return student


def apply(module: nn.Module, record: Record) -> None:
    """Apply the steps in place."""
    touched: set[str] = set()
    for number, step in enumerate(record):
        try:
            if step["op"] == "cut":
                _cut(module, step["tensor"], int(step["axis"]), indices_of(step["keep"]), touched)
            elif step["op"] == "drop":
                _sync(module, touched)  # afterwards elements have other names
                keep_elements(module.get_submodule(step["container"]), [int(index) for index in step["keep"]])
            elif step["op"] == "set":
                _set(module.get_submodule(step["module"]), step["attribute"], step["value"])
            elif step["op"] == "head":
                heads.replace_head(module, step)
            elif step["op"] == "exits":
                heads.add_exits(module, step)
            elif step["op"] in ("ids", "factorise", "silence", "mask", "tokens", "fold", "round"):
                _replace(module, step)
            else:
                raise ValueError(f"unknown step `{step['op']}`")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise StageError(
                f"step {number} of the structure record does not fit the model: {error}",
                hint="A record can only be replayed on the teacher that it was made from.",
            ) from error
    _sync(module, touched)


def _sync(module: nn.Module, touched: set[str]) -> None:
    for name in sorted(touched):
        sync_sizes(module.get_submodule(name))
    touched.clear()


def _replace(module: nn.Module, step: Mapping[str, Any]) -> None:
    """Steps whose parts live in modules that import this one."""
    from compressor.models.fakequant import change, scheme_of
    from compressor.models.lowrank import factorise
    from compressor.models.placement import fold
    from compressor.models.silent import silence
    from compressor.models.sparse import add_mask
    from compressor.models.tokens import add_drops
    from compressor.models.vocabulary import drop_maps

    if step["op"] == "ids":
        drop_maps(module)
    elif step["op"] == "silence":
        silence(module, step["module"])
    elif step["op"] == "mask":
        add_mask(module, step["tensor"])
    elif step["op"] == "fold":
        fold(module, step["module"], step["norm"])
    elif step["op"] == "round":
        change(module, step["module"], scheme_of(step))
    elif step["op"] == "tokens":
        add_drops(module, step)
    else:
        factorise(module, step["module"], int(step["rank"]))


def ranges_of(indices: Iterable[int]) -> list[list[int]]:
    """Sorted indices as [start, end) ranges.

    >>> ranges_of([0, 1, 2, 5, 6])
    [[0, 3], [5, 7]]
    """
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1][1] = index + 1
        else:
            ranges.append([int(index), int(index) + 1])
    return ranges


def indices_of(ranges: Sequence[Sequence[int]]) -> Tensor:
    """The inverse of :func:`ranges_of`, int64."""
    return (
        torch.cat([torch.arange(start, end) for start, end in ranges]) if ranges else torch.empty(0, dtype=torch.long)
    )


def _cut(module: nn.Module, name: str, axis: int, keep: Tensor, touched: set[str]) -> None:
    path, _, local = name.rpartition(".")
    old = getattr(module.get_submodule(path), local)
    if not isinstance(old, Tensor) or keep.numel() == 0 or int(keep.max()) >= old.shape[axis]:
        raise ValueError(f"`{name}` has no such positions on axis {axis}")
    kept = old.detach().index_select(axis, keep)
    new = nn.Parameter(kept, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else kept
    for holder_name, holder in module.named_modules():
        for table in (holder._parameters, holder._buffers):
            for key, tensor in table.items():
                if tensor is old:  # a tied weight stays tied
                    table[key] = new
                    touched.add(holder_name)


def keep_elements(container: nn.Module, keep: Sequence[int]) -> None:
    """Keep these elements of a ModuleList or Sequential, renumbered; ``layer_idx`` of what is inside follows."""
    elements = list(container.children())
    kept = [elements[index] for index in keep]
    container._modules.clear()
    for position, element in enumerate(kept):
        container._modules[str(position)] = element
        for part in element.modules():
            if isinstance(getattr(part, "layer_idx", None), int):
                part.layer_idx = position  # type: ignore[assignment]


def _set(module: nn.Module, attribute: str, value: Any) -> None:
    target: Any = module
    *path, last = attribute.split(".")
    for part in path:
        target = getattr(target, part)
    old = getattr(target, last)
    if isinstance(old, bool) or not _is_count(old) or not _is_count(value):
        raise ValueError(f"`{attribute}` is not a number")
    setattr(target, last, tuple(value) if isinstance(old, tuple) else value)


def _is_count(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, int) for item in value)
    return isinstance(value, int)


def sync_sizes(module: nn.Module) -> None:
    """Make the size attributes of a standard layer agree with its tensors."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd) and weight is not None:
        _sync_convolution(module, weight)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        vector = weight if weight is not None else module.running_mean
        module.num_features = vector.shape[0] if vector is not None else module.num_features
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        per_group = module.num_channels // module.num_groups
        module.num_channels = weight.shape[0]
        module.num_groups = max(1, weight.shape[0] // per_group)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]
    elif weight is not None and hasattr(module, "nx") and hasattr(module, "nf"):  # transformers' Conv1D
        module.nx, module.nf = weight.shape


def _sync_convolution(module: nn.modules.conv._ConvNd, weight: Tensor) -> None:
    """A depthwise convolution loses groups with its channels; a grouped one keeps its groups, which get smaller."""
    depthwise = module.groups > 1 and module.groups == module.in_channels
    own, other = (weight.shape[0], weight.shape[1]) if not module.transposed else (weight.shape[1], weight.shape[0])
    if depthwise:
        multiplier = module.out_channels // module.groups
        module.groups = weight.shape[0] // (1 if module.transposed else multiplier)
        module.in_channels, module.out_channels = module.groups, module.groups * multiplier
    elif module.transposed:
        module.in_channels, module.out_channels = other, own * module.groups
    else:
        module.out_channels, module.in_channels = own, other * module.groups


def save_student(folder: Path, module: nn.Module, record: Record) -> None:
    """Write ``record.json`` and ``student.safetensors``.

    Same weights give the same bytes; tied weights are stored once.
    """
    from safetensors.torch import save

    state = module.state_dict()
    names = [names[0] for names in _tied(state)]
    payload = save({name: state[name].detach().cpu().contiguous().clone() for name in names})
    write_atomic(folder / WEIGHTS_FILE, payload)
    write_atomic(folder / RECORD_FILE, json.dumps([dict(step) for step in record], indent=None, sort_keys=True) + "\n")


def load_student(folder: Path, teacher: nn.Module) -> nn.Module:
    """Rebuild a student that :func:`save_student` wrote, in evaluation mode. ``teacher`` is not touched."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise StageError(f"the student in `{folder}` cannot be read: {error}", hint="Run the stage again.") from error
    student = replay(teacher, record)
    for names in _tied(student.state_dict()):
        for name in names[1:]:
            if names[0] in weights:
                weights[name] = weights[names[0]]
    try:
        student.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise StageError(f"the student in `{folder}` does not fit its record: {error}", hint="Run it again.") from error
    return student.eval()


def _tied(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names by storage, sorted: each inner list names one tensor."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for name in sorted(state):
        tensor = state[name]
        same = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
        groups[same].append(name)
    return sorted(groups.values())
