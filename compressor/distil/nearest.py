"""Of several hypotheses the one nearest to what the data says: sequence-level interpolation (methods X2)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

ORDER = 4  # longest n-gram


def sentence_bleu(hypothesis: Sequence[int], reference: Sequence[int]) -> float:
    """BLEU of one sequence of tokens, 0..1, with 1 added to the counts of all n-grams but the single tokens.

    Source: Papineni et al., "BLEU", 2002; smoothing: Lin and Och, "ORANGE", 2004. Equal to sacrebleu's ``add-k`` with
    k = 1 on the same tokens.

    >>> round(sentence_bleu([1, 2, 3, 4], [1, 2, 3, 4]), 6), sentence_bleu([], [1])
    (1.0, 0.0)
    """
    if not hypothesis or not reference:
        return 0.0
    logs = 0.0
    for size in range(1, ORDER + 1):
        mine, theirs = _grams(hypothesis, size), _grams(reference, size)
        right, total = sum((mine & theirs).values()), sum(mine.values())
        more = int(size > 1)
        if right + more == 0 or total + more == 0:
            return 0.0
        logs += math.log((right + more) / (total + more)) / ORDER
    return math.exp(logs + min(0.0, 1 - len(reference) / len(hypothesis)))


def _grams(tokens: Sequence[int], size: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1))


def nearest(hypotheses: Sequence[Sequence[int]], reference: Sequence[int]) -> int:
    """Which hypothesis has the highest :func:`sentence_bleu`; of equal ones the first, which is the likeliest."""
    scores = [sentence_bleu(hypothesis, reference) for hypothesis in hypotheses]
    return scores.index(max(scores))
