"""A text model that reads and writes the ids of a smaller vocabulary. Needs torch.

New id ``i`` stands for the model's own id ``keep[i]``. :func:`read_ids` puts a map in front of a teacher's embedding
(and behind its output layer, for a language model), so that teacher and student read one stream of ids; the student
gets the smaller tables by :func:`vocabulary_steps`, and the map goes.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import PlanError
from compressor.models.rebuild import ranges_of, sync_sizes

KEY = "vocabulary"
SPECIAL = ("pad", "eos", "bos", "cls", "sep", "mask", "unk", "decoder_start")


class _Reads:
    """Turns new ids into the model's own before its embedding sees them. An object: deep copies get a copy."""

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.keep.to(args[0].device)[args[0]], *args[1:])


class _Writes:
    """Leaves the logits of the kept tokens only, in their new order."""

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep

    def __call__(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output[..., self.keep.to(output.device)]


@dataclass(frozen=True)
class Tables:
    """Where a text model keeps its vocabulary: path of the embedding, and of the output layer of a language model."""

    embedding: str
    output: str | None


def tables_of(module: nn.Module) -> Tables | None:
    """The tables of a transformers model inside ``module``; None where there is none, or more than one embedding."""
    for part in module.modules():
        if not callable(getattr(part, "get_input_embeddings", None)):
            continue
        try:
            found = part.get_input_embeddings()
        except (NotImplementedError, AttributeError):
            return None
        if not isinstance(found, nn.Embedding):
            return None
        rows = [other for other in module.modules() if isinstance(other, nn.Embedding) and other is not found]
        if any(other.num_embeddings == found.num_embeddings for other in rows):
            return None
        output = _output_of(part)
        if output is not None and getattr(output, "out_features", None) != found.num_embeddings:
            output = None  # a classifier
        return Tables(_path(module, found), None if output is None else _path(module, output))
    return None


def _output_of(model: Any) -> nn.Module | None:
    try:
        found = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None


def _path(module: nn.Module, wanted: nn.Module) -> str:
    found: str = next(path for path, part in module.named_modules() if part is wanted)
    return found


def read_ids(module: nn.Module, keep: Sequence[int]) -> nn.Module:
    """A twin of ``module`` (it shares the weights) that takes new ids, and gives logits over the new vocabulary.

    Raises:
        PlanError: the model has no table of tokens that could be made smaller, or counts positions from its padding id.
    """
    tables = tables_of(module)
    if tables is None:
        raise PlanError.single(KEY, "matches nothing: the model has no single embedding of tokens")
    rows = module.get_submodule(tables.embedding).num_embeddings
    if len(keep) == 0 or max(keep) >= rows:
        raise PlanError.single(KEY, f"the tokenizer has token {max(keep, default=0)}, the model only {rows} rows")
    twin = copy.deepcopy(module, {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]})
    index = torch.as_tensor(list(keep), dtype=torch.long)
    embedding = twin.get_submodule(tables.embedding)
    embedding.register_forward_pre_hook(_Reads(index))
    if tables.output is not None:
        twin.get_submodule(tables.output).register_forward_hook(_Writes(index))
    _rename_special(twin, embedding, {int(old): new for new, old in enumerate(keep)})
    return twin


def _rename_special(twin: nn.Module, embedding: nn.Embedding, new: dict[int, int]) -> None:
    """Ids that the model's own code reads: of padding in embeddings, of special tokens in its configuration."""
    old_padding = embedding.padding_idx
    if old_padding is not None:
        embedding.padding_idx = new.get(old_padding)
    seen: set[int] = set()
    for name, part in twin.named_modules():
        padding = getattr(part, "padding_idx", None)
        if not isinstance(part, nn.Embedding) and isinstance(padding, int) and new.get(padding) != padding:
            if _reads_padding(part):
                what = f"`{name}` counts positions from its padding id {padding}, which would change"
                hint = "Only tokenizers with the padding token among the first fit here."
                raise PlanError.single(KEY, what, hint=hint)
            part.padding_idx = new.get(padding)  # type: ignore[assignment]
        config = getattr(part, "config", None)
        if config is None or id(config) in seen:
            continue
        seen.add(id(config))
        for word in SPECIAL:
            value = getattr(config, f"{word}_token_id", None)
            if isinstance(value, int):
                setattr(config, f"{word}_token_id", new.get(value))
            elif isinstance(value, list):
                setattr(config, f"{word}_token_id", [new[item] for item in value if item in new])


