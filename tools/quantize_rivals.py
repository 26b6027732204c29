"""Other people's quantizers at their defaults, on one fp32 file and one calibration set. Each row is one file.

Olive and ModelOpt live in environments of their own (``--olive``, ``--modelopt``: folders of virtual environments),
which this module only starts; ONNX Runtime's and NNCF's quantizers are in ours.

    python -m venv olive    && olive/bin/pip install torch==2.13.0 olive-ai==0.13.0 onnxruntime==1.31.1 requests
    python -m venv modelopt && modelopt/bin/pip install torch==2.13.0 "nvidia-modelopt[onnx]==0.47.0"
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Sample = dict[str, Array]
Make = Callable[[Path], None]  # writes the file
# Olive 0.13 asks an enum value that may be None for its lower case (with pydantic 2.14); this line of it is mended.
OLIVE_FAULT, OLIVE_MENDED = "        value = value.lower()\n", '        value = (value or "").lower()\n'
OLIVE_SCRIPT = """
import numpy as np
from olive.data.registry import Registry

class Samples:
    def __init__(self, path):
        with np.load(path) as stored:
            self.names = sorted({key.split(".", 1)[1] for key in stored.files})
            count = len(stored.files) // len(self.names)
            self.rows = [{name: stored[f"{index}.{name}"][0] for name in self.names} for index in range(count)]
    def __len__(self): return len(self.rows)
    def __getitem__(self, index): return self.rows[index], 0

@Registry.register_dataset()
def stored_samples(path, **_): return Samples(path)
"""


@dataclass(frozen=True)
class Rival:
    """A quantizer at named settings. ``reason``: why it is not run."""

    name: str
    make: Make
    reason: str = ""


class Reader:
    """ONNX Runtime's own interface to calibration data."""

    def __init__(self, samples: list[Sample]) -> None:
        self.items = iter(samples)

    def get_next(self) -> Sample | None:
        return next(self.items, None)


def rivals(
    source: Path, samples: list[Sample], work: Path, olive: Path | None, modelopt: Path | None
) -> Iterator[Rival]:
    """All of them, defaults first; ``work`` holds prepared files."""
    transformer = "input_ids" in samples[0]
    yield Rival("ONNX Runtime quantize_static, defaults", lambda out: ort_static(source, samples, work, out))
    yield Rival("ONNX Runtime quantize_dynamic, defaults", lambda out: ort_dynamic(source, work, out))
    yield Rival("NNCF 3.4 quantize, defaults", lambda out: nncf(source, samples, out, None))
    if transformer:
        yield Rival("NNCF 3.4 quantize, model_type=TRANSFORMER", lambda out: nncf(source, samples, out, "TRANSFORMER"))
    absent = "" if olive else "its environment was not given (--olive)"
    for title, settings in olive_passes(transformer).items():
        yield Rival(f"Olive 0.13 {title}", _olive(source, samples, work, olive, settings), absent)
    absent = "" if modelopt else "its environment was not given (--modelopt)"
    yield Rival("ModelOpt 0.47 int8, max", lambda out: _modelopt(source, samples, work, modelopt, out), absent)


