"""The vocabulary of a corpus: a smaller tokenizer, data in its ids, and a teacher that reads them (methods T5, V1).

The vocabulary is found when a session is opened, from the tokens of train, validation, calibration and transfer, and of
``extra_corpus``; never from test. From then on student and teacher read the ids of the smaller tokenizer (the teacher
through a map, :mod:`compressor.models.vocabulary`), so that nothing in training knows of two vocabularies. The
teacher's own file, and its scores, keep its own tokenizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compressor.data.load import load_data
from compressor.data.raw import RawData
from compressor.data.text import load_tokenizer
from compressor.data.types import DataBundle, Split
from compressor.errors import PlanError, Problem
from compressor.models.types import LoadedModel, TextInput
from compressor.recipe import DataConfig, Recipe, StudentStage
from compressor.students.tokenizer import TrimmedTokenizer, trim_tokenizer
from compressor.types import Array

CORPUS = ("train", "validation", "calibration", "transfer")
BATCH = 256


@dataclass(frozen=True)
class Trimmed:
    """Model and data as the student sees them. ``text`` says what became of the vocabulary."""

    model: LoadedModel
    data: DataBundle
    text: str
    keep: Array


def trim(model: LoadedModel, data: DataBundle, raw: RawData, recipe: Recipe) -> Trimmed | None:
    """Model and data in the ids of the corpus's vocabulary; None when no stage asks for it.

    Raises:
        PlanError: the model is no transformers model of texts, its tokenizer cannot be trimmed, ``keep_tokens`` is too
            small or nothing would go.
    """
    asked = recipe.student_with("vocabulary")
    if asked is None:
        return None
    where, stage = asked
    try:
        return _trim(model, data, raw, recipe.data, stage, recipe.seed)
    except PlanError as error:
        raise PlanError(
            "the vocabulary", [Problem(f"{where}.{item.where}", item.what) for item in error.problems]
        ) from error


def _trim(
    model: LoadedModel, data: DataBundle, raw: RawData, config: DataConfig, stage: StudentStage, seed: int
) -> Trimmed:
    from compressor.models.vocabulary import read_ids

    text = model.preprocess
    if not isinstance(text, TextInput) or model.module is None:
        raise PlanError.single("vocabulary", "matches nothing: only a checkpoint that reads texts has a vocabulary")
    counts = {name: token_counts(data.splits[name]) for name in CORPUS if name in data.splits}
    total = _summed([*counts.values(), *_extra(stage, model, text)])
    small = trim_tokenizer(
        model.files[text.tokenizer_file], {int(i): int(total[i]) for i in np.flatnonzero(total)}, stage.keep_tokens
    )
    module = read_ids(model.module, small.keep.tolist())
    own = replace(
        model,
        module=module,
        preprocess=_renamed(text, small.keep),
        outputs=outputs_over(model, module, len(small.keep)),
        files={**model.files, text.tokenizer_file: small.content},
    )
    quick = config if config.near_duplicates == "drop" else config.model_copy(update={"near_duplicates": "off"})
    made = load_data(quick, own, seed=seed, raw=raw)
    digests = {name: digest_with(value, small.content) for name, value in data.digests.items()}
    told = _told(small, counts, data, made, model)
    return Trimmed(own, replace(made, digests=digests, near=data.near, notes=data.notes), told, small.keep)


def token_counts(split: Split) -> Array:
    """How often each id stands in a split, int64 (ids,); padding does not count."""
    total = np.zeros(0, np.int64)
    for start in range(0, len(split), BATCH):
        inputs = split.batch(np.arange(start, min(start + BATCH, len(split))))
        total = _summed([total, np.bincount(inputs["input_ids"][inputs["attention_mask"].astype(bool)])])
    return total


def _summed(counts: Sequence[Array]) -> Array:
    total = np.zeros(max((len(each) for each in counts), default=0), np.int64)
    for each in counts:
        total[: len(each)] += each
    return total


def _extra(stage: StudentStage, model: LoadedModel, text: TextInput) -> list[Array]:
    """The tokens of a text file beside the data, a text a line."""
    if stage.extra_corpus is None:
        return []
    try:
        lines = Path(stage.extra_corpus).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError.single("extra_corpus", f"`{stage.extra_corpus}` cannot be read: {error}") from error
    tokenizer = load_tokenizer(model, text)
    tokenizer.no_truncation()
    found = tokenizer.encode_batch([line for line in lines if line.strip()])
    return [np.bincount(np.array([number for one in found for number in one.ids], np.int64))] if found else []


def _renamed(text: TextInput, keep: Array) -> TextInput:
    new = {int(old): position for position, old in enumerate(keep)}
    changed: dict[str, Any] = {"pad_id": new.get(text.pad_id, 0)}  # without a padding token any id may fill
    if text.mask_id is not None:
        changed["mask_id"] = new.get(text.mask_id)
    if text.eos_id is not None:
        changed["eos_id"] = new.get(text.eos_id)
    return text.model_copy(update=changed)


def outputs_over(model: LoadedModel, module: Any, tokens: int) -> Any:
    """The outputs of a model whose vocabulary has so many tokens now."""
    from compressor.models.vocabulary import tables_of

    tables = tables_of(module)
    if tables is None or tables.output is None:
        return model.outputs
    first = model.outputs[0]
    return (replace(first, shape=(*first.shape[:-1], tokens)), *model.outputs[1:])


def digest_with(value: str, tokenizer: bytes) -> str:
    """A digest of data that are cut by this tokenizer."""
    return "sha256:" + hashlib.sha256(value.encode() + tokenizer).hexdigest()


def rows_of(split: Split) -> list[Array]:
    """The ids of each sample without padding."""
    found: list[Array] = []
    for start in range(0, len(split), BATCH):
        inputs = split.batch(np.arange(start, min(start + BATCH, len(split))))
        mask = inputs["attention_mask"].astype(bool)
        found += [ids[real] for ids, real in zip(inputs["input_ids"], mask, strict=True)]
    return found


def unchanged(before: Split, after: Split, keep: Array) -> Array:
    """Which samples have the same tokens before and after, bool (N,)."""
    pairs = zip(rows_of(before), rows_of(after), strict=True)
    return np.array([len(old) == len(new) and bool((keep[new] == old).all()) for old, new in pairs], bool)


def _told(
    small: TrimmedTokenizer, counts: Mapping[str, Array], data: DataBundle, made: DataBundle, model: LoadedModel
) -> str:
    from compressor.models.vocabulary import tables_of

    assert model.module is not None
    tables = tables_of(model.module)
    assert tables is not None
    before = model.module.get_submodule(tables.embedding).num_embeddings
    text = f"vocabulary: {before:,} -> {len(small.keep):,} tokens"
    if model.task != "causal-lm":  # blocks of a stream shift as a whole
        same = unchanged(data.splits["validation"], made.splits["validation"], small.keep)
        text += f"; {100 * (1 - same.mean()):.1f} % of the validation texts are cut into other tokens"
    others = _summed([count for name, count in counts.items() if name != "validation"])
    mine = counts["validation"]
    known = np.zeros(len(mine), bool)
    known[: len(others)] = others[: len(mine)] > 0
    share = 100 * float(mine[~known].sum()) / max(int(mine.sum()), 1)
    return f"{text}; {share:.1f} % of the validation tokens stand in no other part (so much is new in new text)"


__all__ = ["Trimmed", "digest_with", "outputs_over", "token_counts", "trim", "unchanged"]
