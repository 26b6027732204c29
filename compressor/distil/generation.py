"""Text from a language model: greedy, sampled, or by beam search; deterministic, with a key-value cache.

A causal model continues prompts; an encoder-decoder model writes a target for each source (:func:`write_targets`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import StageError


@dataclass(frozen=True)
class Generated:
    """``ids`` int64 (B, P + n), prompts first; ``mask`` (B, P + n), 0 after a sample's end token."""

    ids: Tensor
    mask: Tensor


def language_model(module: nn.Module) -> nn.Module:
    """The transformers model inside ``module`` that keeps a key-value cache.

    Raises:
        StageError: there is none.
    """
    for part in module.modules():
        if "past_key_values" in inspect.signature(part.forward).parameters and hasattr(part, "lm_head"):
            return part
    raise StageError(
        "the model cannot generate text: it has no language-model head with a key-value cache",
        hint="Rollouts and teacher-made text need a causal language model of transformers.",
    )


def end_token(module: nn.Module) -> int | None:
    """The id of the token that ends a text, where the model's configuration names one."""
    found = getattr(language_model(module).config, "eos_token_id", None)
    return int(found[0]) if isinstance(found, list | tuple) else None if found is None else int(found)


def generate(
    module: nn.Module,
    prompts: Tensor,
    new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    end: int | None = None,
) -> Generated:
    """Continue ``prompts`` int64 (B, P), all of one length, by at most ``new_tokens``.

    ``temperature`` 0 takes the likeliest token (the first of equals); otherwise tokens are drawn by ``seed`` alone, so
    that a resumed run draws the same and the global random state does not move. No gradients; dropout is off and every
    module's mode is put back. A sample that ends is filled with its end token, masked out.
    """
    model = language_model(module)
    training = [part for part in module.modules() if part.training]
    module.eval()
    uniforms = torch.rand(new_tokens, len(prompts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    try:
        with torch.no_grad():
            return _generate(model, prompts, uniforms, _picker(temperature, top_k), end)
    finally:
        for part in training:
            part.training = True


def _generate(
    model: nn.Module, prompts: Tensor, uniforms: Tensor, pick: Callable[[Tensor, Tensor], Tensor], end: int | None
) -> Generated:
    ids, mask = [prompts], [torch.ones_like(prompts)]
    alive = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    fed, cache = prompts, None
    for drawn in uniforms:
        out = model(input_ids=fed, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        token = pick(out.logits[:, -1].float(), drawn.to(prompts.device))
        token = token if end is None else torch.where(alive, token, end)
        ids.append(token[:, None])
        mask.append(alive[:, None].to(prompts.dtype))
        if end is not None:
            alive = alive & (token != end)
            if not bool(alive.any()):
                break
        fed = token[:, None]
    return Generated(torch.cat(ids, dim=1), torch.cat(mask, dim=1))


def write_targets(
    module: nn.Module,
    sources: Mapping[str, Tensor],
    new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    beams: int = 1,
    several: bool = False,
) -> Generated:
    """Targets of an encoder-decoder model for ``input_ids`` and ``attention_mask`` (B, S), as :func:`generate` draws.

    ``ids`` (B, 1 + n) begin with the decoder's start token and end with the end token (then padding, masked out), where
    ``new_tokens`` allow it. More than one of ``beams``: the likeliest of transformers' own beam search, or with
    ``several`` all of them, (B * beams, 1 + n), the likeliest of each first.
    """
    model: Any = language_model(module)
    training = [part for part in module.modules() if part.training]
    module.eval()
    count = len(sources["input_ids"])
    uniforms = torch.rand(new_tokens, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    try:
        with torch.no_grad():
            if beams > 1:
                ids = model.generate(
                    **sources, max_new_tokens=new_tokens, num_beams=beams, do_sample=False, use_cache=True,
                    num_return_sequences=beams if several else 1,
                )  # fmt: skip
                ended = (ids[:, 1:] == model.config.eos_token_id).long()
                real = torch.cat([torch.ones_like(ids[:, :1]), (ended.cumsum(1) - ended == 0).long()], dim=1)
                return Generated(ids, real)
            return _targets(model, sources, uniforms, _picker(temperature, top_k))
    finally:
        for part in training:
            part.training = True


def _targets(
    model: Any, sources: Mapping[str, Tensor], uniforms: Tensor, pick: Callable[[Tensor, Tensor], Tensor]
) -> Generated:
    start, end, pad = (getattr(model.config, f"{name}_token_id") for name in ("decoder_start", "eos", "pad"))
    read, cache = model.get_encoder()(**sources), None
    alive = torch.ones(len(uniforms[0]), dtype=torch.bool, device=sources["input_ids"].device)
    fed = torch.full_like(sources["input_ids"][:, :1], start)
    ids, mask = [fed], [torch.ones_like(fed)]
    for drawn in uniforms:
        out = model(
            encoder_outputs=read, attention_mask=sources["attention_mask"], decoder_input_ids=fed,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        if pad != end:
            logits[:, pad] = -torch.inf  # padding is never written
        token = torch.where(alive, pick(logits, drawn.to(fed.device)), pad)
        ids.append(token[:, None])
        mask.append(alive[:, None].to(fed.dtype))
        alive = alive & (token != end)
        if not bool(alive.any()):
            break
        fed = token[:, None]
    return Generated(torch.cat(ids, dim=1), torch.cat(mask, dim=1))


def _picker(temperature: float, top_k: int) -> Callable[[Tensor, Tensor], Tensor]:
    if temperature == 0:
        return lambda logits, _: logits.argmax(-1)

    def draw(logits: Tensor, uniform: Tensor) -> Tensor:
        if top_k:
            least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        steps = torch.softmax(logits.double() / temperature, dim=-1).cumsum(-1)
        steps = steps / steps[:, -1:]
        return torch.searchsorted(steps, uniform[:, None], right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)

    return draw


def beam_search(
    module: nn.Module, prompts: Tensor, new_tokens: int, beams: int, end: int | None, *, several: bool = False
) -> Generated:
    """The likeliest of ``beams`` hypotheses by transformers' own beam search; ``several``: all, likeliest first."""
    model: Any = language_model(module)
    mask = torch.ones_like(prompts)
    with torch.no_grad():
        ids = model.generate(
            prompts, attention_mask=mask, max_new_tokens=new_tokens, num_beams=beams, do_sample=False, use_cache=True,
            eos_token_id=end, pad_token_id=end if end is not None else 0,
            num_return_sequences=beams if several else 1,
        )  # fmt: skip
    made = torch.ones_like(ids)
    if end is not None:
        ended = (ids[:, prompts.shape[1] :] == end).long()
        made[:, prompts.shape[1] :] = (ended.cumsum(1) - ended == 0).long()
    return Generated(ids, made)
