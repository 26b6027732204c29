"""Teacher-made text for a distil stage, stored by its content's key like any other stage (methods X2).

A causal model continues the beginnings of the training text; an encoder-decoder model writes a target a source.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compressor.data.blocks import IGNORED, BlockSplit
from compressor.data.targets import TargetSplit, pair_digests, table_of
from compressor.data.text import TextSplit
from compressor.data.types import DataBundle
from compressor.errors import StageError
from compressor.language import Sequences
from compressor.ledger import StageOutput, code_digest
from compressor.stages.run import Run
from compressor.types import TEXT2TEXT

BATCH = 32
FILE = "sequences.npz"


def with_sequences(run: Run, config: Sequences) -> DataBundle:
    """The run's data with the training text replaced by what the teacher writes.

    Raises:
        StageError: the task is not a language model's.
    """
    if run.model.task != "causal-lm" and run.model.task not in TEXT2TEXT:
        raise StageError("`sequences` is for language models", hint=f"The task is {run.model.task}.")
    key = {
        "teacher": run.model.provenance.digest,
        "config": config.model_dump(mode="json"),
        "data": run.data.digests["train"],
        "seed": run.recipe.seed,
        "code": code_digest("distil/generation", "distil/nearest", "stages/sequences"),
    }
    write = _write_targets if run.model.task in TEXT2TEXT else _write
    result = run.ledger.stage("seq-kd", key, lambda folder: write(run, config, folder))
    with np.load(result.folder / FILE, allow_pickle=False) as stored:
        split: Any = (
            _with_targets(run.data.splits["train"], stored["labels"])
            if run.model.task in TEXT2TEXT
            else BlockSplit(
                "train", stored["labels"], stored["digests"], stored["ids"], stored["lengths"], run.model.inputs
            )
        )
    return replace(
        run.data, splits={**run.data.splits, "train": split}, digests={**run.data.digests, "train": result.key}
    )


def _write(run: Run, config: Sequences, folder: Path) -> StageOutput:
    texts = _texts(run, config)
    prompts = np.stack([row[: config.prompt_tokens] for row in texts])
    golds = [row[config.prompt_tokens : config.prompt_tokens + config.max_new_tokens].tolist() for row in texts]
    ids, lengths = [], []
    for start in range(0, len(prompts), BATCH):
        made, mask = _continue(run, config, prompts[start : start + BATCH], golds[start : start + BATCH], start)
        ids += list(made)
        lengths += mask.sum(axis=1).tolist()
    width = max(len(row) for row in ids)
    table = np.stack([np.pad(row, (0, width - len(row))) for row in ids]).astype(np.int32)
    count = np.asarray(lengths, np.int64)
    labels = np.full_like(table, IGNORED)
    labels[:, :-1] = table[:, 1:]
    places = np.arange(width)[None]
    labels[(places < prompts.shape[1] - 1) | (places >= count[:, None] - 1)] = IGNORED
    digests = np.array([f"seq-{row}".encode() for row in range(len(table))], dtype="S16")
    np.savez(folder / FILE, ids=table, labels=labels, lengths=count, digests=digests)
    return StageOutput({"sequences": len(table), "tokens": int((labels != IGNORED).sum())})


def _write_targets(run: Run, config: Sequences, folder: Path) -> StageOutput:
    from compressor.distil.generation import Generated, write_targets

    train: Any = run.data.splits["train"]
    count = min(config.samples or len(train), len(train))
    length = min(config.max_new_tokens, train.targets.limit)
    rows: list[np.ndarray[Any, Any]] = []
    for start in range(0, count, BATCH):
        sources = run.tensors(train.source.batch(np.arange(start, min(start + BATCH, count))))
        seed = run.recipe.seed * 1_000_003 + start
        several = config.choose == "nearest"
        made = write_targets(
            run.teacher, sources, length, temperature=config.temperature, seed=seed, beams=config.beams, several=several
        )
        if several:
            golds = [row[row != IGNORED].tolist() for row in train.labels[start : start + len(sources["input_ids"])]]
            kept = _nearest(made.ids[:, 1:], made.mask[:, 1:], golds, config.beams)
            made = Generated(made.ids[kept], made.mask[kept])
        real = made.mask[:, 1:].numpy() != 0
        rows += [ids[keep] for ids, keep in zip(made.ids[:, 1:].numpy(), real, strict=True)]
    labels = table_of(rows)
    np.savez(folder / FILE, labels=labels)
    return StageOutput({"sequences": len(labels), "tokens": int((labels != IGNORED).sum())})


def _with_targets(train: Any, labels: np.ndarray[Any, Any]) -> TargetSplit:
    """The first sources of ``train`` with these targets (N, L)."""
    source: TextSplit = train.source
    own = replace(source, rows=source.rows[: len(labels)], digests=source.digests[: len(labels)])
    texts = tuple(train.targets.decode(row[row != IGNORED].tolist()) for row in labels)
    return TargetSplit("train", labels, pair_digests(own.digests, texts), own, replace(train.targets, references=texts))


def _nearest(ids: Any, mask: Any, golds: list[list[int]], beams: int) -> list[int]:
    """Of each sample's hypotheses (B * beams, n) the row that is nearest to what the data says."""
    from compressor.distil.nearest import nearest

    rows = [row[keep != 0].tolist() for row, keep in zip(ids, mask, strict=True)]
    return [at * beams + nearest(rows[at * beams : (at + 1) * beams], gold) for at, gold in enumerate(golds)]


def _texts(run: Run, config: Sequences) -> list[np.ndarray[Any, Any]]:
    """The real tokens of the training blocks that are long enough for a prompt.

    Raises:
        StageError: none is.
    """
    train = run.data.splits["train"]
    index = np.arange(min(config.samples or len(train), len(train)))
    batches = [train.batch(index[start : start + 256]) for start in range(0, len(index), 256)]
    rows = (zip(batch["input_ids"], batch["attention_mask"], strict=True) for batch in batches)
    long = [row[mask != 0] for part in rows for row, mask in part if mask.sum() >= config.prompt_tokens]
    if not long:
        raise StageError(
            "no training block is as long as `prompt_tokens`", hint="Make `sequences.prompt_tokens` smaller."
        )
    return long


def _continue(
    run: Run, config: Sequences, prompts: np.ndarray[Any, Any], golds: list[list[int]], start: int
) -> tuple[Any, Any]:
    """Prompts with what the teacher writes, and the mask; ``golds``: what the data says there."""
    import torch

    from compressor.distil.generation import beam_search, end_token, generate

    tokens = torch.from_numpy(prompts.astype(np.int64))
    end = end_token(run.teacher)
    if config.choose == "nearest":
        made = beam_search(run.teacher, tokens, config.max_new_tokens, config.beams, end, several=True)
        kept = _nearest(made.ids[:, prompts.shape[1] :], made.mask[:, prompts.shape[1] :], golds, config.beams)
        return made.ids[kept].numpy(), made.mask[kept].numpy()
    if config.beams > 1:
        made = beam_search(run.teacher, tokens, config.max_new_tokens, config.beams, end)
    else:
        seed = run.recipe.seed * 1_000_003 + start
        made = generate(run.teacher, tokens, config.max_new_tokens, temperature=config.temperature, seed=seed, end=end)
    return made.ids.numpy(), made.mask.numpy()
