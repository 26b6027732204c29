"""Resolve ``pkg.mod:name``, the one import string there is. It only ever comes from the command line."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressor.config import suggestion
from compressor.errors import ConfigError

_ENTRY = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")


def is_entry(text: str) -> bool:
    """Whether ``text`` has the form ``pkg.mod:name``."""
    return bool(_ENTRY.match(text))


def _split(entry: str, what: str) -> tuple[str, str]:
    if not is_entry(entry):
        raise ConfigError.single(
            f"`{entry}`", what, "is not of the form `pkg.mod:name`", hint="Write `package.module:function`."
        )
    module, _, name = entry.partition(":")
    folder = os.getcwd()  # noqa: PTH109 - sys.path holds strings
    if folder not in sys.path:  # the user's own code lies where the command is run; console scripts leave that out
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    return module, name


def import_entry(entry: str, what: str) -> Callable[..., Any]:
    """Import ``pkg.mod:name`` from the current folder or the environment and return the callable.

    ``what`` ("factory", "loader") is used in messages. Raises :class:`ConfigError` when the module is not found or
    fails to import, the name is missing, or it is not callable.
    """
    module_name, name = _split(entry, what)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise _not_found(entry, what, module_name, error.name or module_name) from error
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ConfigError.single(
            f"`{entry}`",
            what,
            f"importing `{module_name}` failed: {type(error).__name__}: {error}",
            hint="Mend the module.",
        ) from error
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError.single(f"`{entry}`", what, f"`{module_name}` has no `{name}`{suggestion(name, known)}")
    found = getattr(module, name)
    if not callable(found):
        raise ConfigError.single(
            f"`{entry}`",
            what,
            f"is a {type(found).__name__}, not something to call",
            hint=f"Name a function as the {what}.",
        )
    return found  # type: ignore[no-any-return]


def _not_found(entry: str, what: str, module: str, missing: str) -> ConfigError:
    if module == missing or module.startswith(missing + "."):
        hint = "Run the command in the folder that holds the package, or install it."
        return ConfigError.single(f"`{entry}`", what, f"no module named `{missing}`", hint=hint)
    return ConfigError.single(
        f"`{entry}`",
        what,
        f"`{module}` needs the module `{missing}`, which is not installed",
        hint=f"pip install {missing}",
    )


def check_entry(entry: str, what: str) -> None:
    """The cheap half of :func:`import_entry`: find the module's source and the name in it, without running it."""
    module_name, name = _split(entry, what)
    try:
        spec = importlib.util.find_spec(module_name)
    except ModuleNotFoundError as error:
        raise _not_found(entry, what, module_name, error.name or module_name) from error
    if spec is None:
        raise _not_found(entry, what, module_name, module_name)
    if not spec.origin or not spec.origin.endswith(".py"):
        return  # an extension or namespace package: found out when it is imported
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    names, open_ended = _top_level_names(tree)
    if name not in names and not open_ended:
        raise ConfigError.single(
            f"`{entry}`", what, f"`{module_name}` has no `{name}`{suggestion(name, sorted(names))}"
        )


def _top_level_names(tree: ast.Module) -> tuple[set[str], bool]:
    """Names bound at the top of a module, and whether there may be more (``import *``, ``__getattr__``, ``if``)."""
    names: set[str] = set()
    open_ended = False
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.If | ast.Try):
            open_ended = True
    return names, open_ended or "*" in names or "__getattr__" in names
