"""A student in LiteRT and in ExecuTorch as their own guides say: their exporter, their quantizer, nothing of ours.

    python race_peers.py litert|executorch STUDENT.pt2 CALIBRATION.npz OUT [--text]

Stands alone: run it where litert-torch 0.10 and ai-edge-quantizer 0.10, or executorch 1.5 and torchao, are installed.
Pictures are quantized statically per channel; texts dynamically, as both guides advise for transformers (static
quantization of a masked transformer by either loses most of its accuracy). Writes OUT/fp32.* and OUT/int8.*.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

CALIBRATED = 256


def calibration(path: Path) -> list[tuple[Any, ...]]:
    with np.load(path, allow_pickle=False) as stored:
        arrays = [stored[name] for name in stored.files]
    return [
        tuple(torch.from_numpy(array[place : place + 1]) for array in arrays)
        for place in range(min(CALIBRATED, len(arrays[0])))
    ]


def litert(student: Any, samples: list[tuple[Any, ...]], out: Path, text: bool) -> None:
    import litert_torch
    from ai_edge_quantizer import quantizer, recipe

    litert_torch.convert(student, samples[0]).export(str(out / "fp32.tflite"))
    tool = quantizer.Quantizer(str(out / "fp32.tflite"))
    tool.load_quantization_recipe(recipe.dynamic_wi8_afp32() if text else recipe.static_wi8_ai8())
    found = None
    if tool.need_calibration:
        rows = [{f"args_{place}": value.numpy() for place, value in enumerate(sample)} for sample in samples]
        found = tool.calibrate({"serving_default": rows})
    tool.quantize(found).export_model(str(out / "int8.tflite"))


def executorch(student: Any, samples: list[tuple[Any, ...]], out: Path, text: bool) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    def lowered(module: Any, name: str) -> None:
        program = to_edge_transform_and_lower(
            torch.export.export(module, samples[0]), partitioner=[XnnpackPartitioner()]
        )
        (out / name).write_bytes(program.to_executorch().buffer)

    lowered(student, "fp32.pte")
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=text)
    prepared = prepare_pt2e(student, XNNPACKQuantizer().set_global(config))
    for sample in samples:
        prepared(*sample)
    lowered(convert_pt2e(prepared), "int8.pte")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runtime", choices=("litert", "executorch"))
    parser.add_argument("student", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", action="store_true")
    words = parser.parse_args()
    torch.set_num_threads(1)
    words.out.mkdir(parents=True, exist_ok=True)
    make = litert if words.runtime == "litert" else executorch
    with torch.no_grad():
        student = torch.export.load(words.student).module()
        make(student, calibration(words.calibration), words.out, words.text)


if __name__ == "__main__":
    main()
