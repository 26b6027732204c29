"""TOML read into pydantic models, with every problem listed by file and key."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from compressor.errors import ConfigError, Problem


class Frozen(BaseModel):
    """Base of every configuration value: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @property
    def changed(self) -> frozenset[str]:
        """Keys whose values are not the defaults; unlike ``model_fields_set`` it survives writing and reading."""
        fields = type(self).model_fields.items()
        return frozenset(name for name, field in fields if getattr(self, name) != field.get_default())


Model = TypeVar("Model", bound=BaseModel)


def suggestion(word: str, known: list[str] | tuple[str, ...]) -> str:
    """``; did you mean `x`?`` when a known word is near, otherwise ``; one of a, b, c``."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean `{near[0]}`?"
    return f"; one of {', '.join(sorted(known))}" if known else ""


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; a missing, unreadable or malformed file is a :class:`ConfigError`."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError.single(f"`{path}`", "file", "does not exist", hint="Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError.single(f"`{path}`", "file", f"cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError.single(f"`{path}`", "syntax", str(error), hint="The file must be valid TOML.") from error


def validate(model: type[Model], data: dict[str, Any], subject: str) -> Model:
    """Build ``model`` from ``data`` or raise a :class:`ConfigError` that lists every problem with its key."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(subject, problems_of(error, model)) from None


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Pydantic's errors in the words of this project."""
    return [
        Problem(".".join(str(part) for part in item["loc"]) or "file", _say(item, model)) for item in error.errors()
    ]


def _say(item: Any, model: type[BaseModel]) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return "unknown key" + suggestion(str(item["loc"][-1]), _fields_at(model, item["loc"][:-1]))
    if kind == "missing":
        return "is required"
    if kind == "union_tag_invalid":
        known = [word.strip(" '") for word in str(context.get("expected_tags", "")).split(",")]
        near = suggestion(str(context.get("tag")), known)
        return f"unknown kind `{context.get('tag')}`{near}; one of {', '.join(known)}"
    if kind == "union_tag_not_found":
        return f"needs a `{str(context.get('discriminator')).strip(chr(39))}`"
    if kind == "literal_error":
        known = [word.strip(" '") for word in str(context.get("expected", "")).replace(" or ", ",").split(",")]
        return f"unknown value `{item['input']}`{suggestion(str(item['input']), known)}; one of {', '.join(known)}"
    if kind in {"less_than", "greater_than"}:
        return f"must be {kind.replace('_', ' ')} {context.get('lt', context.get('gt'))}"
    if kind in {"less_than_equal", "greater_than_equal"}:
        word = "at most" if kind.startswith("less") else "at least"
        return f"must be {word} {context.get('le', context.get('ge'))}"
    if kind == "value_error":
        return str(context.get("error", item["msg"]))
    return f"{str(item['msg'])[:1].lower()}{str(item['msg'])[1:]}"


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Names of the fields that the table at ``location`` may hold (walks nested models and tagged unions)."""
    found: list[type[BaseModel]] = [model]
    for part in location:
        inner: list[type[BaseModel]] = []
        for candidate in found:
            field = candidate.model_fields.get(part) if isinstance(part, str) else None
            if field is not None:
                inner += _models_in(field.annotation)
        tagged = [candidate for candidate in found if part in _tags(candidate)]
        if inner:
            found = inner
        elif tagged:
            found = tagged
    return sorted({field.alias or name for candidate in found for name, field in candidate.model_fields.items()})


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("kind")
    return getattr(field.annotation, "__args__", ()) if field is not None else ()


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]
