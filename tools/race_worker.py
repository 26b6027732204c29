"""One compiled file in its runtime's own Python interface, at one thread; waits for orders on standard input.

    python race_worker.py RUNTIME FILE SAMPLES.npz [--names a b] [--own-length NAME]

Stands alone (numpy and the runtime), so that it runs in any environment. ``score``: answers of all samples go to the
file that the order names; ``time N``: the next N samples, one by one, nanoseconds each. Tensors are made before the
clock starts; reading every output back is inside.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Sample = dict[str, np.ndarray]
Prepared = tuple[Callable[[Sample], Any], Callable[[Any], np.ndarray]]  # before the clock; inside it


def onnxruntime(path: str, names: list[str]) -> Prepared:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    fed = {value.name: names[place] if names else value.name for place, value in enumerate(session.get_inputs())}
    return lambda sample: {own: sample[name] for own, name in fed.items()}, lambda feeds: session.run(None, feeds)[0]


def openvino(path: str, names: list[str]) -> Prepared:
    import openvino as ov

    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(path, "CPU", settings).create_infer_request()
    order = names or [value.get_any_name() for value in request.model_inputs]

    def run(values: list[np.ndarray]) -> np.ndarray:
        request.infer(values, share_inputs=True)
        return np.array(request.get_output_tensor(0).data)

    return lambda sample: [sample[name] for name in order], run


def litert(path: str, names: list[str]) -> Prepared:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=1)
    interpreter.allocate_tensors()
    inputs = sorted(interpreter.get_input_details(), key=lambda item: item["name"])  # args_0, args_1, ... or our names
    order = names or [item["name"] for item in inputs]
    result = interpreter.get_output_details()[0]

    def prepare(sample: Sample) -> list[tuple[int, np.ndarray]]:
        made = []
        for item, name in zip(inputs, order, strict=True):
            value, (scale, zero) = sample[name], item["quantization"]
            if scale and item["dtype"] in (np.int8, np.uint8):
                limits = np.iinfo(item["dtype"])
                value = np.clip(np.round(value / scale) + zero, limits.min, limits.max)
            made.append((item["index"], value.astype(item["dtype"])))
        return made

    def run(values: list[tuple[int, np.ndarray]]) -> np.ndarray:
        for index, value in values:
            interpreter.set_tensor(index, value)
        interpreter.invoke()
        found = interpreter.get_tensor(result["index"])
        scale, zero = result["quantization"]
        return (found.astype(np.float32) - zero) * scale if scale and found.dtype != np.float32 else found

    return prepare, run


def executorch(path: str, names: list[str]) -> Prepared:
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(1)
    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    kept = [program]  # must outlive its method

    def run(values: list[Any]) -> np.ndarray:
        assert kept
        return np.array(method.execute(values)[0].numpy())

    return lambda sample: [torch.from_numpy(sample[name]) for name in names], run


RUNTIMES = {"onnxruntime": onnxruntime, "openvino": openvino, "litert": litert, "executorch": executorch}


def cut(sample: Sample, by: str) -> Sample:
    """A padded text at its own length: what the mask ``by`` keeps."""
    length = int(sample[by].sum())
    return {name: np.ascontiguousarray(array[:, :length]) for name, array in sample.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("file")
    parser.add_argument("samples", type=Path)
    parser.add_argument("--names", nargs="*", default=[], help="arrays of SAMPLES in the order of the file's inputs")
    parser.add_argument("--own-length", metavar="MASK")
    words = parser.parse_args()
    prepare, run = RUNTIMES[words.runtime](words.file, words.names)
    with np.load(words.samples, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    count = len(next(iter(arrays.values())))
    ready = []
    for place in range(count):
        sample = {name: array[place : place + 1] for name, array in arrays.items()}
        ready.append(prepare(cut(sample, words.own_length) if words.own_length else sample))
    run(ready[0])
    print(json.dumps({"samples": count}), flush=True)
    cursor = 0
    for line in sys.stdin:
        order, value = line.split(maxsplit=1)
        if order == "score":
            np.save(value.strip(), np.concatenate([run(item) for item in ready]))
            print("{}", flush=True)
            continue
        taken = []
        for _ in range(int(value)):
            item = ready[cursor % count]
            cursor += 1
            began = time.perf_counter_ns()
            run(item)
            taken.append(time.perf_counter_ns() - began)
        print(json.dumps({"ns": taken}), flush=True)


if __name__ == "__main__":
    main()
