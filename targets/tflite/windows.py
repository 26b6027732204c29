"""Sliding windows: how the padding of ONNX becomes SAME, VALID or a PAD of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from compressor.errors import CompileError
from targets.static_graph import Node
from targets.tflite.builder import Tensor
from targets.tflite.convert import Converter


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution or pool over (height, width)."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    mode: Literal["same", "valid", "explicit"]
    before: tuple[int, int]
    after: tuple[int, int]

    def padding(self, schema: Any) -> int:
        return int(schema.Padding.SAME if self.mode == "same" else schema.Padding.VALID)


def window_of(state: Converter, node: Node, kernel: Sequence[int]) -> Window:
    """Read strides, dilations and pads; the output size that ONNX Runtime found decides about rounding."""
    strides = _pair(node.attributes.get("strides", (1, 1)))
    dilations = _pair(node.attributes.get("dilations", (1, 1)))
    shape, result = state.graph.shape(node.input(0)), state.graph.shape(node.outputs[0])
    pads = tuple(node.attributes.get("pads", (0, 0, 0, 0)))
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    needed = [(result[axis + 2] - 1) * strides[axis] + reach[axis] - shape[axis + 2] for axis in range(2)]
    half = [max(total, 0) // 2 for total in needed]
    if node.attributes.get("auto_pad", "NOTSET") == "SAME_UPPER":
        pads = (*half, *(max(total, 0) - less for total, less in zip(needed, half, strict=True)))
    elif node.attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise CompileError(f"node `{node.name}`: auto_pad {node.attributes['auto_pad']} has no TFLite form")
    before = (int(pads[0]), int(pads[1]))
    after = tuple(max(int(pads[2 + axis]), needed[axis] - before[axis]) for axis in range(2))
    same = all(
        result[axis + 2] == -(-shape[axis + 2] // strides[axis])
        and before[axis] == half[axis]
        and before[axis] + max(needed[axis] - before[axis], 0) == max(needed[axis], 0)
        for axis in range(2)
    )
    mode: Literal["same", "valid", "explicit"] = "explicit"
    if not any(before) and not any(after):
        mode = "valid"
    elif same:
        mode = "same"
    return Window(_pair(kernel), strides, dilations, mode, before, (after[0], after[1]))


def _pair(values: Sequence[int]) -> tuple[int, int]:
    if len(values) != 2:
        raise CompileError("only windows over two dimensions have a TFLite form here")
    return int(values[0]), int(values[1])


def padded(state: Converter, node: Node, window: Window, *, quantized: bool, lowest: bool = False) -> Tensor:
    """The channels-last input of ``node``, with a PAD before it where the window needs one.

    Padding is zero (int8: the zero point), or the lowest value for a maximum.
    """
    source = state.get(node.input(0), last=True, quantized=quantized)
    if window.mode != "explicit":
        return source
    edges = np.asarray([[0, 0], *zip(window.before, window.after, strict=True), [0, 0]], np.int32)
    shape = tuple(size + int(low + high) for size, (low, high) in zip(source.shape, edges, strict=True))
    target = state.builder.tensor(f"{node.name}/padded", shape, source.type, source.quantization)
    inputs = [source, state.constant(edges, "pads")]
    if not lowest:
        state.builder.add("PAD", inputs, [target], state.schema.PadOptionsT())
        return target
    value = np.int8(-128) if quantized else np.finfo(np.float32).min
    fill = state.builder.constant("lowest", np.asarray([value]), source.quantization)
    state.builder.add("PADV2", [*inputs, fill], [target], state.schema.PadV2OptionsT())
    return target
