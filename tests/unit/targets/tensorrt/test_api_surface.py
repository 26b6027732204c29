"""Every name that the code uses on the vendor's API exists in real bindings of three releases.

The snapshots hold the public names of some classes, read from the bindings themselves.
"""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path

import pytest

from targets.backends.tensorrt import builder, options, session

SNAPSHOTS = Path(__file__).parents[3] / "data" / "tensorrt_api"
RTX_ONLY = {
    "ComputeCapability",
    "EngineValidity",
    "EngineValidity.INVALID",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "Runtime.get_engine_validity",
}
# Names of variables in the code -> class of the bindings.
VARIABLES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "config": "IBuilderConfig",
    "shape_profile": "IOptimizationProfile",
    "tensor": "ITensor",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "_context": "IExecutionContext",
}
IGNORED = {"__version__", "ComputeCapability.__members__", "ILogger.__init__"}


def receiver(node: ast.expr) -> str:
    """``trt`` of ``trt.X`` and of ``self._trt.X``; ``_engine`` of ``self._engine.x``."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return ""


def used_names(source: str) -> set[str]:
    """``Class``, ``Class.member`` and ``function`` of the bindings that the source uses."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute):
            continue
        owner = receiver(node.value)
        if owner in {"trt", "_trt"}:
            found.add(node.attr)
        elif owner in VARIABLES:
            found.add(f"{VARIABLES[owner]}.{node.attr}")
        elif isinstance(node.value, ast.Attribute) and receiver(node.value.value) in {"trt", "_trt"}:
            found.add(f"{node.value.attr}.{node.attr}")
    return found - IGNORED


def missing(used: set[str], names: dict[str, list[str]]) -> set[str]:
    known = set(names) | {f"{owner}.{member}" for owner, members in names.items() for member in members}
    return used - known


@pytest.fixture(scope="module")
def used() -> set[str]:
    return set().union(*(used_names(Path(str(module.__file__)).read_text()) for module in (builder, session)))


def test_the_check_sees_the_code(used: set[str]) -> None:
    owners = {name.split(".")[0] for name in used}
    assert set(VARIABLES.values()) <= owners, "a variable was renamed: this test would be blind"
    assert len(used) > 35
    assert missing({"Builder.build_everything"}, {"Builder": ["build_serialized_network"]}) == {
        "Builder.build_everything"
    }


@pytest.mark.parametrize("release", ["tensorrt_10.16", "tensorrt_11.4", "rtx_1.7"])
def test_names_exist_in_the_release(release: str, used: set[str]) -> None:
    snapshot = json.loads((SNAPSHOTS / f"{release}.json").read_text())
    expected = set() if release.startswith("rtx") else RTX_ONLY
    assert missing(used, snapshot["names"]) == expected & used


def test_snapshot_is_what_the_installed_bindings_have(rtx: str) -> None:
    snapshot = json.loads((SNAPSHOTS / "rtx_1.7.json").read_text())
    assert snapshot["version"] == rtx
    trt = importlib.import_module("tensorrt_rtx_bindings")
    for owner, members in snapshot["names"].items():
        assert set(members) <= set(dir(getattr(trt, owner))), owner
    known = {name for name in snapshot["names"]["ComputeCapability"] if name.startswith("SM")}
    assert known == set(options.RTX_CAPABILITIES)


def test_no_removed_precision_flag_is_used(used: set[str]) -> None:
    flags = {name for name in used if name.startswith("BuilderFlag")}
    assert flags == {"BuilderFlag", "BuilderFlag.SPARSE_WEIGHTS"}  # FP16, INT8 ... are gone since TensorRT 11
