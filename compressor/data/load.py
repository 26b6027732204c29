"""From raw samples to disjoint, fingerprinted, preprocessed parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from compressor.data import pairs
from compressor.data.arrays import ArraySplit, ArrayStore, array_store
from compressor.data.blocks import packed
from compressor.data.contamination import check_duplicates
from compressor.data.domains import domains_of
from compressor.data.gate import check_near
from compressor.data.images import ImageSplit, PictureStore, picture_store
from compressor.data.labels import encode_labels
from compressor.data.multilabel import encode_multi_labels
from compressor.data.raw import RawData, RawPart
from compressor.data.read import read_raw
from compressor.data.split import split_indices
from compressor.data.targets import TargetStore, target_split, target_store
from compressor.data.text import TextSplit, TokenStore, token_store
from compressor.data.types import DataBundle, Split
from compressor.data.words import tagged_words
from compressor.errors import PlanError, Problem
from compressor.models.types import ImageInput, LoadedModel
from compressor.recipe import DataConfig
from compressor.types import EMBEDDING, MULTI_LABEL, TEXT2TEXT, Array, Inputs, Task, array_digest

CLASSIFICATION = ("image-classification", "text-classification", *sorted(MULTI_LABEL))

# their labels are found while tokenising: tags of words, next tokens, judgements of pairs, target texts
OWN_LABELS = frozenset({"token-classification", "causal-lm", "sentence-similarity", "retrieval"}) | TEXT2TEXT

Store = PictureStore | TokenStore | TargetStore | ArrayStore
Rows = Mapping[str, tuple[str, Array]]  # part -> raw part it is taken from, positions in it


def load_data(
    config: DataConfig, model: LoadedModel, *, loader: str | None = None, seed: int, raw: RawData | None = None
) -> DataBundle:
    """Read, cut, check and preprocess the data for one model.

    ``raw`` (from :func:`read_raw`) saves reading twice when the model needed a sample of the data first. Raises
    :class:`ConfigError` for sources that cannot be read, :class:`PlanError` for labels that do not fit the teacher's
    head, empty parts, inputs of another shape than the model's, and test samples in train.
    """
    raw = raw or read_raw(config, loader=loader)
    rows = cut_rows(raw, config, seed, pairs.together(raw.parts["train"]) if model.task == "retrieval" else None)
    labels, notes = _labels(raw, config, model)
    keys = {name: raw.parts[name].digests(normalised=True) for name in raw.parts}
    clean = check_duplicates(
        {name: keys[home][index] for name, (home, index) in rows.items()},
        config.duplicates,
        lambda name, row: raw.parts[rows[name][0]].show(int(rows[name][1][row])),
    )
    clean_rows = {name: (home, index[clean.keep[name]]) for name, (home, index) in rows.items()}
    stores, tags = _stores(raw, config, model)
    labels |= tags
    _need_labels(labels, model)
    kept, near = check_near(raw, clean_rows, config, stores)
    _refuse_empty(kept)
    exact = {name: part.digests() if part.kind == "texts" else keys[name] for name, part in raw.parts.items()}
    splits = {
        name: _task_split(name, stores[home], index, raw.parts[home], model)
        or _split(name, stores[home], index, labels[home] if name != "transfer" else None, exact[home], model)
        for name, (home, index) in kept.items()
    }
    _check_shapes(splits, model)
    domains = domains_of(raw, kept, splits, stores)
    return DataBundle(
        splits=splits,
        labels=config.labels or model.labels or raw.names,
        source=raw.source,
        digests={
            name: _fingerprint(split, domains.get(name), _prepared(stores[kept[name][0]]))
            for name, split in splits.items()
        },
        duplicates_dropped=clean.dropped,
        notes=(*raw.notes, *notes, *clean.notes, *_truncation(stores)),
        examples=_examples(raw, *kept["validation"], model.task),
        rows=kept,
        domains=domains,
        near=near,
    )


def other_view(raw: RawData, rows: Rows, model: LoadedModel) -> dict[str, Split]:
    """The same samples in the same order as another model sees them: its tokenizer, its length, its picture size.

    ``rows`` are those of the bundle (:attr:`DataBundle.rows`). The parts carry no labels: those belong to the task.

    Raises:
        PlanError: the samples do not fit the model.
    """
    parts = {home: raw.parts[home] for home in sorted({home for home, _ in rows.values()})}
    if model.task in EMBEDDING:
        rows = {
            name: (home, pairs.text_rows(parts[home], index, model.task, name)) for name, (home, index) in rows.items()
        }
        parts = {home: pairs.single_texts(part) if pairs.is_paired(part) else part for home, part in parts.items()}
    stores = {home: _store(part, model) for home, part in parts.items()}
    keys = {home: part.digests() for home, part in parts.items()}
    splits = {name: _split(name, stores[home], index, None, keys[home], model) for name, (home, index) in rows.items()}
    _check_shapes(splits, model)
    return splits


def _examples(raw: RawData, home: str, index: Array, task: Task, count: int = 4) -> tuple[Any, ...]:
    """A few raw samples for the self-check of packages; words are joined; none for compressed pictures and arrays."""
    samples, kind = raw.parts[home].samples, raw.parts[home].kind
    if kind not in {"pictures", "texts", "words"} or task == "causal-lm":
        return ()
    found = tuple(samples[int(row)] for row in index[:count])
    if kind == "words":
        return tuple(" ".join(words) for words in found)
    if task in EMBEDDING and pairs.is_paired(raw.parts[home]):
        order = pairs.arranged(raw.parts[home], index, task, "validation").rows[:count]  # as the split has them
        return tuple(samples[row // 2][row % 2] for row in order)
    return found


def cut_rows(raw: RawData, config: DataConfig, seed: int, together: Array | None = None) -> Rows:
    """Which raw samples each part takes.

    Parts that the source has are taken whole. A missing ``test`` is drawn first, then ``validation`` and
    ``calibration`` are drawn from what is left of train, each by ``split_indices`` with ``seed``. Rows of train with
    equal numbers in ``together`` come into one part.
    """
    rows = {name: (name, np.arange(len(part))) for name, part in raw.parts.items() if name != "train"}
    base = np.arange(len(raw.parts["train"]))
    if "test" not in rows:
        drawn = _draw(base, {"test": _count(config.test_fraction, len(base))}, seed, together)
        rows["test"] = ("train", base[drawn["test"]])
        base = base[drawn["train"]]
    wanted = {"validation": config.validation, "calibration": config.calibration}
    sizes = {name: _count(size, len(base)) for name, size in wanted.items() if name not in rows}
    for name, index in _draw(base, sizes, seed, together).items():
        rows[name] = ("train", base[index])
    rows["train"] = ("train", rows["train"][1][: config.limit])
    return rows


def _count(size: float, total: int) -> int:
    """A number of samples: itself from 1 on, below that a fraction of ``total`` (at least one)."""
    return int(size) if size >= 1 else max(1, round(size * total))


def _draw(base: Array, sizes: Mapping[str, int], seed: int, together: Array | None = None) -> dict[str, Array]:
    """Positions in ``base`` of the drawn parts and of the rest."""
    known, unit = np.unique(np.arange(len(base)) if together is None else together[base], return_inverse=True)
    total, wanted = len(known), dict(sizes)
    if together is not None:
        wanted = {name: max(1, round(size * total / len(base))) for name, size in sizes.items()}
    if sum(wanted.values()) >= total:
        asked = " and ".join(f"{size} for {name}" for name, size in sizes.items())
        hint = "Give more data or make `validation`, `calibration` or `test_fraction` smaller."
        raise PlanError.single("data", f"{asked} leave nothing of {total} samples to train on", hint=hint)
    drawn = split_indices(total, wanted, seed=seed)
    return drawn if together is None else {name: np.flatnonzero(np.isin(unit, index)) for name, index in drawn.items()}


def _labels(raw: RawData, config: DataConfig, model: LoadedModel) -> tuple[dict[str, Array | None], list[str]]:
    """Class numbers for every raw part that has labels, and notes."""
    classes = model.outputs[0].shape[-1] if model.task in CLASSIFICATION and model.outputs else None
    teacher = config.labels or model.labels
    found: dict[str, Array | None] = {}
    notes: list[str] = []
    for name, part in raw.parts.items():
        if part.labels is None or name == "transfer" or model.task in OWN_LABELS or _all_hidden(part.labels):
            found[name] = None
            continue
        try:
            limit = classes if isinstance(classes, int) else None
            encode = encode_multi_labels if model.task in MULTI_LABEL else encode_labels
            found[name] = encode(part.labels, teacher=teacher, names=raw.names, classes=limit, part=name)
        except PlanError:
            if model.task in CLASSIFICATION:
                raise
            found[name] = None
            notes.append(f"labels of {name} are not class numbers: left out")
    return found, notes


def _all_hidden(labels: Any) -> bool:
    """Benchmarks such as GLUE publish their test part with -1 for every label."""
    return len(labels) > 0 and all(isinstance(label, int | np.integer) and label == -1 for label in labels)


def _need_labels(found: Mapping[str, Array | None], model: LoadedModel) -> None:
    home = "test" if "test" in found else "train"
    if model.task not in (*CLASSIFICATION, "token-classification"):
        return
    if found[home] is None:
        raise PlanError.single(
            "data.label",
            f"{home} has no labels, so no accuracy can be measured",
            hint="Give `data.label`, or name a labelled part in `data.test`.",
        )
    validation = "validation" if "validation" in found else "train"
    if found[validation] is None:
        raise PlanError.single(
            "data.label", f"{validation} has no labels, so nothing can be chosen by validation accuracy"
        )


def _refuse_empty(rows: Rows) -> None:
    empty = [name for name, (_, index) in rows.items() if len(index) == 0]
    if empty:
        problems = [Problem(f"data.{name}", "is empty after duplicates were dropped") for name in empty]
        raise PlanError("the data", problems, hint="Give data whose parts do not repeat each other.")


def _stores(raw: RawData, config: DataConfig, model: LoadedModel) -> tuple[dict[str, Store], dict[str, Array | None]]:
    """The samples by raw part as the model takes them, and the labels that come with them."""
    if model.task == "token-classification":
        teacher = config.labels or model.labels
        tagged = {name: tagged_words(part, model, raw.names, teacher, name) for name, part in raw.parts.items()}
        return {name: item.store for name, item in tagged.items()}, {name: item.labels for name, item in tagged.items()}
    parts = raw.parts
    if model.task in TEXT2TEXT:
        if "transfer" in parts:
            what, hint = "holds sources without targets", "Let the teacher write some with `[stage.sequences]` instead."
            raise PlanError.single("data.transfer", what, hint=hint)
        return {name: target_store(part, model, name) for name, part in parts.items()}, {}
    if model.task in EMBEDDING:
        parts = {name: pairs.single_texts(p) if pairs.is_paired(p) else p for name, p in parts.items()}
    return {name: _store(part, model) for name, part in parts.items()}, {}


def _task_split(name: str, store: Store, rows: Array, part: RawPart, model: LoadedModel) -> Split | None:
    """The split of tasks whose samples are not the rows of the source: blocks of text, single texts of pairs."""
    if isinstance(store, TargetStore):
        return target_split(name, store, rows, part)
    if not isinstance(store, TokenStore):
        return None
    if model.task == "causal-lm":
        return packed(name, store, rows, model.inputs, labelled=name != "transfer")
    if model.task not in EMBEDDING or (model.task == "sentence-embedding" and not pairs.is_paired(part)):
        return None
    texts = pairs.single_texts(part) if pairs.is_paired(part) else part
    if name == "transfer":
        own = pairs.text_rows(part, rows, model.task, name)
        return TextSplit(name, None, texts.digests()[own], store, own)
    made = pairs.arranged(part, rows, model.task, name)
    return TextSplit(name, None, texts.digests()[made.rows], store, made.rows, made.judgements, made.groups)


def _store(part: RawPart, model: LoadedModel) -> Store:
    if part.kind == "texts":
        return token_store(part, model)
    if part.kind in ("pictures", "files") and isinstance(model.preprocess, ImageInput):
        return picture_store(part, model.preprocess)
    return array_store(part, model)


def _split(name: str, store: Store, rows: Array, labels: Array | None, digests: Array, model: LoadedModel) -> Split:
    own = labels[rows] if labels is not None else None
    if isinstance(store, PictureStore):
        return ImageSplit(name, own, digests[rows], store, rows, model.inputs[0])
    if isinstance(store, TokenStore):
        return TextSplit(name, own, digests[rows], store, rows)
    assert isinstance(store, ArrayStore)  # targets have splits of their own, see _task_split
    return ArraySplit(name, own, digests[rows], store, rows)


def _check_shapes(splits: Mapping[str, Split], model: LoadedModel) -> None:
    """One sample of each part must have the shape that the model's inputs state (its first axis is the batch)."""
    problems = []
    for name, split in splits.items():
        made = split.batch(np.arange(1))
        for spec in model.inputs:
            shape = made[spec.name].shape
            pairs = zip(shape[1:], spec.shape[1:], strict=False)
            if len(shape) != len(spec.shape) or any(isinstance(want, int) and have != want for have, want in pairs):
                problems.append(
                    Problem(f"data.{name}", f"gives {spec.name} {shape[1:]} but the model wants {spec.shape[1:]}")
                )
    if problems:
        raise PlanError(
            "the data",
            problems,
            hint="Set `data.preprocess` (size, channels, layout) to what the model was trained on.",
        )


