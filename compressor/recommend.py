"""A proposed recipe for a task, its data, its teacher and a device, and why. Rules with their sources; no torch.

The figures of the rules are those of docs/evidence/methods.md: small networks on Fashion-MNIST, five paired seeds. They
give signs, not sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import tomli_w

from compressor.config import suggestion, validate
from compressor.errors import ConfigError
from compressor.recipe import Recipe
from compressor.types import TEXT2TEXT, Task

Kind = Literal["cnn", "transformer", "onnx"]
FEW_CLASSES = 20
VERY_FEW_CLASSES = 4
SHORT = 2000  # labelled samples: up to here distillation beat labels alone on 5 of 5 seeds at any temperature
VERY_SHORT = 1000
MUCH_UNLABELLED = 4  # times the labelled ones
STEPS = 4000  # that a small student gets, by way of epochs
SHORT_STEPS = 1950  # that a transformer with fewer layers gets: it starts from its teacher's weights
CLASSIFIERS = ("image-classification", "text-classification")
SHORT_VECTOR = 128  # dimensions: the size that homomorphic projection was published with
EMBEDDINGS = ("sentence-embedding", "sentence-similarity", "retrieval")


@dataclass(frozen=True)
class Facts:
    """What is known before a recipe is written."""

    task: Task
    classes: int
    labelled: int
    unlabelled: int
    teacher: Kind
    profiles: tuple[str, ...]
    layers: int = 0  # of a transformer; 0: not known

    @property
    def shortens(self) -> bool:
        """Is half of the teacher's layers a student?"""
        return self.teacher == "transformer" and self.layers > 1


@dataclass(frozen=True)
class Proposal:
    """A valid recipe as text, the reason of each choice, and what else is worth a run."""

    text: str
    recipe: Recipe
    reasons: tuple[str, ...]
    alternatives: tuple[str, ...]


@dataclass(frozen=True)
class _Term:
    """Objectives and label weight of the distil stage, with why."""

    objective: list[dict[str, object]]
    labels: float
    reason: str
    more: dict[str, object]


def facts_of(
    task: str, classes: int, labelled: int, unlabelled: int, teacher: str, profiles: tuple[str, ...], layers: int = 0
) -> Facts:
    """Check the words of a user.

    Raises:
        ConfigError: an unknown task or kind of teacher, or numbers that do not go together.
    """
    for word, value, known in (("task", task, get_args(Task)), ("teacher", teacher, get_args(Kind))):
        if value not in known:
            raise ConfigError.single("the question", word, f"unknown {word} `{value}`{suggestion(value, known)}")
    if task in CLASSIFIERS and classes < 2:
        raise ConfigError.single("the question", "classes", "a classifier has at least 2", hint="Give --classes.")
    if labelled + unlabelled == 0:
        raise ConfigError.single("the question", "labelled", "there is no data", hint="Give --labelled.")
    if layers and teacher != "transformer":
        raise ConfigError.single("the question", "layers", "belongs to a transformer", hint="Leave --layers out.")
    return Facts(task, classes, labelled, unlabelled, teacher, profiles, layers)  # type: ignore[arg-type]  # checked above


def recommend(facts: Facts) -> Proposal:
    """The recipe that the rules lead to."""
    reasons: list[str] = []
    stages: list[dict[str, object]] = []
    if facts.teacher == "onnx":
        reasons.append("an ONNX file cannot be trained here: it is quantized, and every int8 form becomes a candidate")
    else:
        stages += [_smaller(facts, reasons), _distil(facts, reasons)]
    stages.append(_quantize(facts, reasons))
    data: dict[str, object] = {
        "name": "recommended", "profiles": list(facts.profiles),
        "teacher": {"task": facts.task}, "accept": {"max_drop": "1%"}, "stage": stages,
    }  # fmt: skip
    recipe = validate(Recipe, data, "the proposed recipe")
    return Proposal(tomli_w.dumps(data), recipe, tuple(reasons), _alternatives(facts))