def prepared(source: Path, work: Path) -> Path:
    """ONNX Runtime's recommended pre-processing."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = work / "prepared.onnx"
    if not path.is_file():
        quant_pre_process(str(source), str(path), skip_symbolic_shape=True)
    return path


def ort_static(source: Path, samples: list[Sample], work: Path, out: Path) -> None:
    from onnxruntime import quantization

    quantization.quantize_static(str(prepared(source, work)), str(out), Reader(samples))


def ort_dynamic(source: Path, work: Path, out: Path) -> None:
    from onnxruntime import quantization

    quantization.quantize_dynamic(str(prepared(source, work)), str(out))


def nncf(source: Path, samples: list[Sample], out: Path, kind: str | None) -> None:
    import nncf as engine
    import onnx

    given = {"model_type": getattr(engine.ModelType, kind)} if kind else {}
    onnx.save(engine.quantize(onnx.load(source), engine.Dataset(samples), **given), out)


def olive_passes(transformer: bool) -> dict[str, dict[str, Any]]:
    """Its default static pass, the settings of its own ResNet recipe, and its dynamic pass for transformers."""
    static: dict[str, Any] = {"type": "OnnxStaticQuantization", "data_config": "cal"}
    recipe = {**static, "precision": "int8", "activation_type": "uint8", "per_channel": True, "quant_preprocess": True}
    found = {"static, defaults": static, "static, uint8 activations, per channel": recipe}
    return {**found, "dynamic, defaults": {"type": "OnnxDynamicQuantization"}} if transformer else found


def _olive(source: Path, samples: list[Sample], work: Path, olive: Path | None, settings: dict[str, Any]) -> Make:
    def make(out: Path) -> None:
        assert olive is not None
        mend_olive(olive)
        data, script = work / "olive.npz", work / "olive_data.py"
        stored = {f"{index}.{name}": array for index, sample in enumerate(samples) for name, array in sample.items()}
        np.savez(data, **stored)  # type: ignore[arg-type]
        script.write_text(OLIVE_SCRIPT)
        folder = work / f"olive-{out.stem}"
        config = {
            "input_model": {"type": "OnnxModel", "model_path": str(source)},
            "systems": {"here": {"type": "LocalSystem", "accelerators": [
                {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}]}},
            "data_configs": [{"name": "cal", "user_script": str(script),
                              "load_dataset_config": {"type": "stored_samples", "params": {"path": str(data)}},
                              "dataloader_config": {"batch_size": 1}}],
            "passes": {"quantize": settings},
            "host": "here", "target": "here", "cache_dir": str(folder / "cache"), "output_dir": str(folder / "out"),
        }  # fmt: skip
        (work / "olive.json").write_text(json.dumps(config))
        run([olive / "bin/olive", "run", "--config", work / "olive.json"], {"OLIVE_DISABLE_TELEMETRY": "1"})
        (made,) = (folder / "out").rglob("model.onnx")
        shutil.copyfile(made, out)

    return make


def mend_olive(olive: Path) -> None:
    (path,) = olive.glob("lib/python*/site-packages/olive/common/config_utils.py")
    text = path.read_text()
    if OLIVE_FAULT in text:
        path.write_text(text.replace(OLIVE_FAULT, OLIVE_MENDED))


def _modelopt(source: Path, samples: list[Sample], work: Path, modelopt: Path | None, out: Path) -> None:
    """Its command line reads one array an input: texts are padded to one length. It overwrites its input: a copy."""
    assert modelopt is not None
    copy, data = work / "modelopt-input.onnx", work / "modelopt.npz"
    shutil.copyfile(source, copy)
    np.savez(data, **{name: stacked([sample[name] for sample in samples]) for name in samples[0]})  # type: ignore[arg-type]
    flags = {"onnx_path": copy, "quantize_mode": "int8", "calibration_data": data, "calibration_method": "max",
             "calibration_eps": "cpu", "high_precision_dtype": "fp32", "output_path": out}  # fmt: skip
    words = [f"--{name}={value}" for name, value in flags.items()]
    run([modelopt / "bin/python", "-m", "modelopt.onnx.quantization", *words], {})


def stacked(arrays: list[Array]) -> Array:
    """One array of all; the second axis is filled up with zeros."""
    longest = max(array.shape[1] for array in arrays)
    return np.concatenate(
        [np.pad(item, [(0, 0), (0, longest - item.shape[1]), *[(0, 0)] * (item.ndim - 2)]) for item in arrays]
    )


def run(words: list[object], extra: dict[str, str]) -> None:
    """In a child process; its output is shown only when it fails."""
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, env={**os.environ, **extra}, check=False
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
