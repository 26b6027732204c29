"""The claims on movie reviews that make sense there; one size of student, the same fifty steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tools.bench_methods.arms import LABELS, Arm, Row, kd, objective, stage

RATES = 1e-4, 3e-4
STEPS = 50


def arm(labelled: int, keys: dict[str, Any], teacher: str = "MiniLM-L6", **more: Any) -> Arm:
    return Arm(labelled, keys, teacher, data="shuffled reviews", steps=STEPS, rates=RATES, bench="text",
               **({"start": "copied"} | more))  # fmt: skip


def rows() -> dict[str, Row]:
    """All of them by name."""
    plain = {count: arm(count, LABELS, "") for count in (500, 2000)}
    taught = {500: arm(500, kd(2.0, 0.9)), 2000: arm(2000, kd(1.0, 0.9))}
    ranked = arm(2000, stage(0.0, objective("plackett-luce")))
    agreeing = arm(500, stage(0.0, objective("symmetric-kl")), transfer=3000)
    found = {
        "text-kd-500": Row("kd (temperature 2, weight 0.9) > labels, 500 reviews", taught[500], plain[500], ids="L1"),
        "text-kd-2000": Row("kd (temperature 1, weight 0.9) > labels, 2000 reviews", taught[2000], plain[2000],
                            ids="L1"),
        "text-gain": Row("what kd gains over labels: 500 reviews > 2000", (taught[500], plain[500]),
                         (taught[2000], plain[2000]), ids="T11"),
        "text-symmetric-kl": Row("symmetric-kl without labels on 3500 reviews > 500 labels", agreeing, plain[500],
                                 ids="D3"),
        "text-truncated": Row("layers 1, 3, 5 copied > the same layers random; labels alone, 2000 reviews",
                              plain[2000], arm(2000, LABELS, "", start="random"), ids="N3"),
        "text-plackett-luce": Row("plackett-luce > labels, 2000 reviews (of two classes it orders one: cross-entropy "
                                  "weighted by the teacher's belief in the label)", ranked, plain[2000], ids="L4"),
    }  # fmt: skip
    for metric in ("label loyalty", "probability loyalty"):
        claim = f"{metric} to the teacher: kd > labels, 2000 reviews"
        found[f"text-{metric.replace(' ', '-')}"] = Row(claim, taught[2000], plain[2000], metric, ids="M1")
    return {name: replace(row, robust=True) for name, row in found.items()}
