"""A build kit: everything that makes an enterprise engine on its own device, checked as far as this machine allows.

Enterprise TensorRT builds only with the GPU at hand. The folder ``<name>.trtkit/`` holds the model, ``manifest.json``,
``build_engine.py`` (a copy of :mod:`builder`: the code that TensorRT-RTX ran here) and ``build.sh`` (the same through
``trtexec``).
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.types import file_digest, write_atomic
from targets.backends.tensorrt.engine_file import write_manifest
from targets.backends.tensorrt.options import Shapes

MODEL, ENGINE, MANIFEST = "model.onnx", "model.engine", "manifest.json"

_BUILD_SH = """\
#!/usr/bin/env bash
# Builds {engine} on the device it is for. TensorRT 10.3 or newer; 11 and newer need no --stronglyTyped.
set -euo pipefail
cd "$(dirname "$0")"
TRTEXEC="${{TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}}"
if [ ! -x "$TRTEXEC" ]; then
  echo "no trtexec here (set TRTEXEC to its path); building through Python instead" >&2
  exec python3 build_engine.py
fi
flags=(
{flags}
)
# The flag exists up to TensorRT 11, where it changes nothing; precision stands in the graph, never in a flag.
help="$("$TRTEXEC" --help 2>/dev/null || true)"
if [[ "$help" == *--stronglyTyped* ]]; then
  flags+=(--stronglyTyped)
fi
exec "$TRTEXEC" "${{flags[@]}}" "$@"
"""


def trtexec_flags(shapes: Shapes, workspace_mib: int, *, sparse: bool = False) -> list[str]:
    """Flags that say what :func:`builder.build` does through the API."""
    flags = [
        f"--onnx={MODEL}",
        f"--saveEngine={ENGINE}",
        f"--memPoolSize=workspace:{workspace_mib}",
        "--profilingVerbosity=detailed",
        "--exportLayerInfo=layers.json",
        "--timingCacheFile=timing.cache",
        "--skipInference",
    ]
    flags += ["--sparsity=enable"] if sparse else []
    dynamic = {name: three for name, three in shapes.items() if three[0] != three[2]}
    for position, word in enumerate(("min", "opt", "max")):
        if dynamic:
            listed = ",".join(f"{name}:{'x'.join(map(str, three[position]))}" for name, three in dynamic.items())
            flags.append(f"--{word}Shapes={listed}")
    return flags


def write_kit(
    folder: Path, onnx_path: Path, shapes: Shapes, workspace_mib: int, facts: Mapping[str, Any], *, sparse: bool = False
) -> tuple[Path, ...]:
    """Write the kit as a whole or not at all. Returns its files, the manifest first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".kit-", dir=folder.parent) as scratch:
        draft = Path(scratch) / folder.name
        draft.mkdir()
        _copy_model(onnx_path, draft / MODEL)
        shutil.copyfile(Path(__file__).with_name("builder.py"), draft / "build_engine.py")
        flags = "\n".join(f"  {shlex.quote(flag)}" for flag in trtexec_flags(shapes, workspace_mib, sparse=sparse))
        write_atomic(draft / "build.sh", _BUILD_SH.format(engine=ENGINE, flags=flags))
        (draft / "build.sh").chmod(0o755)
        content = {
            "kind": "tensorrt-build-kit",
            "state": "engine not built",
            "onnx": MODEL,
            "onnx_digest": file_digest(draft / MODEL),
            "engine": ENGINE,
            "tensorrt": ">=10.3",
            "request": {"shapes": shapes, "workspace_mib": workspace_mib, "sparse_weights": sparse},
            **facts,
        }
        write_manifest(draft / MANIFEST, content)
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)
    others = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    return (folder / MANIFEST, *others)


def _copy_model(source: Path, target: Path) -> None:
    """Copy the model; external data, wherever it lay, goes into one file beside it."""
    import onnx

    model = onnx.load(str(source), load_external_data=False)
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        onnx.save_model(onnx.load(str(source)), str(target), save_as_external_data=True, location=f"{MODEL}.data")
    else:
        shutil.copyfile(source, target)
