"""From a model to named signals: ``hidden[2]``, ``q[0]``, ``qkv[-1]``, ``pooled`` ... Needs torch.

A signal is found by structure, not by class: an attention is a module with three projections called query/key/value (in
one of the usual spellings) or one fused ``qkv``; a layer is the element of a ModuleList or Sequential around it. So the
same names work on a teacher, on a student with fewer layers, and on a pruned module with fewer heads and neurons.
Convolutional nets have no attention; there ``hidden[i]`` is the output of the i-th top-level stage.

Of an encoder-decoder model these are the decoder's layers and self-attentions, which lie at the target's tokens as the
logits do; the encoder's stand behind a prefix, ``encoder.hidden[2]``. Cross-attention is no signal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from compressor.config import suggestion
from compressor.errors import PlanError
from compressor.models.heads import Exits, Head, head_signals

PROJECTIONS = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"))
FUSED = ("qkv", "qkv_proj", "c_attn")
_NAME = re.compile(r"^(hidden|qkv|attn|q|k|v)\[(-?\d+)\]$")
_HEAD_SIZES = ("attention_head_size", "head_dim", "key_value_proj_dim")
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "heads")


ENCODER = "encoder."  # prefix of the encoder's signals in an encoder-decoder model
_CROSS = re.compile(r"(^|\.)(encoder_attn|EncDecAttention|crossattention|cross_attn)$")


@dataclass(frozen=True)
class Attention:
    """One self-attention: its path, its module and the names of its projections (one name: fused)."""

    path: str
    module: nn.Module
    projections: tuple[str, ...]

    def head_size(self, width: int) -> int:
        """Columns of one head in a projection ``width`` wide. The size of a head outlives the pruning of heads."""
        for name in _HEAD_SIZES:
            if isinstance(getattr(self.module, name, None), int):
                return int(getattr(self.module, name))
        for name in _HEAD_COUNTS:
            if isinstance(getattr(self.module, name, None), int):
                return width // int(getattr(self.module, name))
        raise PlanError.single("signals", f"`{self.path}` does not say how many heads it has")


@dataclass(frozen=True)
class Structure:
    """Where the signals of a module come from, as (path, module) pairs in order."""

    attentions: tuple[Attention, ...]
    blocks: tuple[tuple[str, nn.Module], ...]  # transformer layers, or stages of a convolutional net
    head: nn.Module | None  # the module that reads the pooled vector
    pooling: nn.Module | None  # the module that makes it
    transformer: bool
    mapped: Mapping[str, nn.Module] = field(default_factory=dict)


def structure_of(module: nn.Module, mapping: Mapping[str, str] | None = None) -> Structure:
    """Find attentions, layers, pooling and head. ``mapping`` (signal name -> module path) wins over what is found."""
    attentions = tuple(_attentions(module))
    if (sides := encoder_decoder(module)) is not None:
        own = f"{sides[1]}."
        attentions = tuple(a for a in attentions if a.path.startswith(own) and not _CROSS.search(a.path))
    blocks = _blocks_around(module, attentions) if attentions else _stages(module)
    beside = {id(part) for exits in module.modules() if isinstance(exits, Exits) for part in exits.modules()}
    linears = [part for part in module.modules() if isinstance(part, nn.Linear) and id(part) not in beside]
    pooling = next((part for part in module.modules() if type(part).__name__ == "Pooling"), None)
    inside = {id(part) for _, block in blocks for part in block.modules()}
    head = linears[-1] if linears and id(linears[-1]) not in inside else None
    named = {**head_signals(module), **(mapping or {})}
    return Structure(attentions, tuple(blocks), head, pooling, bool(attentions), _mapped(module, named))


def encoder_decoder(module: nn.Module) -> tuple[str, str] | None:
    """Paths of encoder and decoder, where ``module`` holds two such parts and the second attends to the first."""
    for path, part in module.named_modules():
        children = dict(part.named_children())
        if children.keys() >= {"encoder", "decoder"}:
            inside = (name for name, _ in children["decoder"].named_modules())
            if any(_CROSS.search(name) for name in inside):
                return f"{path}.encoder".lstrip("."), f"{path}.decoder".lstrip(".")
    return None


def _mapped(module: nn.Module, mapping: Mapping[str, str]) -> dict[str, nn.Module]:
    parts = dict(module.named_modules())
    missing = [f"{name} = `{path}`" for name, path in mapping.items() if path not in parts]
    if missing:
        path = next(path for path in mapping.values() if path not in parts)
        raise PlanError.single(
            "teacher.signals", f"no such module: {', '.join(missing)}{suggestion(path, [*parts])[:200]}"
        )
    return {name: parts[path] for name, path in mapping.items()}


def _is_linear(part: nn.Module) -> bool:
    """nn.Linear, or transformers' Conv1D, which is one with its weight transposed."""
    return isinstance(part, nn.Linear) or (hasattr(part, "nx") and hasattr(part, "nf"))


