"""Layers that round their weights and what they read as a device will, in place of the plain ones.

A layer keeps its parameters and its name; only its class changes, and the learnt ranges become parameters of it
(``input_log_scale`` ...), so that checkpoints, averages and records of a student hold them like any weight. Scales are
learnt as logarithms: one learning rate fits every layer, and none becomes negative.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.models import quantizers
from compressor.models.quantizers import Codes, Range
from compressor.models.rounded import Ends, RoundedLayer
from compressor.qat import BITS, Precision, Quantizer

BIAS_LIMIT = 2.0**31 - 128  # the largest float32 below 2^31


@dataclass(frozen=True)
class Scheme:
    """How one layer is rounded; plain values, for the structure record."""

    precision: Precision
    method: Quantizer
    per: str = "channel"  # what shares a scale: an output channel, the whole tensor, or a number of its inputs
    reduced: bool = False  # seven bits
    activation_bits: int = 0  # 0: what it reads stays float
    symmetric: bool = False
    positive: bool = False  # nothing negative came in: the zero point stays at 0
    output: str = ""  # "", "positive" or "both": also what it gives is rounded
    bias: bool = False  # the bias is an int32 of input scale x weight scale
    source: str = ""  # the layer that reads the same tensor first, whose range it shares

    @property
    def limits(self) -> Range:
        """Codes of symmetric weights: narrow at 8 bits (some targets know no -128) and for ternary ones."""
        narrow = self.precision in ("int8", "ternary")
        return quantizers.signed(BITS[self.precision], narrow=narrow, reduced=self.reduced)

    @property
    def shift_steps(self) -> int:
        return quantizers.SHIFT_STEPS // 2 if self.reduced else quantizers.SHIFT_STEPS


class FakeQuantized:
    """What the rounding layers share; mixed into a torch layer with a ``weight`` whose first axis are its outputs."""

    scheme: Scheme
    weight: nn.Parameter
    bias: nn.Parameter | None

    def rows(self) -> Tensor:
        """The latent weight, a row for each scale."""
        per = self.scheme.per
        if per == "tensor":
            return self.weight.reshape(1, -1)
        return self.weight.reshape(len(self.weight), -1) if per == "channel" else self.weight.reshape(-1, int(per))

    def codes(self) -> Codes:
        """Codes and scales of the weight, with gradients."""
        scheme, rows = self.scheme, self.rows()
        if scheme.method == "minmax":
            return quantizers.minmax(rows, BITS[scheme.precision])
        if scheme.method == "twn":
            found = quantizers.twn(rows)[0]
            return Codes(found.codes.detach(), found.scale.detach())
        scale = self._learnt("weight_log_scale", rows.shape[1], scheme.limits.high).exp()[:, None]
        if scheme.method == "dlt":
            ratio = self._learnt("weight_shift", rows.shape[1], 1)[:, None]
            return quantizers.dlt(rows, scale, ratio, scheme.shift_steps)
        return quantizers.lsq(rows, scale, scheme.limits)

    def _learnt(self, name: str, elements: int, levels: int) -> Tensor:
        return quantizers.damped(getattr(self, name), elements, levels)

    def fake_weight(self, codes: Codes) -> Tensor:
        """The weight as the device will have it, with a gradient for the latent one."""
        value = codes.value if self.scheme.method == "lsq" else quantizers.through(codes.value, self.rows())
        return value.reshape(self.weight.shape)

    def fake_bias(self, codes: Codes) -> Tensor | None:
        """The bias as an int32 times input scale times weight scale, where the target stores it so."""
        if self.bias is None or not self.scheme.bias:
            return self.bias
        scale = self.bias_scale(codes)
        return quantizers.round_through((self.bias / scale).clamp(-BIAS_LIMIT, BIAS_LIMIT)) * scale

    def bias_scale(self, codes: Codes) -> Tensor:
        """(C) or (1)."""
        return (self.range("input")[0] * codes.scale.flatten()).detach()

    def range(self, end: str) -> tuple[Tensor, Tensor]:
        """Scale and zero point, both (), of what it reads (``input``) or gives (``output``); unsigned convention."""
        scheme = self.scheme
        top = 2**scheme.activation_bits - 1
        scale = getattr(self, f"{end}_log_scale").exp()
        if scheme.symmetric:
            return scale, scale.new_tensor(2.0 ** (scheme.activation_bits - 1))
        fixed = scheme.positive if end == "input" else scheme.output == "positive"
        if fixed:
            return scale, scale.new_zeros(())
        return scale, (getattr(self, f"{end}_offset") * top).clamp(0, top)

    def _rounded(self, x: Tensor, end: str) -> Tensor:
        top = 2**self.scheme.activation_bits - 1
        scale, zero = self.range(end)
        sample = x[0].numel() if x.dim() else 1  # LSQ counts the features of one sample, not the batch
        return quantizers.fake_activation(
            x, quantizers.damped(scale, sample, top), quantizers.damped(zero, sample, top), top
        )

    def read(self, x: Tensor) -> Tensor:
        return self._rounded(x, "input") if self.scheme.activation_bits else x

    def write(self, x: Tensor) -> Tensor:
        return self._rounded(x, "output") if self.scheme.output else x


class _Convolution(FakeQuantized):
    def forward(self, input: Tensor) -> Tensor:
        codes = self.codes()
        made = self._conv_forward(self.read(input), self.fake_weight(codes), self.fake_bias(codes))  # type: ignore[attr-defined]
        return self.write(made)


class RoundedLinear(FakeQuantized, nn.Linear):  # type: ignore[misc]  # torch is not followed by mypy
    """A linear layer as the device computes it."""

    def forward(self, input: Tensor) -> Tensor:
        codes = self.codes()
        return self.write(F.linear(self.read(input), self.fake_weight(codes), self.fake_bias(codes)))


class RoundedConv1d(_Convolution, nn.Conv1d):  # type: ignore[misc]
    """A 1-D convolution as the device computes it."""


class RoundedConv2d(_Convolution, nn.Conv2d):  # type: ignore[misc]
    """A 2-D convolution as the device computes it."""


class RoundedConv3d(_Convolution, nn.Conv3d):  # type: ignore[misc]
    """A 3-D convolution as the device computes it."""


KINDS: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.Linear: RoundedLinear,
    nn.Conv1d: RoundedConv1d,
    nn.Conv2d: RoundedConv2d,
    nn.Conv3d: RoundedConv3d,
}
PLAIN = {rounded: plain for plain, rounded in KINDS.items()}
LEARNT = ("weight_log_scale", "weight_shift", "input_log_scale", "input_offset", "output_log_scale", "output_offset")


def rounding(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and layer of every rounding layer, in the module's order."""
    for name, part in module.named_modules():
        if isinstance(part, FakeQuantized):
            yield name, part


