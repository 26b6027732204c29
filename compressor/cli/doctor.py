"""``doctor``: what is installed, what each target could do here, what to install."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from compressor.cli.output import facts, stdout_json

CORE = ("numpy", "onnx", "onnxruntime", "pydantic", "typer")
TRAIN = ("torch", "transformers", "optimum", "accelerate", "nncf", "datasets", "onnxscript", "safetensors", "pillow")
TRAIN_HINT = 'pip install "compress-for-device[train]"'


def doctor_command(*, as_json: bool) -> int:
    """Look around without changing anything."""
    from compressor.cli.session import target_views
    from compressor.machine import facts as machine_facts

    core, train = {name: _version(name) for name in CORE}, {name: _version(name) for name in TRAIN}
    absent = [name for name, found in train.items() if found is None]
    views = target_views()
    free = shutil.disk_usage(Path.cwd()).free // 2**20
    hints = [f"training is not possible: install {', '.join(absent)} with `{TRAIN_HINT}`"] if absent else []
    hints += [f"{name}: {view.hint}" for name, view in views.items() if not view.ready and view.hint]
    if as_json:
        stdout_json(
            {
                "machine": machine_facts(), "free_disk_mib": free, "core": core, "train": train,
                "targets": [vars(view) for view in views.values()], "hints": hints,
            }
        )  # fmt: skip
        return 0
    print("machine")
    facts({**machine_facts(), "free disk here": f"{free:,} MiB"})
    print("\ncore (profile, post-training quantization, compile, measure, package of ONNX files)")
    facts({name: found or "MISSING" for name, found in core.items()})
    print("\ntrain (distil, prune, export of torch models)")
    facts({name: found or "not installed" for name, found in train.items()})
    print("\ntargets")
    for name, view in views.items():
        state = (
            f"ready, figures are {view.runs}"
            if view.runs
            else "ready to compile, cannot run here"
            if view.ready
            else "missing"
        )
        print(f"  {name}: {state}" + (f" ({view.reason})" if view.reason else ""))
    print("\nto do" if hints else "\nnothing is missing")
    for hint in hints:
        print(f"  {hint}")
    return 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
