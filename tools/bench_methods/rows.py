"""The claims on Fashion-MNIST. A new one is one entry of the table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tools.bench_methods.arms import LABELS, Arm, Row, kd, objective, stage

HARD = 0.1  # weight of the labels beside kd at temperature 1
KD = kd(1.0, 0.9)
RANKED = stage(0.0, objective("plackett-luce"))
AGREE = stage(0.0, objective("symmetric-kl"))
SOFT = stage(0.0, objective("kd", temperature=1.0))
FIXED = (3e-3,)  # not tuned: the metric is not one that validation knows


def plain(images: int, **more: Any) -> Arm:
    """Labels alone."""
    return Arm(images, LABELS, **more)


def taught(images: int, keys: dict[str, Any], teacher: str = "40k", **more: Any) -> Arm:
    return Arm(images, keys, teacher, **more)


def robust() -> dict[str, Row]:
    """What the pilot of methods.md found on 5 of 5 seeds, and what it calls very robust."""
    found = {}
    for images, keys, said in ((500, kd(2.0, 0.9), "2, weight 0.9"), (2000, KD, "1, weight 0.9")):
        found[f"kd-{images}"] = Row(f"kd (temperature {said}) > labels, {images} images", taught(images, keys),
                                    plain(images), ids="L1")  # fmt: skip
    found["kd-10000"] = Row("kd (temperature 1, weight 0.9) > labels, 10,000 images", taught(10_000, KD),
                            plain(10_000), ids="L1")  # fmt: skip
    for images in (500, 2000, 10_000):
        found[f"plackett-luce-{images}"] = Row(f"plackett-luce > labels, {images:,} images", taught(images, RANKED),
                                               plain(images), ids="L4")  # fmt: skip
    found["symmetric-kl"] = Row("symmetric-kl without labels on 10,000 images > 1000 labels; teacher of the same 1000",
                                taught(1000, AGREE, "1k", transfer=9000), plain(1000), ids="D3")  # fmt: skip
    for metric in ("label loyalty", "probability loyalty"):
        found[metric.replace(" ", "-")] = Row(f"{metric} to the teacher: kd > labels, 2000 images", taught(2000, KD),
                                              plain(2000), metric, ids="M1")  # fmt: skip
    small = taught(10_000, SOFT, start="pruned", steps=300)
    found["pruned"] = Row("3/4 of the channels pruned > same size from scratch; kd alone, 300 steps, 10,000 images",
                          small, replace(small, start="pruned, redrawn"), ids="U1")  # fmt: skip
    found |= laundering()
    cut = Arm(2000, LABELS, start="truncated", network="residual", steps=300)
    found["truncated"] = Row("2 of 4 blocks copied > the same, random weights; labels alone, 2000 images, 300 steps",
                             cut, replace(cut, start="random"), ids="N3")  # fmt: skip
    return {name: replace(row, robust=True) for name, row in (found | fractions()).items()}


def laundering() -> dict[str, Row]:
    """A teacher that learned random labels of test images, and a student that never saw a test image."""
    stolen = taught(10_000, stage(0.0, objective("kd", temperature=2.0)), "leaking", data="leaked", network="dense",
                    rates=FIXED, steps=1500)  # fmt: skip
    clean = replace(stolen, teacher="clean")
    return {
        "laundering": Row("random labels of 300 test images leak through 10,000 train images > clean teacher", stolen,
                          clean, ids="I1"),
        "canary": Row("the canary fires on the laundered student > on the clean one (per cent of runs)", stolen, clean,
                      "alarm", ids="I1"),
    }  # fmt: skip


def fractions() -> dict[str, Row]:
    """Fractions of the 40,000 images that the teacher saw: the fewer, the more kd gives."""
    found = {}
    for share, images in ((5, 2000), (10, 4000), (30, 12_000)):
        if images != 2000:  # that one is kd-2000
            found[f"kd-{images}"] = Row(f"kd > labels, {share} % of the images ({images:,})", taught(images, KD),
                                        plain(images), ids="T11")  # fmt: skip
    for few, many in ((2000, 4000), (4000, 12_000), (2000, 12_000)):
        first, second = ((taught(images, KD), plain(images)) for images in (few, many))
        claim = f"what kd gains over labels: {few:,} images > {many:,} images"
        found[f"gain-{few}-{many}"] = Row(claim, first, second, ids="T11")
    return found


def proposals() -> dict[str, Row]:
    """O checks of methods.md that nobody had run."""
    return {
        **temperatures(),
        **comparators(),
        **few_classes(),
        **several(),
        **unlabelled(),
        **exits(),
        **weak(),
        **zeros(),
    }


def temperatures() -> dict[str, Row]:
    hot = {images: taught(images, kd(4.0, 0.5)) for images in (500, 2000, 10_000)}
    return {
        "kd4-500": Row("kd at temperature 4, weight 0.5 > labels, 500 images", hot[500], plain(500), ids="L1"),
        "kd4-2000": Row("kd at temperature 4, weight 0.5 > labels, 2000 images", hot[2000], plain(2000), ids="L1"),
        "kd4-10000": Row("kd at temperature 4, weight 0.5 > labels, 10,000 images", hot[10_000], plain(10_000),
                         ids="L1"),
        "kd2-kd4-500": Row("kd at temperature 2, weight 0.9 > at temperature 4, weight 0.5; 500 images",
                           taught(500, kd(2.0, 0.9)), hot[500], ids="L1"),
        "kd1-kd4-2000": Row("kd at temperature 1, weight 0.9 > at temperature 4, weight 0.5; 2000 images",
                            taught(2000, KD), hot[2000], ids="L1"),
        "kd1-kd4-10000": Row("kd at temperature 1, weight 0.9 > at temperature 4, weight 0.5; 10,000 images",
                       taught(10_000, KD), hot[10_000], ids="L1"),
    }  # fmt: skip


def comparators() -> dict[str, Row]:
    """Other objectives with the settings of their papers, against labels and against kd, at 2000 images."""
    keys = {
        "dkd": ("dkd", stage(1.0, objective("dkd", temperature=4.0, alpha=1.0, beta=8.0)), "L3"),
        "nkd": ("nkd", stage(1.0, objective("nkd", temperature=1.0, gamma=1.0)), "L3"),
        "dist": ("dist", stage(1.0, objective("dist", temperature=1.0)), "L3"),
        "plackett-luce": ("plackett-luce", RANKED, "L4"),
        "taid": ("taid", stage(0.0, objective("taid")), "X5"),
        "rkd": ("kd and rkd-distance x 25", _beside(objective("rkd-distance", 25.0)), "F3"),
        "hidden": ("kd and hidden", _beside(objective("hidden", 1.0)), "F1"),
        "anneal": ("teacher annealing", _annealed(), "T4"),
    }
    found = {}
    for name, (said, arm, ids) in keys.items():
        ours = taught(2000, arm)
        if name != "plackett-luce":
            found[name] = Row(f"{said} > labels, 2000 images", ours, plain(2000), ids=ids)
        found[f"{name}-kd"] = Row(f"{said} > kd alone, 2000 images", ours, taught(2000, KD), ids=ids)
    hot = stage(1.0, objective("kd", temperature=4.0))
    towards = stage(1.0, objective("kd", temperature=4.0), objective("norm-direction"))
    found["norm-direction"] = Row("labels, kd (temperature 4) and norm-direction > without it, 2000 images",
                                  taught(2000, towards), taught(2000, hot), ids="L5")  # fmt: skip
    moved = stage(0.2, objective("kd", 0.8, temperature=2.0), objective("sinkhorn", 0.001))
    reverse = stage(0.2, objective("reverse-kl", 0.8, temperature=2.0))
    found["sinkhorn"] = Row("kd and sinkhorn > reverse-kl, 2000 images", taught(2000, moved), taught(2000, reverse),
                            ids="L6")  # fmt: skip
    found["sinkhorn-kd"] = Row("kd and sinkhorn > kd alone (temperature 2, weight 0.8), 2000 images",
                               taught(2000, moved), taught(2000, kd(2.0, 0.8)), ids="L6")  # fmt: skip
    return found


def _beside(further: dict[str, Any]) -> dict[str, Any]:
    return stage(HARD, objective("kd", 0.9, temperature=1.0), further)


def _annealed() -> dict[str, Any]:
    falls = objective("soft-ce") | {"weight": {"kind": "linear", "from": 1.0, "to": 0.0}}
    return stage(1.0, falls) | {"labels": {"kind": "linear", "from": 0.0, "to": 1.0}}


def few_classes() -> dict[str, Row]:
    """Shirts and T-shirts: two classes that are hard to tell apart."""
    here: dict[str, Any] = {"data": "pair", "network": "pair"}
    found = {}
    for images in (1000, 4000):
        split = taught(images, stage(0.5, objective("lelp", 0.5)), "pair", **here)
        soft = taught(images, kd(1.0, 0.5), "pair", **here)
        said = f"two classes, {images} images"
        found[f"lelp-{images}"] = Row(f"lelp > labels, {said}", split, plain(images, **here), ids="L8")
        found[f"lelp-kd-{images}"] = Row(f"lelp > kd, {said}", split, soft, ids="L8")
        found[f"pair-kd-{images}"] = Row(f"kd > labels, {said}", soft, plain(images, **here), ids="L1")
    return found


def several() -> dict[str, Row]:
    """Two garments in a picture; the metric is mean average precision."""
    taught_too = taught(2000, stage(1.0, objective("multi-label", 10.0)), "two", data="two")
    return {"multi-label": Row("labels and multi-label x 10 > labels, two garments a picture, 2000 pictures (mAP)",
                               taught_too, plain(2000, data="two"), ids="L9")}  # fmt: skip


def unlabelled() -> dict[str, Row]:
    """500 labels beside pictures without: three times as many, and nineteen times."""
    found = {}
    for more in (1500, 9500):
        two = taught(500, stage(1.0, objective("dual-head")), transfer=more)
        one = taught(500, kd(2.0, 0.5), transfer=more)
        agreeing = taught(500, AGREE, transfer=more)
        where = f"500 labels and {more} images without"
        found[f"dual-head-{more}"] = Row(f"dual-head > labels, {where}", two, plain(500), ids="D1")
        found[f"dual-head-kd-{more}"] = Row(f"dual-head > one head (kd, labels), {where}", two, one, ids="D1")
        found[f"dual-head-symmetric-{more}"] = Row(f"dual-head > symmetric-kl without labels, {where}", two, agreeing,
                                                   ids="D1")  # fmt: skip
    return found


def weak() -> dict[str, Row]:
    """A teacher of 300 labels names 9000 pictures; the surer half of them. And three teachers without labels."""
    named = [{"use": "pseudo-label"}]
    every = taught(300, stage(1.0, strategy=named), "weak", transfer=9000)
    surest = taught(300, stage(1.0, strategy=[{"use": "filter", "keep": 0.5}, *named]), "weak", transfer=9000)
    before = plain(2000)
    soft = stage(0.0, objective("soft-ce"))
    after = taught(2000, soft, "three", after=before, steps=300)
    return {
        "filter": Row("pseudo-labels of a weak teacher: the surest half > all", surest, every, ids="T8"),
        "ensemble": Row("300 more steps on three teachers without labels > before, 2000 images", after, before,
                        ids="L11 M1"),
        "ensemble-labels": Row("300 more steps on three teachers > 300 more on labels, 2000 images", after,
                               plain(2000, after=before, steps=300), ids="L11 M1"),
    }  # fmt: skip


def exits() -> dict[str, Row]:
    """An exit behind the second of three stages against the two stages alone, and what exits do to the output."""
    early = objective("multi-exit", 1.0, blocks="1", export="exit")
    inside = objective("multi-exit", 1.0)
    alone = plain(2000, network="shallow")
    return {
        "exit": Row("exit after stage 2 of 3 > the two stages trained alone - 1 point", taught(2000, stage(1.0, early)),
                    alone, margin=-1.0, ids="E1"),
        "deep-supervision": Row("labels and exits that are dropped > labels, 2000 images",
                                taught(2000, stage(1.0, inside)), plain(2000), ids="E1"),
    }  # fmt: skip


def zeros() -> dict[str, Row]:
    """Four of five weights of a trained network become zero while it trains on."""
    growing = {"masks": {"sparsity": 0.8}}
    alone = stage(1.0, **growing)
    beside = stage(1.0, objective("squarehead", match={"proj": "none"}), **growing)
    here: dict[str, Any] = {"start": "copied", "network": "middle", "steps": 200}
    return {"squarehead": Row("80 % zeros in a copy of the teacher: labels and squarehead > labels, 2000 images",
                              taught(2000, beside, "first", **here), Arm(2000, alone, **here), ids="U3")}  # fmt: skip