def is_rounded(module: nn.Module) -> bool:
    """Was it trained with fake quantization?"""
    return any(True for _ in rounding(module))


def change(module: nn.Module, name: str, scheme: Scheme) -> Any:
    """The layer ``name`` rounds from now on, in place; its ranges hold no values yet (see :func:`start`).

    Raises:
        ValueError: there is no such layer, or it is of a kind that cannot.
    """
    layer: Any = module.get_submodule(name)
    if type(layer) not in KINDS:
        raise ValueError(f"`{name}` is a {type(layer).__name__}")
    layer.__class__, layer.scheme = KINDS[type(layer)], scheme
    count = len(layer.rows())
    for key in _names(scheme):
        if scheme.source and key.startswith("input_"):
            value = getattr(module.get_submodule(scheme.source), key)
        else:
            value = nn.Parameter(layer.weight.new_zeros(count if key.startswith("weight_") else ()))
        layer.register_parameter(key, value)
    return layer


def _names(scheme: Scheme) -> list[str]:
    found = ["weight_log_scale"] if scheme.method in ("lsq", "dlt") else []
    found += ["weight_shift"] if scheme.method == "dlt" else []
    if not scheme.activation_bits:
        return found
    found += ["input_log_scale"]
    found += [] if scheme.symmetric or scheme.positive else ["input_offset"]
    if scheme.output:
        found += ["output_log_scale"]
        found += [] if scheme.symmetric or scheme.output == "positive" else ["output_offset"]
    return found


