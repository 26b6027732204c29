"""Every built-in profile is valid, every figure has a source, the schema on disk is fresh."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from compressor.errors import ConfigError
from compressor.profile import expanded, load_profile, profile_names
from targets import registry
from tools.generate_schema import SCHEMA, schema_text

FOLDER = Path(__file__).parents[2] / "profiles"
NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))
EXPECTED = {
    "this-machine",
    "this-machine-2t",
    "laptop-x86-vnni",
    "raspberry-pi-5",
    "geforce-rtx-4070",
    "numpy-reference",
}


def test_the_promised_profiles_are_there():
    assert set(NAMES) >= EXPECTED
    assert set(profile_names()) >= EXPECTED


@pytest.mark.parametrize("name", NAMES)
def test_profile_is_valid_and_bears_its_file_name(name):
    profile = load_profile(name)
    assert profile.name == name
    assert profile.target in registry.names()


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_covered_by_a_source(name):
    """What the file states (not what was detected) about processor, memory and sparsity must be cited."""
    data = tomllib.loads((FOLDER / f"{name}.toml").read_text())
    stated = {f"{table}.{key}" for table in ("compute", "memory") for key in data.get(table, {})}
    stated |= {"sparsity.faster"} if "sparsity" in data else set()
    sources = data.get("sources", [])
    covered = {figure for source in sources for figure in source["figures"]}
    assert stated <= covered
    every = {f"{table}.{key}" for table, values in data.items() if isinstance(values, dict) for key in values}
    assert covered <= every, "a source names a figure that the profile does not have"
    assert all(source.get("url", "").startswith("https://") for source in sources)


@pytest.mark.parametrize("name", [name for name in NAMES if load_profile(name).here == "this-machine"])
def test_detected_figures_are_covered_too(name):
    profile = load_profile(name)
    covered = {figure for source in profile.sources for figure in source.figures}
    assert {"compute.processor", "compute.cores", "compute.features"} <= covered


def test_tensorrt_profile_asks_for_what_its_parser_takes():
    profile = load_profile("geforce-rtx-4070")
    rules = profile.quantization
    assert (rules.activation, rules.symmetric_activation, rules.quantize_bias) == ("int8", True, False)
    assert rules.weighted_only
    assert not rules.dynamic
    assert profile.compute.capability == "8.9"
    assert profile.options == {"flavour": "rtx", "workspace_mib": 1024, "max_batch": 8, "max_sequence": 128}


def test_unknown_profile_suggests_a_near_one():
    with pytest.raises(ConfigError, match="did you mean `raspberry-pi-5`"):
        load_profile("raspbery-pi-5")


def test_schema_on_disk_is_fresh():
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(), "run `python -m tools.generate_schema`"


def test_all_is_every_profile_once_with_this_machine_first() -> None:
    found = expanded(["numpy-reference", "all"])
    assert found[:2] == ("numpy-reference", "this-machine")
    assert sorted(found) == sorted(profile_names())
    assert expanded(["pixel-8"]) == ("pixel-8",)