def _attentions(module: nn.Module) -> Iterable[Attention]:
    for path, part in module.named_modules():
        children = {name for name, child in part.named_children() if _is_linear(child)}
        for names in (*PROJECTIONS, *((name,) for name in FUSED)):
            if children.issuperset(names):
                yield Attention(path, part, names)
                break


def _blocks_around(module: nn.Module, attentions: Iterable[Attention]) -> list[tuple[str, nn.Module]]:
    """For each attention the nearest enclosing element of a ModuleList or Sequential, in order, once.

    A list inside a layer (T5's: attention, cross-attention, feed-forward) is not taken for a list of layers: where a
    list around it holds elements of one class, its elements are the layers.
    """
    parts = dict(module.named_modules())
    found: dict[str, nn.Module] = {}
    for attention in attentions:
        words = attention.path.split(".")
        around = [".".join(words[:end]) for end in range(len(words), 0, -1)]
        listed = [path for path in around if isinstance(parts[path.rpartition(".")[0]], nn.ModuleList | nn.Sequential)]
        alike = [path for path in listed if len({type(e) for e in parts[path.rpartition(".")[0]].children()}) == 1]
        if listed:
            nearest = listed[0] if isinstance(parts[listed[0].rpartition(".")[0]], nn.Sequential) else ""
            path = nearest or (alike[0] if alike else listed[0])
            found[path] = parts[path]
    return list(found.items())


_HEAD_PARTS = (nn.Linear, nn.Dropout, nn.Flatten, nn.Softmax, nn.Identity, nn.ReLU, nn.LayerNorm, nn.AdaptiveAvgPool2d)


def _is_head(part: nn.Module) -> bool:
    leaves = (leaf for leaf in part.modules() if not [*leaf.children()])
    return isinstance(part, Head) or all(isinstance(leaf, _HEAD_PARTS) for leaf in leaves)


def _stages(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children with weights, without the classifier at the end; a lone child is opened until there are several."""
    prefix = ""
    while True:
        children = [(prefix + name, child) for name, child in module.named_children() if [*child.parameters()]]
        body = [(name, child) for name, child in children if not _is_head(child)] or children[:-1]
        if len(body) != 1 or not [*body[0][1].children()]:
            return body
        prefix, module = body[0][0] + ".", body[0][1]


def available(module: nn.Module, mapping: Mapping[str, str] | None = None) -> dict[str, int]:
    """How many of each signal a module has: ``{"hidden": 7, "qkv": 6, "attn": 6, "pooled": 1, "logits": 1}``.

    ``hidden`` counts the embeddings' output of a transformer as ``hidden[0]``; a convolutional net has one a stage.
    """
    structure = structure_of(module, mapping)
    count = len(structure.attentions)
    found = {"hidden": _hidden_count(structure), "logits": 1}
    if count:
        found |= {"q": count, "k": count, "v": count, "qkv": count, "mask": 1}
        if not any(hasattr(a.module, "has_relative_attention_bias") for a in structure.attentions):
            found["attn"] = count  # T5 gives its position bias where others give the weights, and does not scale
    if structure.head is not None or structure.pooling is not None or "pooled" in structure.mapped:
        found["pooled"] = 1
    found |= dict.fromkeys(head_signals(module), 1)
    if (sides := encoder_decoder(module)) is not None:
        inside = available(module.get_submodule(sides[0]))
        found |= {f"{ENCODER}{name}": n for name, n in inside.items() if name not in ("logits", "mask", "pooled")}
    return {name: number for name, number in found.items() if number}


def _hidden_count(structure: Structure) -> int:
    indices = [int(match[2]) for name in structure.mapped if (match := _NAME.match(name)) and match[1] == "hidden"]
    if indices:
        return max(indices) + 1
    return len(structure.blocks) + int(structure.transformer and bool(structure.blocks))


def output_mask(inputs: Mapping[str, Any]) -> Any:
    """(B, T), non-zero at the tokens that outputs speak of: the target's of an encoder-decoder model; None without."""
    return inputs.get("decoder_attention_mask", inputs.get("attention_mask"))


def _tensor(value: Any) -> Tensor:
    """The tensor in a module's output: itself, the first of a tuple, or ``last_hidden_state``."""
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "last_hidden_state"):
        return value.last_hidden_state
    if isinstance(value, tuple | list) and value:
        return _tensor(value[0])
    raise PlanError.single("signals", f"a module returned a {type(value).__name__}, which holds no tensor")