def start(layer: Any, reads: tuple[float, float], gives: tuple[float, float]) -> None:
    """First values of the ranges: of the weight from itself, of activations from lowest and highest values seen."""
    scheme: Scheme = layer.scheme
    with torch.no_grad():
        rows = layer.rows().float()
        if scheme.method == "lsq" and scheme.precision == "ternary":  # gamma * mean|w| with gamma 0.7 (methods Q1)
            scale = quantizers.TERNARY_THRESHOLD * rows.abs().mean(1).clamp_min(quantizers.TINY)
            layer.weight_log_scale.copy_(scale.log())
        elif scheme.method == "lsq":
            layer.weight_log_scale.copy_(quantizers.least_error_scale(rows, scheme.limits)[:, 0].log())
        elif scheme.method == "dlt":
            scale, shift = quantizers.dlt_start(rows)
            layer.weight_log_scale.copy_(scale[:, 0].log())
            layer.weight_shift.copy_((shift / scale)[:, 0])
        if not scheme.activation_bits:
            return
        for end, (low, high) in (("input", reads), ("output", gives)):
            if not hasattr(layer, f"{end}_log_scale") or (end == "input" and scheme.source):
                continue
            step, zero = quantizers.activation_start(low, high, scheme.activation_bits, symmetric=scheme.symmetric)
            getattr(layer, f"{end}_log_scale").copy_(torch.tensor(step).log())
            if hasattr(layer, f"{end}_offset"):
                getattr(layer, f"{end}_offset").copy_(torch.tensor(zero / (2**scheme.activation_bits - 1)))


def settled(module: nn.Module) -> nn.Module:
    """A copy with plain layers whose weights and biases are the rounded ones; activations are not rounded in it."""
    made = copy.deepcopy(module)
    with torch.no_grad():
        numbered = [(layer, layer.codes()) for _, layer in rounding(made)]
        values = [(layer, layer.fake_weight(codes), layer.fake_bias(codes)) for layer, codes in numbered]
        for layer, weight, bias in values:
            layer.weight.copy_(weight)
            if layer.bias is not None:
                layer.bias.copy_(bias)
            for key in LEARNT:
                layer._parameters.pop(key, None)
            layer.__class__ = PLAIN[type(layer)]
            del layer.scheme
    return made


def trained_layers(module: nn.Module) -> tuple[RoundedLayer, ...]:
    """Every rounding layer as the numbers that go into a file."""
    with torch.no_grad():
        return tuple(_numbers(name, layer) for name, layer in rounding(module))


def _numbers(name: str, layer: Any) -> RoundedLayer:
    scheme, codes = layer.scheme, layer.codes()
    shape = tuple(layer.weight.shape)
    bias = layer.fake_bias(codes)
    bias_codes = (bias / layer.bias_scale(codes)).round().double().numpy().astype(np.int32) if scheme.bias else None
    return RoundedLayer(
        name=name,
        precision=scheme.precision,
        method=scheme.method,
        per=scheme.per,
        value=layer.fake_weight(codes).numpy().copy(),
        codes=codes.codes.round().numpy().astype(np.int16).reshape(shape),
        scale=codes.scale.flatten().numpy().copy(),
        zero=None if codes.zero is None else codes.zero.flatten().numpy().astype(np.int16),
        steps=scheme.shift_steps if scheme.method == "dlt" else 1,
        bias_codes=bias_codes,
        bias_scale=layer.bias_scale(codes).numpy().copy() if scheme.bias else None,
        reads=_ends(layer, "input") if scheme.activation_bits else None,
        gives=_ends(layer, "output") if scheme.output else None,
    )


def _ends(layer: Any, end: str) -> Ends:
    scale, zero = layer.range(end)
    return Ends(float(scale), round(float(zero)), layer.scheme.activation_bits)


def step_of(name: str, scheme: Scheme) -> dict[str, Any]:
    """The record step that gives a layer this structure."""
    return {"op": "round", "module": name, **asdict(scheme)}


def scheme_of(step: Mapping[str, Any]) -> Scheme:
    """The scheme in a record step."""
    return Scheme(**{key: value for key, value in step.items() if key not in ("op", "module")})