def _prepared(store: Store) -> str:
    """What the model sees of the samples beside their own bytes: settings of pictures, lengths that cut texts."""
    if isinstance(store, PictureStore):
        return store.preprocess.model_dump_json()
    texts = store.source if isinstance(store, TargetStore) else store
    cut = [texts.preprocess.max_length] if isinstance(texts, TokenStore) and texts.truncated else []
    cut += [store.source.preprocess.target_length or 0] if isinstance(store, TargetStore) and store.truncated else []
    return str(cut) if cut else ""


def _fingerprint(split: Split, domains: Array | None = None, prepared: str = "") -> str:
    judged, groups = getattr(split, "judgements", None), getattr(split, "groups", None)
    found = [
        split.labels,
        domains,
        judged,
        np.frombuffer(prepared.encode(), np.uint8) if prepared else None,
        *([groups.members, groups.starts, groups.scores] if groups is not None else []),
    ]
    return array_digest(split.digests, *(array for array in found if array is not None))


def _truncation(stores: Mapping[str, Store]) -> list[str]:
    found = []
    for name, store in stores.items():
        texts = store.source if isinstance(store, TargetStore) else store
        if isinstance(texts, TokenStore) and texts.truncated:
            limit = texts.preprocess.max_length
            found.append(f"{texts.truncated} texts of {name} are longer than {limit} tokens and were cut")
        if isinstance(store, TargetStore) and store.truncated:
            most = store.source.preprocess.target_length
            found.append(f"{store.truncated} targets of {name} are longer than {most} tokens and were cut")
    return found


def make_calibration(split: Split, samples: int, batch: int, seed: int) -> Iterator[Inputs]:
    """``samples`` different samples of a part (all if it has fewer), drawn by ``seed``, in batches of model inputs."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(split))[:samples]
    for start in range(0, len(order), batch):
        yield split.batch(np.sort(order[start : start + batch]))