class SignalTap:
    """Run a module once and collect named signals; gradients flow through them.

    >>> with SignalTap(module, ["hidden[-1]", "logits"]) as tap:        # doctest: +SKIP
    ...     signals = tap({"input_ids": ids, "attention_mask": mask})

    Signals: ``logits`` (what the module returns), ``probs``, ``hidden[i]`` (B, T, D) or (B, C, H, W), ``q[i] k[i]
    v[i]`` (B, heads, T, d), ``qkv[i]`` (3, B, heads, T, d), ``attn[i]`` (B, heads, T, T), ``pooled`` (B, D): what the
    classifier reads, or the pooled vector before normalisation, and ``mask`` (B, T). ``i`` may be negative. Raises
    :class:`PlanError` at once for a name that the module does not have. Leaving the ``with`` removes every hook.
    """

    def __init__(self, module: nn.Module, wanted: Iterable[str], mapping: Mapping[str, str] | None = None) -> None:
        self.module = module
        self.wanted = tuple(dict.fromkeys(wanted))
        self._structure = structure_of(module, mapping)
        self._counts = available(module, mapping)
        self._seen: dict[str, Any] = {}
        self._handles: list[Any] = []
        sides = encoder_decoder(module)
        inner = [name.removeprefix(ENCODER) for name in self.wanted if sides and name.startswith(ENCODER)]
        self._encoder = SignalTap(module.get_submodule(sides[0]), inner) if sides and inner else None
        unknown = [name for name in self.wanted if not self._has(name)]
        if unknown:
            have = ", ".join(f"{name} x{count}" if count > 1 else name for name, count in self._counts.items())
            raise PlanError.single("signals", f"the model has no {', '.join(unknown)}", hint=f"It has {have}.")

    def _has(self, name: str) -> bool:
        if name in self._structure.mapped or name in ("logits", "probs") or self._inner(name):
            return True
        match = _NAME.match(name)
        if match is None:
            return name == "mask" or self._counts.get(name, 0) == 1
        count = self._counts.get(match[1], 0)
        return -count <= int(match[2]) < count

    def _inner(self, name: str) -> str:
        """The name of an encoder's signal inside the encoder; empty for another."""
        return name.removeprefix(ENCODER) if self._encoder is not None and name.startswith(ENCODER) else ""

    def __enter__(self) -> Self:
        if self._encoder is not None:
            self._encoder.__enter__()
        for name in self.wanted:
            if not self._inner(name):
                self._attach(name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._encoder is not None:
            self._encoder.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._seen.clear()

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One forward pass; the wanted signals by name."""
        taps = [self] if self._encoder is None else [self, self._encoder]
        for tap in taps:
            tap._seen.clear()
            tap._seen["inputs"] = inputs if tap is self else {"attention_mask": inputs.get("attention_mask")}
        try:
            self._seen["out"] = _tensor(self.module(**inputs))
            return {name: self._signal(name) for name in self.wanted}
        finally:
            for tap in taps:
                tap._seen.clear()

    def _signal(self, name: str) -> Tensor:
        inner = self._inner(name)
        return self._encoder._read(inner) if self._encoder is not None and inner else self._read(name)

    def _keep(self, part: nn.Module, key: str, pick: Callable[[Any], Any] = _tensor) -> None:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self._seen[key] = pick(output)

        self._handles.append(part.register_forward_hook(hook))

    def _keep_input(self, part: nn.Module, key: str) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._seen[key] = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))

        self._handles.append(part.register_forward_pre_hook(hook, with_kwargs=True))

    def _attach(self, name: str) -> None:
        structure, match = self._structure, _NAME.match(name)
        if (place := self._canonical(name)) in structure.mapped:
            self._keep(structure.mapped[place], place)
        elif name == "pooled":
            if structure.pooling is not None:
                self._keep(structure.pooling, "pooled")
            elif structure.head is not None:
                self._keep_input(structure.head, "pooled")
        elif name == "mask" and structure.blocks:
            self._keep_input(structure.blocks[0][1], "hidden[0]")
        elif match is not None and match[1] == "hidden":
            self._attach_hidden(place)
        elif match is not None:
            self._attach_attention(int(place[:-1].split("[")[1]), weights=match[1] == "attn")

    def _canonical(self, name: str) -> str:
        """``hidden[-1]`` as ``hidden[6]``."""
        match = _NAME.match(name)
        if match is None or name in self._structure.mapped:
            return name
        index = int(match[2])
        return f"{match[1]}[{index + self._counts.get(match[1], 0) if index < 0 else index}]"

    def _attach_hidden(self, place: str) -> None:
        index = int(place[:-1].split("[")[1]) - int(self._structure.transformer)
        if index < 0:
            self._keep_input(self._structure.blocks[0][1], place)
        else:
            self._keep(self._structure.blocks[index][1], place)

    def _attach_attention(self, index: int, *, weights: bool) -> None:
        attention = self._structure.attentions[index]
        if weights:
            self._keep(attention.module, f"weights[{index}]", _weights)
        for name in attention.projections:
            self._keep(getattr(attention.module, name), f"{name}[{index}]")

    def _read(self, name: str) -> Tensor:
        if name == "logits":
            return self._seen["out"]
        if name == "probs":
            return torch.softmax(self._seen["out"], dim=-1)
        if name == "mask" and name not in self._structure.mapped:
            return self._mask()
        place = self._canonical(name)
        match = _NAME.match(place)
        if place in self._structure.mapped or match is None or match[1] == "hidden":
            if place not in self._seen:
                raise PlanError.single("signals", f"`{name}` was not computed in the forward pass")
            return self._seen[place]
        return self._read_attention(match[1], int(match[2]))

    def _mask(self) -> Tensor:
        mask = output_mask(self._seen["inputs"])
        if mask is not None:
            return mask
        hidden = self._seen.get("hidden[0]")
        if hidden is None or hidden.ndim != 3:
            raise PlanError.single("signals", "`mask` needs a model over tokens")
        return torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)

    def _read_attention(self, kind: str, index: int) -> Tensor:
        if kind == "attn" and self._seen.get(f"weights[{index}]") is not None:
            return self._seen[f"weights[{index}]"]
        attention = self._structure.attentions[index]
        outputs = [self._seen[f"{name}[{index}]"] for name in attention.projections]
        if len(outputs) == 1:
            outputs = list(outputs[0].chunk(3, dim=-1))
        q, k, v = (_heads(output, attention.head_size(output.shape[-1])) for output in outputs)
        if kind == "attn":
            return self._attention_weights(q, k)
        if kind == "qkv":
            return torch.stack([q, k, v])
        return {"q": q, "k": k, "v": v}[kind]

    def _attention_weights(self, q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        mask = self._seen["inputs"].get("attention_mask")
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :] == 0, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, dim=-1)


def _weights(output: Any) -> Tensor | None:
    """Attention probabilities (B, heads, T, T), where the attention returns them beside its output."""
    found = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    return found if isinstance(found, Tensor) and found.ndim == 4 else None


def _heads(projection: Tensor, size: int) -> Tensor:
    """(B, T, heads * d) -> (B, heads, T, d)."""
    batch, length, width = projection.shape
    return projection.reshape(batch, length, width // size, size).transpose(1, 2)
