"""Detection from recorded /proc files, and what it adds to a profile."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from compressor.config import validate
from compressor.machine import Machine, complete, detect, facts, features, parse_cpuinfo, usable_cores
from compressor.profile import HardwareProfile

X86 = (
    "processor\t: 0\nmodel name\t: Intel(R) Xeon(R)\nflags\t\t: fpu avx2 fma avx512f avx512_vnni\n\n"
    "processor : 1\nmodel name : B\n"
)
A76 = "processor : 0\nFeatures : fp asimd asimdhp asimddp\nCPU implementer : 0x41\nCPU part : 0xd0b\n"

HASWELL = Machine(
    processor="Old",
    architecture="x86_64",
    cores=4,
    cores_total=8,
    features=("avx2", "fma"),
    ram_mib=8000,
    system="Debian",
    container="",
    load=None,
)
BASE = {"name": "mine", "title": "Mine", "target": "onnxruntime-cpu", "here": "this-machine"}


def recorded(folder, cpuinfo, board=""):
    (folder / "proc/device-tree").mkdir(parents=True)
    (folder / "proc/cpuinfo").write_text(cpuinfo)
    (folder / "proc/meminfo").write_text("MemTotal:       8388608 kB\nMemFree: 1 kB\n")
    (folder / "proc/device-tree/model").write_text(board)
    return detect(folder)


def test_x86_is_read_from_flags(tmp_path):
    machine = recorded(tmp_path, X86)
    assert machine.processor == "Intel(R) Xeon(R)"
    assert machine.features == ("avx2", "fma", "avx512f", "avx512_vnni")
    assert machine.ram_mib == 8192


def test_arm_core_is_named_after_its_part_number_and_board(tmp_path):
    machine = recorded(tmp_path, A76, "Raspberry Pi 5 Model B Rev 1.0\x00")
    assert machine.processor == "Raspberry Pi 5 Model B Rev 1.0 (Cortex-A76)"
    assert machine.features == ("asimd", "asimdhp", "asimddp")


def test_nothing_to_read_is_not_an_error(tmp_path):
    machine = detect(tmp_path)
    assert machine.processor
    assert machine.ram_mib is None
    assert facts(machine)["memory"] == "unknown"


@pytest.mark.parametrize(
    ("found", "architecture", "reduce"),
    [
        (("avx2",), "x86_64", True),
        (("avx2", "avx512f"), "x86_64", True),
        (("avx2", "avx_vnni"), "x86_64", False),
        (("avx512f", "avx512_vnni"), "x86_64", False),
        (("amx_int8",), "x86_64", False),
        (("asimd",), "aarch64", False),
    ],
)
def test_reduced_range_is_for_x86_without_int8_dot_products(found, architecture, reduce):
    assert replace(HASWELL, features=found, architecture=architecture).reduce_range is reduce


def test_complete_fills_what_is_missing_and_names_the_command():
    profile = validate(HardwareProfile, complete(BASE, HASWELL), "profile")
    assert profile.compute.processor == "Old"
    assert profile.compute.cores == 4
    assert profile.memory.ram_mib == 8000
    assert profile.quantization.reduce_range
    covered = {figure: source.command for source in profile.sources for figure in source.figures}
    assert covered["compute.cores"] == "cat /proc/cpuinfo"
    assert covered["quantization.reduce_range"] == "cat /proc/cpuinfo"
    assert covered["memory.ram_mib"] == "cat /proc/meminfo"


def test_complete_keeps_what_the_file_states_and_leaves_its_argument_alone():
    data = {**BASE, "compute": {"cores": 1}, "quantization": {"reduce_range": False}}
    profile = validate(HardwareProfile, complete(data, HASWELL), "profile")
    assert profile.compute.cores == 1
    assert not profile.quantization.reduce_range
    assert data["compute"] == {"cores": 1}
    assert "compute.cores" not in {figure for source in profile.sources for figure in source.figures}


def test_facts_of_this_machine_are_text():
    found = facts()
    assert {"processor", "cores", "features", "memory", "system", "load"} <= set(found)
    assert all(isinstance(value, str) and value for value in found.values())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_cores_are_those_of_the_affinity_mask():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_parsing_ignores_lines_without_a_colon():
    assert parse_cpuinfo("nonsense\n a : b\n a : c\n") == {"a": "b"}
    assert features({}) == ()


def test_the_core_imports_without_torch():
    code = (
        "import sys, compressor.evaluate, compressor.machine, compressor.profile, targets.deploy, targets.registry\n"
        "from targets.backends import onnxruntime_cpu, numpy_reference\n"
        "heavy = {'torch', 'transformers', 'nncf', 'datasets', 'PIL', 'onnxruntime', 'onnx'} & set(sys.modules)\n"
        "sys.exit(','.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