def _smaller(facts: Facts, reasons: list[str]) -> dict[str, object]:
    if facts.teacher == "cnn":
        reasons.append(
            "prune: a student cut from its teacher beat the same size from scratch on 5 of 5 seeds (+3.3 points, U1)"
        )
        return {"kind": "prune", "ratio": 0.5, "importance": "activation"}
    if facts.shortens:
        kept = max(1, facts.layers // 2)
        reasons.append(
            f"student: {kept} of {facts.layers} layers, spread evenly: every kernel stays as wide as the runtime likes "
            "it, and the layers that stay start from the teacher's weights (U1)"
        )
        sides = {"decoder_layers": kept} if facts.task in TEXT2TEXT else {}
        return {"kind": "student", "keep_layers": kept, **sides}
    reasons.append("prune: half of heads and neurons; the layers that stay start from the teacher's weights (U1, N3)")
    return {"kind": "prune", "heads": 0.5, "neurons": 0.5}


def _distil(facts: Facts, reasons: list[str]) -> dict[str, object]:
    term = _term(facts)
    reasons.append(term.reason)
    samples = facts.labelled + facts.unlabelled
    batch, epochs, rate = _effort(facts, samples)
    times = "1 epoch" if epochs == 1 else f"{epochs} epochs"
    reasons.append(f"{times} of {samples:,} samples; `patience` keeps the best one on validation")
    stage: dict[str, object] = {
        "kind": "distil", "epochs": epochs, "batch": batch, "learning_rate": rate,
        "labels": term.labels, "patience": max(3, epochs // 4),
    }  # fmt: skip
    return {**stage, **term.more, "objective": term.objective}


def _effort(facts: Facts, samples: int) -> tuple[int, int, float]:
    """Batch, epochs and learning rate."""
    if facts.shortens:
        return 32, max(1, min(10, round(SHORT_STEPS * 32 / samples))), 2e-4
    if facts.teacher == "transformer":
        return 32, 3, 1e-4
    return 64, max(3, min(30, STEPS * 64 // samples)), 3e-3


def _term(facts: Facts) -> _Term:
    if facts.task in EMBEDDINGS and facts.teacher == "transformer":
        return _encoder(facts)
    if facts.task in EMBEDDINGS:
        reason = "cosine of the embeddings and hidden states: no labels are needed (F1, F2)"
        match = {"student": "logits", "teacher": "logits"}
        hidden: dict[str, object] = {"use": "hidden", "match": {"map": "uniform" if facts.shortens else "last"}}
        return _Term([{"use": "cosine", "match": match}, hidden], 0.0, reason, {})
    if facts.labelled == 0 and facts.teacher == "transformer":
        reason = "minilm-relations: no labels and no head: relations of queries, keys and values, of any width (F1)"
        return _Term([{"use": "minilm-relations"}], 0.0, reason, {})
    if facts.task not in CLASSIFIERS:
        reason = "kd at temperature 1: the first thing to try for every task with logits (L1)"
        return _Term([_kd(1.0, 0.5)], 0.5 if facts.labelled else 0.0, reason, {})
    return _classifier(facts)


def _encoder(facts: Facts) -> _Term:
    """Shorter vectors that are as alike as the teacher's."""
    short: dict[str, object] = {
        "use": "homomorphic-projection", "weight": 100.0, "options": {"size": SHORT_VECTOR, "tanh": False},
    }  # fmt: skip
    terms = [short, {"use": "similarity", "weight": 10.0}]
    reason = (
        f"homomorphic-projection: vectors of {SHORT_VECTOR} dimensions learn the teacher's principal components (R2b; "
        "lower `size` for a teacher with fewer), and similarity: the cosines of a batch become the teacher's (R2)"
    )
    if facts.task != "retrieval" or not facts.labelled:
        return _Term(terms, 0.0, reason + "; no labels are needed", {})
    terms.append({"use": "similarity", "weight": 1.0, "options": {"compare": "kl", "pairs": True, "temperature": 0.05}})
    reason += (
        "; how it ranks the passages of a batch for each query too (W1), and a little of the pairs themselves: 96 % of "
        "the teacher's nDCG@10 on package search, the null twin 90 % (one seed)"
    )
    return _Term(terms, 0.1, reason, {"batch": 64})


def _classifier(facts: Facts) -> _Term:
    if facts.unlabelled >= MUCH_UNLABELLED * facts.labelled:
        reason = (
            f"symmetric-kl without labels: {facts.unlabelled:,} unlabelled samples, {facts.labelled:,} labelled; "
            "the label-free student beat labels alone on 5 of 5 seeds (80.1 against 79.2 %, D3)"
        )
        return _Term([{"use": "symmetric-kl"}], 0.0, reason, {"weight_decay": 0.0001})
    if facts.unlabelled and facts.labelled <= VERY_SHORT:
        reason = (
            "dual-head: few labels beside unlabelled samples; a head each, fused at export (85.0 against 76.8 % of "
            "labels alone on 5 of 5 seeds, 500 labels and 1500 samples without; D1)"
        )
        return _Term([{"use": "dual-head"}], 1.0, reason, {})
    if facts.shortens:
        return _shortened(facts)
    tau, weight, reason = _temperature(facts)
    terms = [_kd(tau, weight)]
    if facts.teacher == "transformer":
        terms.append({"use": "hidden", "weight": 0.1, "match": {"map": "last"}})
        reason += "; hidden states too, because the student was cut from its teacher (F1)"
    return _Term(terms, round(1 - weight, 2), reason, {})


def _shortened(facts: Facts) -> _Term:
    """A transformer classifier that loses layers."""
    reason = (
        "kd at temperature 1 with weight 0.9, and hidden states of every so many layers: widths agree, so that "
        "nothing is projected (L1, F1); above labels alone on 5 of 5 seeds of movie reviews (84.6 against 83.5 %)"
    )
    if facts.unlabelled:
        reason += f"; both need no label: the {facts.unlabelled:,} unlabelled texts teach too (`data.transfer`)"
    return _Term([_kd(1.0, 0.9), {"use": "hidden", "weight": 1.0}], 0.1, reason, {})


def _temperature(facts: Facts) -> tuple[float, float, str]:
    if facts.labelled <= VERY_SHORT:
        why = f"{facts.labelled:,} labels: most weight on the teacher (at 500 labels 82.5 % on 5 of 5 seeds, "
        return 2.0, 0.9, f"kd at temperature 2, weight 0.9: {why}labels alone 76.8 %; L1, T11)"
    if facts.classes <= VERY_FEW_CLASSES and facts.labelled > SHORT:
        why = "two classes that are hard to tell apart: above labels alone on 5 of 5 seeds (86.7 against 85.9 %)"
        return 1.0, 0.5, f"kd at temperature 1: {why} (L1)"
    if facts.classes <= FEW_CLASSES:
        why = (
            "few classes: above labels alone on 5 of 5 seeds at 2000 and at 10,000 labels (85.8 against 84.8 %); "
            "temperature 4 lost to labels with dense students, and was as good or better with convolutional ones"
        )
        return 1.0, 0.9 if facts.labelled <= SHORT else 0.7, f"kd at temperature 1: {why} (L1)"
    return 2.0, 0.5, f"kd at temperature 2: {facts.classes} classes, whose similarities the teacher knows (L1)"


def _kd(temperature: float, weight: float) -> dict[str, object]:
    return {"use": "kd", "weight": weight, "options": {"temperature": temperature}}


def _quantize(facts: Facts, reasons: list[str]) -> dict[str, object]:
    text = facts.teacher == "transformer" or facts.task.startswith(("text", "sentence", "token", "causal"))
    text = text or facts.task in TEXT2TEXT
    if text:
        reasons.append(
            "quantize: dynamic int8, and static int8 whose activations are measured: transformers lose accuracy where "
            "normalisations and softmax are quantized, so only matrix products are"
        )
        return {"kind": "quantize", "schemes": ["dynamic", "static-per-channel"]}
    reasons.append(
        "quantize: static int8 per channel and per tensor; the gate ships what is faster and keeps the promise"
    )
    return {"kind": "quantize"}


def _alternatives(facts: Facts) -> tuple[str, ...]:
    if facts.teacher == "onnx":
        return ()
    found = []
    if facts.task in CLASSIFIERS and facts.labelled:
        found.append(
            "plackett-luce with labels = 0: no temperature and no weight to choose, above labels alone on 5 of 5"
        )
    if facts.task in CLASSIFIERS and facts.classes <= VERY_FEW_CLASSES and facts.labelled > SHORT:
        found.append("lelp: subclasses of the teacher's embedding; above labels alone, but 0.5 points below kd (L8)")
    if facts.labelled > 20 * SHORT:
        found.append(
            'strategy = [{ use = "subset", fraction = 0.3 }]: a random third, quicker, with more teacher weight'
        )
    if facts.task in CLASSIFIERS and facts.teacher == "cnn":
        found.append("cache_logits and views = 4 with augment: the teacher runs once a view")
    return tuple(found)
