"""Which student signal learns from which teacher signal: the match of a recipe, resolved to pairs of names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from compressor.config import suggestion
from compressor.recipe import Match

_PATTERN = re.compile(r"(?P<family>(?:encoder\.)?[a-z]+)(?:\[(?P<index>g\(i\)|i|-?\d+)\])?")


def count(signals: Mapping[str, int], family: str) -> int:
    """How many layers of a family (``hidden``, ``qkv``) a model offers.

    ``signals`` names either a family with its number of layers (``{"hidden": 7}``) or every layer (``{"hidden[0]":
    64}``).
    """
    if family in signals:
        return signals[family]
    return sum(name.startswith(f"{family}[") for name in signals)


def layer_map(student: int, teacher: int, kind: str) -> list[int]:
    """Teacher layer of each student layer.

    ``uniform`` spreads over the teacher and ends at its last layer, ``last`` takes the top ones in order, ``skip``
    every (teacher // student)-th from the bottom (DistilBERT's choice).

    >>> layer_map(3, 6, "uniform"), layer_map(3, 6, "last"), layer_map(3, 6, "skip")
    ([1, 3, 5], [3, 4, 5], [0, 2, 4])

    Raises:
        ValueError: the student has more layers than the teacher and the map is not ``uniform``.
    """
    if kind == "uniform":
        return [-(-(i + 1) * teacher // student) - 1 for i in range(student)]
    if student > teacher:
        raise ValueError(
            f"the map `{kind}` needs a teacher with at least the student's {student} layers, not {teacher}"
        )
    if kind == "last":
        return [teacher - student + i for i in range(student)]
    return [i * (teacher // student) for i in range(student)]


def pairs(
    match: Match, student: Mapping[str, int], teacher: Mapping[str, int]
) -> tuple[list[tuple[str, str]], list[str]]:
    """``match`` as pairs (student signal, teacher signal), and what is impossible about it.

    A teacher's signal may belong to one of several teachers: ``second:hidden[g(i)]``.
    """
    owner, colon, signal = match.teacher.rpartition(":")
    if colon:
        own = {name.removeprefix(f"{owner}:"): count for name, count in teacher.items() if name.startswith(f"{owner}:")}
        if not own:
            return [], [f"there is no teacher `{owner}`"]
        own_pairs, problems = pairs(match.model_copy(update={"teacher": signal}), student, own)
        return [(first, f"{owner}:{second}") for first, second in own_pairs], problems
    names, problems = [], list[str]()
    for who, text, have in (("student", match.student, student), ("teacher", match.teacher, teacher)):
        found = _PATTERN.fullmatch(text)
        if found is None:
            problems.append(f"`{text}` is not a signal; write `logits`, `hidden[i]`, `hidden[g(i)]` or `hidden[-1]`")
            continue
        family, index = found["family"], found["index"]
        problem = _missing(who, family, index, have)
        problems += [problem] if problem else []
        names.append((family, index))
    if problems or len(names) < 2:
        return [], problems
    return _expand(names[0], names[1], match, student, teacher)


def _missing(who: str, family: str, index: str | None, have: Mapping[str, int]) -> str:
    if index is None:
        return "" if family in have else f"the {who} has no signal `{family}`{suggestion(family, sorted(have))}"
    layers = count(have, family)
    if layers == 0:
        return f"the {who} has no `{family}` signals{suggestion(family, sorted(have))}"
    if index not in {"i", "g(i)"} and not -layers <= int(index) < layers:
        return f"the {who} has {layers} `{family}` signals; `{family}[{index}]` does not exist"
    return ""


def _expand(
    own: tuple[str, str | None],
    other: tuple[str, str | None],
    match: Match,
    student: Mapping[str, int],
    teacher: Mapping[str, int],
) -> tuple[list[tuple[str, str]], list[str]]:
    family_s, index_s = own
    family_t, index_t = other
    if index_s == "g(i)":
        return [], ["`g(i)` belongs to the teacher's side of a match"]
    if index_s != "i" and index_t in {"i", "g(i)"}:
        return [], [f"`{match.teacher}` needs `[i]` in the student's signal, not `{match.student}`"]
    layers_s, layers_t = count(student, family_s), count(teacher, family_t)
    if index_s != "i":
        return [(_name(family_s, index_s, layers_s), _name(family_t, index_t, layers_t))], []
    if index_t == "i":
        if layers_s > layers_t:
            return [], [f"the teacher has {layers_t} `{family_t}` signals, the student {layers_s}; use `g(i)`"]
        return [(f"{family_s}[{i}]", f"{family_t}[{i}]") for i in range(layers_s)], []
    if family_s != family_t:
        return [], [f"`{match.student}` and `{match.teacher}` are of two families; name one layer of each"]
    if index_t != "g(i)":
        fixed = _name(family_t, index_t, layers_t)
        return [(f"{family_s}[{i}]", fixed) for i in range(layers_s)], []
    try:
        mapped = _mapped(family_s, match.map, student, teacher)
    except ValueError as error:
        return [], [str(error)]
    return [(f"{family_s}[{i}]", f"{family_t}[{j}]") for i, j in enumerate(mapped)], []


def _mapped(family: str, kind: str, student: Mapping[str, int], teacher: Mapping[str, int]) -> list[int]:
    """Embeddings (``hidden[0]`` of transformers) teach embeddings; the layers above them are mapped."""
    side, name = family[: -len("hidden")], family.rpartition(".")[2]
    below = int(name == "hidden" and all(_starts_with_embeddings(have, side) for have in (student, teacher)))
    mapped = layer_map(count(student, family) - below, count(teacher, family) - below, kind)
    return [*range(below), *(below + layer for layer in mapped)]


def _starts_with_embeddings(signals: Mapping[str, int], side: str) -> bool:
    return count(signals, f"{side}hidden") == count(signals, f"{side}qkv") + 1 > 1


def _name(family: str, index: str | None, layers: int) -> str:
    return family if index is None else f"{family}[{int(index) % layers}]"