def _reads_padding(part: nn.Module) -> bool:
    """Whether the module's own code reads ``padding_idx``: RoBERTa's positions do, Llama only writes it down."""
    forward = inspect.unwrap(type(part).forward)
    return "padding_idx" in getattr(forward, "__code__", forward).co_names


def table_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The tables of a model by parameter name: the embedding, and of a language model its output's weight (where it is
    not the embedding's) and bias.

    Raises:
        PlanError: there is no single embedding of tokens.
    """
    tables = tables_of(module)
    if tables is None:
        raise PlanError.single(KEY, "matches nothing: the model has no single embedding of tokens")
    embedding = module.get_submodule(tables.embedding)
    found = {f"{tables.embedding}.weight": embedding.weight}
    if tables.output is not None:
        output = module.get_submodule(tables.output)
        if output.weight is not embedding.weight:
            found[f"{tables.output}.weight"] = output.weight
        if output.bias is not None:
            found[f"{tables.output}.bias"] = output.bias
    return found


def with_tables(module: nn.Module, rows: Mapping[str, Tensor], ids: Mapping[int, int]) -> nn.Module:
    """A twin of ``module`` (it shares the other weights) with other tables, by the names of :func:`table_parameters`.

    ``ids``: old id -> new id, of the special tokens that the model's own code reads.

    Raises:
        PlanError: the model counts positions from its padding id, which would change.
    """
    shared = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    twin = copy.deepcopy(module, shared)
    size = len(next(iter(rows.values())))
    tables = table_parameters(twin)
    for name, table in tables.items():
        set_rows(twin, table, rows[name])
    where = tables_of(twin)
    assert where is not None  # table_parameters found it
    _rename_special(twin, twin.get_submodule(where.embedding), dict(ids))
    before = len(next(iter(table_parameters(module).values())))
    for part in twin.modules():
        config = getattr(part, "config", None)
        if config is not None and getattr(config, "vocab_size", None) == before:
            config.vocab_size = size
    return twin


def set_rows(module: nn.Module, old: Tensor, rows: Tensor) -> None:
    """Put a parameter with other rows in the place of ``old``, wherever it stands: what is tied stays tied."""
    new = nn.Parameter(rows.to(old.dtype).clone(), requires_grad=old.requires_grad)
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is old:
                part._parameters[name] = new
                sync_sizes(part)


def kept_ids(module: nn.Module) -> list[int] | None:
    """The ids that a module made by :func:`read_ids` keeps; None for another one."""
    for part in module.modules():
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, _Reads):
                return [int(number) for number in hook.keep]
    return None


def vocabulary_steps(module: nn.Module) -> list[dict[str, Any]]:
    """Record steps that make the tables of a module of :func:`read_ids` really smaller and take the maps out."""
    keep, tables = kept_ids(module), tables_of(module)
    if keep is None or tables is None:
        return []
    ranges = ranges_of(keep)
    weights = [f"{tables.embedding}.weight"]
    if tables.output is not None:
        embedding, output = module.get_submodule(tables.embedding), module.get_submodule(tables.output)
        weights += [] if output.weight is embedding.weight else [f"{tables.output}.weight"]
        weights += [f"{tables.output}.bias"] if output.bias is not None else []
    rows = module.get_submodule(tables.embedding).num_embeddings
    steps: list[dict[str, Any]] = [{"op": "ids"}]
    steps += [{"op": "cut", "tensor": name, "axis": 0, "keep": ranges} for name in weights]
    for name, part in module.named_modules():
        if getattr(getattr(part, "config", None), "vocab_size", None) == rows:
            steps.append({"op": "set", "module": name, "attribute": "config.vocab_size", "value": len(keep)})
            break
    return steps


def drop_maps(module: nn.Module) -> None:
    """Carry out an ``ids`` step: the tables themselves are about to have the new ids."""
    for part in module.modules():
        for hooks in (part._forward_pre_hooks, part._forward_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Reads | _Writes)]:
                del hooks[key]


__all__ = [
    "Tables",
    "drop_maps",
    "kept_ids",
    "read_ids",
    "set_rows",
    "table_parameters",
    "tables_of",
    "vocabulary_steps",
    "with_tables",
]
