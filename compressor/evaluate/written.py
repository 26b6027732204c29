"""What encoder-decoder models write: greedy decoding through any runtime, and the metrics of texts.

A *row* (float64, :data:`WIDTH` columns) holds the statistics of one sample whose sums give every metric, so that
predictions are stored as numbers and no text is kept. The columns: negative log-likelihood, tokens and right guesses of
the teacher-forced pass; word edits and words of the reference; equal texts; statistics of BLEU and chrF; ROUGE-1, -2
and -L (F).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np

from compressor.errors import RunError
from compressor.types import Array, Inputs, Task

DECODER = ("decoder_input_ids", "decoder_attention_mask")
EDITS, WORDS, EQUAL = 3, 4, 5
BLEU, CHRF, ROUGE = slice(6, 16), slice(16, 34), slice(34, 37)
WIDTH = 37
DRAWS = 200  # of the bootstrap


class Targets(Protocol):
    """What a split says of its target texts; :class:`compressor.data.targets.Targets` fits."""

    @property
    def references(self) -> Sequence[str]: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def pad(self) -> int: ...
    @property
    def limit(self) -> int: ...
    @property
    def decode(self) -> Callable[[Sequence[int]], str]: ...


def write(call: Callable[[Inputs], Array], sources: Inputs, targets: Targets) -> list[list[int]]:
    """The likeliest token after another (greedy decoding), without the end token.

    ``call`` gives logits (N, T, V) for ``sources`` together with the decoder's inputs. No cache is kept: every step
    runs the model on all that was written. Of equal logits the first token is taken.
    """
    count = len(next(iter(sources.values())))
    ids = np.full((count, 1), targets.start, np.int64)
    alive = np.ones(count, dtype=bool)
    for step in range(targets.limit):
        logits = call({**sources, DECODER[0]: ids, DECODER[1]: np.ones_like(ids)})
        token = next_tokens(logits[:, step], targets)
        ids = np.concatenate([ids, np.where(alive, token, targets.pad)[:, None]], axis=1)
        alive &= token != targets.end
        if not alive.any():
            break
    return [_until(row[1:].tolist(), targets.end) for row in ids]


def next_tokens(logits: Array, targets: Targets) -> Array:
    """The likeliest token of each row (N, V); padding is never written."""
    if targets.pad == targets.end:
        return np.asarray(np.argmax(logits, axis=1))
    logits = logits.copy()
    logits[:, targets.pad] = -np.inf
    return np.asarray(np.argmax(logits, axis=1))


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def judge(texts: Sequence[str], references: Sequence[str]) -> Array:
    """float64 (N, WIDTH - 3): the statistics of what was written, without those of the teacher-forced pass."""
    return np.array([_statistics(text, wanted) for text, wanted in zip(texts, references, strict=True)], np.float64)


def _statistics(text: str, wanted: str) -> list[float]:
    bleu, chrf = _sacrebleu()
    words, right = text.split(), wanted.split()
    return [
        float(edits(words, right)),
        float(len(right)),
        float(words == right),
        *bleu._extract_corpus_statistics([text], [[wanted]])[0],
        *chrf._extract_corpus_statistics([text], [[wanted]])[0],
        *rouge(text, wanted),
    ]


@cache
def _sacrebleu() -> tuple[Any, Any]:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        hint = "pip install 'compress-for-device[train]'"
        raise RunError("BLEU and chrF need the package `sacrebleu`", hint=hint) from error
    return metrics.BLEU(
        force=True
    ), metrics.CHRF()  # force: texts are as the model writes them, even if that looks tokenised


def edits(first: Sequence[str], second: Sequence[str]) -> int:
    """Least number of insertions, deletions and substitutions that make one the other (Levenshtein, 1966).

    >>> edits("k i t t e n".split(), "s i t t i n g".split())
    3
    """
    row = list(range(len(second) + 1))
    for i, mine in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (mine != other))
    return row[-1]


def rouge(text: str, wanted: str) -> tuple[float, float, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L of one text (Lin, 2004), over lower-cased runs of letters and digits."""
    mine, right = (re.sub(r"[^a-z0-9]+", " ", one.lower()).split() for one in (text, wanted))
    grams = [_overlap(mine, right, size) for size in (1, 2)]
    return grams[0], grams[1], _f1(_common(mine, right), len(mine), len(right))


def _overlap(first: Sequence[str], second: Sequence[str], size: int) -> float:
    one, two = (Counter(tuple(part[i : i + size]) for i in range(len(part) - size + 1)) for part in (first, second))
    return _f1((one & two).total(), one.total(), two.total())


def _f1(common: int, first: int, second: int) -> float:
    return 2 * common / (first + second) if common else 0.0


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for mine in first:
        before = 0
        for j, other in enumerate(second, 1):
            before, row[j] = row[j], before + 1 if mine == other else max(row[j], row[j - 1])
    return row[-1]


def value(task: Task, rows: Array) -> float:
    """The task's metric over the whole set, 1 at best.

    ``text2text-generation``: 1 - word error rate, the word edits of all samples by the words of all references.
    ``translation``: sacrebleu's corpus BLEU (13a tokens, exponential smoothing). ``summarization``: mean F1 of ROUGE-L.
    """
    return _value(task, rows.sum(axis=0), len(rows))


def _value(task: Task, sums: Array, count: int) -> float:
    if task == "translation":
        return _scored(0, sums[BLEU])
    if task == "summarization":
        return float(sums[ROUGE][2]) / count
    if not sums[WORDS]:
        raise ValueError("there is no word in any reference")
    return 1 - float(sums[EDITS] / sums[WORDS])


def _scored(which: int, sums: Array) -> float:
    """BLEU (0) or chrF (1) of a corpus from its statistics, in 0..1."""
    return float(_sacrebleu()[which]._compute_score_from_stats([round(number) for number in sums]).score) / 100


def standard_error(task: Task, rows: Array) -> float:
    """Of :func:`value`, by drawing the samples anew :data:`DRAWS` times (Koehn, "Statistical Significance Tests for
    Machine Translation Evaluation", 2004); the same rows give the same number."""
    random = np.random.Generator(np.random.PCG64(len(rows)))
    drawn = random.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=DRAWS) @ rows
    return float(np.std([_value(task, sums, len(rows)) for sums in drawn if sums[WORDS]], ddof=1))


def figures(task: Task, rows: Array) -> Mapping[str, float]:
    """The standard error of the task's metric and every other metric of the rows, for the detail of a figure."""
    sums = rows.sum(axis=0)
    tokens = max(float(sums[1]), 1.0)
    return {
        "standard_error": standard_error(task, rows),
        "word_error_rate": 1 - _value("text2text-generation", sums, len(rows)),
        "exact_match": float(sums[EQUAL]) / len(rows),
        "bleu": _scored(0, sums[BLEU]),
        "chrf": _scored(1, sums[CHRF]),
        **{f"rouge_{name}": float(part) / len(rows) for name, part in zip("12l", sums[ROUGE], strict=True)},
        "tokens": tokens,
        "perplexity": float(np.exp(sums[0] / tokens)),
        "next_token_accuracy": float(sums[2]) / tokens,
    }
