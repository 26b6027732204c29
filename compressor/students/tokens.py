"""Students of fewer tokens: after a block only the k highest-scored ones go on (methods K1).

What follows the tokens beside the hidden states (masks, rotary tables, a pooling's mask) is found by running the model
on texts of two lengths, so that nothing depends on its class. :mod:`compressor.models.tokens` does the dropping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.errors import Problem
from compressor.recipe import StudentStage
from compressor.types import LayerFact

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = Mapping[str, "Tensor"]
STAGE = "student"
KEY = "drop_tokens"
MASK = "attention_mask"


@dataclass(frozen=True)
class _Chain:
    """The blocks of a model, and the other modules that read hidden states of their tokens (its pooling)."""

    blocks: tuple[str, ...]
    others: tuple[str, ...]


def problems_of(module: nn.Module, example: Batch, config: StudentStage) -> list[Problem]:
    """What keeps the tokens of ``config`` from being dropped; empty when they can be. Runs the model a few times."""
    from torch import Tensor

    from compressor.models.rebuild import replay
    from compressor.models.structure.trace import evaluating, run

    if not config.drop_tokens:
        return []
    chain = _chain_of(module, example)
    if chain is None:
        return [Problem(KEY, "matches nothing: the model has no chain of blocks")]
    wrong = _wrong(module, example, config, chain)
    if wrong:
        return [Problem(KEY, text) for text in wrong]
    batch = padded(example)
    try:
        with evaluating(module):
            whole = run(module, batch)
        student = replay(module, [_step(module, example, config, chain)])
        with evaluating(student):
            fewer = run(student, batch)
    except Exception as error:  # noqa: BLE001 - whatever a model does with the wrong number of tokens, it is the finding
        return [Problem(KEY, f"the model does not run with fewer tokens: {type(error).__name__}: {error}"[:300])]
    if not (isinstance(whole, Tensor) and isinstance(fewer, Tensor)) or whole.shape != fewer.shape:
        return [Problem(KEY, "the model's outputs speak of every token, so that none can go")]
    return []


def _wrong(module: nn.Module, example: Batch, config: StudentStage, chain: _Chain) -> list[str]:
    from compressor.models.tokens import attention_in

    count, found = len(chain.blocks), []
    for item in config.drop_tokens:
        if item.after >= count - 1:
            found.append(
                f"after = {item.after}: the model has {count} blocks, and the last one is the end of the tokens"
            )
        elif config.token_score == "attention" and attention_in(module, chain.blocks[item.after]) is None:
            found.append(f"`{chain.blocks[item.after]}` has no attention whose queries and keys could be read")
    if config.token_score == "attention" and not found and (why := _turned(module, example, chain)):
        found.append(f'the queries and keys {why}; take token_score = "norm"')
    length = _tokens(module, example, chain)
    if length is None:
        return [*found, "the blocks do not work on tokens (samples, tokens, width)"]
    if MASK not in example:  # every sample has as many
        for item in config.drop_tokens:
            if item.keep >= length:
                found.append(f"keep = {item.keep}: the model has {length} tokens, so that none would go")
    return found


def padded(example: Batch) -> dict[str, Tensor]:
    """The example with a masked last token, so that no implementation can leave its mask out."""
    made = dict(example)
    if MASK in made and made[MASK].shape[1] > 1:
        made[MASK] = made[MASK].clone()
        made[MASK][:, -1] = 0
    return made


def drop_tokens(
    student: nn.Module, example: Batch, config: StudentStage
) -> tuple[list[dict[str, Any]], list[LayerFact]]:
    """Put the drops into ``student`` in place; the steps and what became of the tokens of each block."""
    from compressor.models.rebuild import apply

    chain = _chain_of(student, example)
    if not config.drop_tokens or chain is None:
        return [], []
    step = _step(student, example, config, chain)
    length = _tokens(student, example, chain)
    apply(student, [step])
    how = "attention of the first token" if step["score"] == "attention" else "norm of the hidden states"
    before = "all tokens" if MASK in example else f"{length} tokens"
    facts = []
    for item in step["drops"]:
        after = f"{item['keep']} tokens" + (" at most" if MASK in example else "")
        facts.append(LayerFact(STAGE, item["block"], "narrowed", before, after, f"tokens by the {how}"))
        before = after
    return [step], facts


def _chain_of(module: nn.Module, example: Batch) -> _Chain | None:
    from compressor.models.signals import structure_of
    from compressor.models.structure.blocks import find_block_lists

    chains = [blocks for blocks in find_block_lists(module, example) if blocks.minimum]
    longest = max(chains, key=lambda blocks: blocks.count, default=None)
    if longest is None:
        return None
    names = [name for name, _ in module.get_submodule(longest.container).named_children()]
    pooling = structure_of(module).pooling
    others = [path for path, part in module.named_modules() if part is pooling]
    return _Chain(tuple(f"{longest.container}.{name}" for name in names), tuple(others))


def _turned(module: nn.Module, example: Batch, chain: _Chain) -> str:
    """Why queries and keys as they are projected are not what the attention compares; empty when they are."""
    from compressor.models.tokens import attention_in

    attention = attention_in(module, chain.blocks[0])
    if attention is None:
        return "cannot be read"
    if hasattr(attention.module, "has_relative_attention_bias"):
        return "get a bias by position"
    if any("position" in path[0] for path in _calls(module, example, chain.blocks[:1])[chain.blocks[0]]):
        return "are turned by position"
    widths = [getattr(getattr(attention.module, name), "out_features", 0) for name in attention.projections[:2]]
    return "are grouped" if len(set(widths)) > 1 else ""


def _step(module: nn.Module, example: Batch, config: StudentStage, chain: _Chain) -> dict[str, Any]:
    from compressor.models.tokens import attention_in

    blocks = [chain.blocks[item.after] for item in config.drop_tokens]
    readable = all(attention_in(module, block) is not None for block in blocks) and not _turned(module, example, chain)
    readers = (*chain.blocks[config.drop_tokens[0].after + 1 :], *chain.others)
    texts = MASK in example
    axes = _following(module, example, readers) if texts else {reader: [] for reader in readers}
    return {
        "op": "tokens",
        "score": config.token_score or ("attention" if readable else "norm"),
        "drops": [{"block": block, "keep": item.keep} for block, item in zip(blocks, config.drop_tokens, strict=True)],
        "readers": {reader: found for reader, found in axes.items() if found or not texts},
        **({} if texts else {"length": _tokens(module, example, chain)}),
    }


def _following(module: nn.Module, example: Batch, readers: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Which axes of the readers' arguments, hidden states aside, get shorter with the text, in any implementation of
    attention."""
    merged: dict[str, dict[tuple[str, ...], set[int]]] = {reader: {} for reader in readers}
    long, short = padded(example), padded(_shorter(example))
    for _ in _implementations(module):
        first, second = (_calls(module, batch, readers) for batch in (long, short))
        for reader in readers:
            sizes = {path: tensor.shape for path, tensor in second[reader].items()}
            for path, tensor in first[reader].items():
                other = sizes.get(path, tensor.shape)
                changed = {axis for axis in range(1, tensor.dim()) if other[axis] != tensor.shape[axis]}
                if changed:
                    merged[reader].setdefault(path, set()).update(changed)
    return {reader: _listed(axes) for reader, axes in merged.items()}


