"""Rows of another tokenizer learnt inside the model itself: the text in both tokenizations at once (methods V2).

Runs of words are cut by the new tokenizer with probability ``p``, the others by the model's own; the frozen model reads
both kinds of tokens from one table and a language model predicts both. Only the new rows learn, so that they come to
mean what the model's own tokens mean. Zhao et al., "Extremely Small BERT Models from Mixed-Vocabulary Training", 2021,
do this with a masked language model and project narrow embeddings to the teacher's width; here the student still has
the teacher's width, and a model without an output over tokens learns to answer as it does on its own tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.errors import PlanError
from compressor.models.types import LoadedModel, TextInput
from compressor.types import Array

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 8  # texts a step
RATE = 1e-3  # of Adam, on the new rows alone
_WORD = re.compile(r"\s*\S+")


@dataclass(frozen=True)
class Mixer:
    """Cuts texts with two tokenizers; ids of the second stand behind the ``offset`` of the first."""

    own: Any
    new: Any
    offset: int
    length: int
    end: int | None = None  # of a text, for language models

    def ids(self, text: str, coins: Array) -> list[int]:
        """Tokens of a text whose k-th word is cut by the new tokenizer where ``coins[k]`` is true.

        Words that follow each other in one vocabulary are cut together: without any coin it is the text as ever.
        """
        before, after = self._frame()
        found: list[int] = []
        for words, new in _runs(text, coins):
            made = (self.new if new else self.own).encode(words, add_special_tokens=False).ids
            found += [number + self.offset for number in made] if new else made
        room = max(1, self.length - len(before) - len(after))
        return [*before, *found[:room], *after]

    def _frame(self) -> tuple[list[int], list[int]]:
        """Special tokens around a text, as the model's own tokenizer writes them; a language model's end."""
        if self.end is not None:
            return [], [self.end]
        special = self.own.encode("").ids
        return special[:1], special[1:]


def _runs(text: str, coins: Array) -> list[tuple[str, bool]]:
    """The text as runs of words with equal coins."""
    runs: list[tuple[str, bool]] = []
    for place, word in enumerate(_WORD.findall(text)):
        new = bool(coins[place % len(coins)])
        if runs and runs[-1][1] == new:
            runs[-1] = (runs[-1][0] + word, new)
        else:
            runs.append((word, new))
    return runs


class Mixture:
    """The model under both vocabularies: its own rows are fixed, those of the new tokenizer learn."""

    def __init__(self, original: LoadedModel, rows: Mapping[str, Tensor]) -> None:
        import torch

        from compressor.models.vocabulary import table_parameters, with_tables

        assert original.module is not None
        tables = table_parameters(original.module)
        self.fixed = {name: table.detach() for name, table in tables.items()}
        self.new = {name: rows[name].detach().float().clone().requires_grad_() for name in tables}
        self.offset = len(next(iter(self.fixed.values())))
        both = {name: torch.cat([self.fixed[name], rows[name]]) for name in tables}
        self.module = with_tables(original.module, both, {number: number for number in range(self.offset)}).eval()
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        import torch
        from torch.func import functional_call

        both = {name: torch.cat([self.fixed[name], self.new[name]]) for name in self.new}
        output: Tensor = functional_call(self.module, both, kwargs=dict(inputs), tie_weights=True)
        return output


def batch_of(rows: Sequence[Sequence[int]], model: LoadedModel) -> dict[str, Tensor]:
    """Padded inputs (B, T) of the model."""
    import torch

    text = model.preprocess
    assert isinstance(text, TextInput)
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), text.pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: made[name] for name in text.names}


def loss_of(model: LoadedModel, run: Callable[[Mapping[str, Tensor]], Tensor], rows: Any, plain: Any) -> Tensor:
    """What the mixed texts cost: next-token cross-entropy of a language model, over the vocabularies in the batch, or
    the distance to the answer on the model's own tokens (``plain``), KL of classes or 1 - cosine of vectors."""
    import torch
    import torch.nn.functional as F

    batch = batch_of(rows, model)
    output = run(batch)
    own = getattr(run, "offset", None)  # tokens of the model itself
    if own is not None and int(batch["input_ids"].max()) < own:
        output = output[..., :own]  # nothing is mixed: the model's own loss
    if model.task == "causal-lm":
        labels = torch.where(batch["attention_mask"][:, 1:] != 0, batch["input_ids"][:, 1:], -100)
        return F.cross_entropy(output[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
    with torch.no_grad():
        assert model.module is not None
        wanted = model.module(**batch_of(plain, model))
    if model.task == "sentence-embedding":
        return (1 - F.cosine_similarity(output, wanted, dim=-1)).mean()
    p, q = F.log_softmax(wanted.float(), -1), F.log_softmax(output.float(), -1)
    return (p.exp() * (p - q)).sum(-1).mean()


def learn(
    original: LoadedModel,
    content: bytes,
    rows: Mapping[str, Tensor],
    texts: Sequence[str],
    *,
    steps: int,
    probability: float,
    seed: int,
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    """New tables by parameter name, learnt from ``rows``; and the mean loss of the first and last tenth of the steps.

    Raises:
        PlanError: the model gives something else than classes, vectors or next tokens.
    """
    import torch

    if original.task not in ("causal-lm", "text-classification", "sentence-embedding"):
        raise PlanError.single("transplant", f'"mixed" is not for the task {original.task}')
    mixture = Mixture(original, rows)
    mixer = mixer_of(original, content, mixture.offset)
    draw = np.random.default_rng(seed)
    optimiser = torch.optim.Adam(list(mixture.new.values()), lr=RATE)
    losses: list[float] = []
    for _ in range(steps):
        chosen = [texts[int(place)] for place in draw.integers(0, len(texts), BATCH)]
        coins = [draw.random(256) < probability for _ in chosen]
        mixed = [mixer.ids(text, own) for text, own in zip(chosen, coins, strict=True)]
        plain = [mixer.ids(text, np.zeros(1, bool)) for text in chosen]
        loss = loss_of(original, mixture, mixed, plain)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    tenth = max(1, steps // 10)
    found = {name: new.detach().to(mixture.fixed[name].dtype) for name, new in mixture.new.items()}
    return found, (float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:])))


def mixer_of(original: LoadedModel, content: bytes, offset: int) -> Mixer:
    """Both tokenizers, neither cutting nor padding."""
    from tokenizers import Tokenizer

    text = original.preprocess
    assert isinstance(text, TextInput)
    own, new = (Tokenizer.from_str(each.decode()) for each in (original.files[text.tokenizer_file], content))
    return Mixer(own, new, offset, text.max_length, text.eos_id if original.task == "causal-lm" else None)


__all__ = ["Mixer", "Mixture", "batch_of", "learn", "loss_of", "mixer_of"]
