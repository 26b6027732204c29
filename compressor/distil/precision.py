"""How the student is computed while it trains: float32 or bfloat16 autocast, and the memory order of pictures."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.types import write_atomic

PROBE_ROUNDS = 4
NEEDED_GAIN = 0.85  # bfloat16 must take at most this share of float32's time; nearer than that is noise


@dataclass(frozen=True)
class Numerics:
    """The decision. It is stored in the checkpoint, so that a resumed run computes as it began."""

    dtype: Literal["fp32", "bf16"]
    channels_last: bool

    def autocast(self, device: Any) -> AbstractContextManager[Any]:
        """The context in which the student's forward pass runs."""
        if self.dtype == "fp32":
            return nullcontext()
        found: AbstractContextManager[Any] = torch.autocast(device.type, dtype=torch.bfloat16)
        return found

    def place(self, inputs: Mapping[str, Tensor], device: Any) -> dict[str, Tensor]:
        """Inputs on the device, pictures in the chosen memory order."""
        if not self.channels_last:
            return {name: tensor.to(device) for name, tensor in inputs.items()}
        return {
            name: tensor.to(device, memory_format=torch.channels_last) if tensor.dim() == 4 else tensor.to(device)
            for name, tensor in inputs.items()
        }


def has_convolutions(module: nn.Module) -> bool:
    """Does it hold a 2-D convolution?"""
    return any(isinstance(part, nn.Conv2d) for part in module.modules())


def may_gain(student: nn.Module, device: Any) -> bool:
    """Is bfloat16 worth a trial on this processor and network?

    Yes on a GPU that has it and with matrix units (AMX). With vector instructions only (AVX-512 BF16) where there is no
    convolution: matrix products of a transformer gain there, training with convolutions was twice as slow.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has = _processor_has()
    return has("amx_bf16") or (has("avx512_bf16") and not _convolves(student))


def _processor_has() -> Callable[[str], bool]:
    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is not None:
        found = ask()
        return lambda name: bool(found.get(name, False))
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else ""
    return lambda name: name in text


def _convolves(module: nn.Module) -> bool:
    """Does it hold a convolution of any number of dimensions?"""
    from torch.nn.modules.conv import _ConvNd

    return any(isinstance(part, _ConvNd) for part in module.modules())


def decide(
    wanted: Literal["auto", "fp32", "bf16"], student: nn.Module, inputs: Mapping[str, Tensor], device: Any, notes: Path
) -> Numerics:
    """Choose the numerics of a run.

    ``auto`` times both on a copy of the student with a real batch, where the hardware could gain at all, and keeps the
    answer in ``notes`` per (network, batch shape, processor, threads): a student and its null twin compute alike.
    """
    channels_last = has_convolutions(student)
    if wanted != "auto":
        return Numerics(wanted, channels_last)
    if not may_gain(student, device):
        return Numerics("fp32", channels_last)
    note = notes / f"precision-{_key(student, inputs, device)}.json"
    if note.exists():
        return Numerics(json.loads(note.read_text(encoding="utf-8"))["dtype"], channels_last)
    seconds = _probe(student, inputs, device, channels_last)
    dtype: Literal["fp32", "bf16"] = "bf16" if seconds["bf16"] <= NEEDED_GAIN * seconds["fp32"] else "fp32"
    write_atomic(note, json.dumps({"dtype": dtype, "seconds": seconds}))
    return Numerics(dtype, channels_last)


def _key(student: nn.Module, inputs: Mapping[str, Tensor], device: Any) -> str:
    network = [(name, tuple(tensor.shape)) for name, tensor in student.state_dict().items()]
    batch = [(name, tuple(tensor.shape)) for name, tensor in sorted(inputs.items())]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    text = repr((network, batch, name, torch.get_num_threads(), torch.__version__))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _probe(student: nn.Module, inputs: Mapping[str, Tensor], device: Any, channels_last: bool) -> dict[str, float]:
    """Best time of a forward and backward pass, the two taking turns; the student itself is not touched."""
    trial = copy.deepcopy(student).to(device).train()
    if channels_last:
        trial = trial.to(memory_format=torch.channels_last)
    best: dict[str, float] = {}
    for round_ in range(PROBE_ROUNDS + 1):
        for dtype in ("fp32", "bf16"):
            numerics = Numerics("bf16" if dtype == "bf16" else "fp32", channels_last)
            placed = numerics.place(inputs, device)
            start = time.perf_counter()
            with numerics.autocast(device):
                output = trial(**placed)
            output.float().square().mean().backward()
            float(output.detach().flatten()[0])  # waits for a GPU
            taken = time.perf_counter() - start
            if round_:  # the first round warms up
                best[dtype] = min(best.get(dtype, taken), taken)
    return best