def _listed(axes: Mapping[tuple[str, ...], set[int]]) -> list[dict[str, Any]]:
    return [{"argument": list(path), "axes": sorted(where)} for path, where in sorted(axes.items()) if where]


def _shorter(example: Batch) -> dict[str, Tensor]:
    """The example without its last token."""
    length = example[MASK].shape[1]
    return {
        name: tensor[:, :-1] if tensor.dim() > 1 and tensor.shape[1] == length else tensor
        for name, tensor in example.items()
    }


@contextmanager
def _implementation(part: nn.Module, kind: str) -> Iterator[None]:
    """Another attention implementation of a transformers model, for a while."""
    before = part.config._attn_implementation
    part.set_attn_implementation(kind)
    try:
        yield
    finally:
        part.set_attn_implementation(before)


def _implementations(module: nn.Module) -> Iterator[None]:
    """Once as the model is, and once with plain attention, as the export traces it."""
    yield
    parts = [part for part in module.modules() if hasattr(part, "set_attn_implementation")]
    if parts and getattr(parts[0].config, "_attn_implementation", "eager") != "eager":
        with _implementation(parts[0], "eager"):
            yield


def _calls(module: nn.Module, example: Batch, readers: Sequence[str]) -> dict[str, dict[tuple[str, ...], Tensor]]:
    """The tensors that each reader is called with, by path, without the first: the hidden states."""
    from compressor.models.structure.trace import evaluating, few_samples, run
    from compressor.models.tokens import leaves

    seen: dict[str, dict[tuple[str, ...], Tensor]] = {reader: {} for reader in readers}

    def watch(reader: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            every = leaves(args, kwargs)
            hidden = next(iter(every), None)
            seen[reader] = {path: tensor for path, tensor in every.items() if path != hidden}

        return hook

    handles = [module.get_submodule(r).register_forward_pre_hook(watch(r), with_kwargs=True) for r in readers]
    try:
        with evaluating(module):
            run(module, few_samples(example))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _tokens(module: nn.Module, example: Batch, chain: _Chain) -> int | None:
    """How many tokens the blocks work on; None where their hidden states are not (samples, tokens, width)."""
    from compressor.models.structure.blocks import watching
    from compressor.models.structure.trace import evaluating, few_samples, run

    shapes: list[tuple[int, ...]] = []
    container = chain.blocks[0].rpartition(".")[0]
    with evaluating(module), watching(module, [container], lambda *call: shapes.append(tuple(call[3].shape))):
        run(module, few_samples(example))
    return shapes[0][1] if shapes and len(shapes[0]) == 3 else None


__all__ = ["drop_tokens", "problems_of"]
