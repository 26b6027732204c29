"""Float formats as data (IEEE 754 binary16; bfloat16; Micikevicius et al., FP8 Formats for Deep Learning, 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from onnx import TensorProto


@dataclass(frozen=True)
class FloatFormat:
    """``largest`` finite value, ``normal`` the smallest with all bits, ``smallest`` above 0, ``exact`` integers."""

    name: str
    tensor: int  # element type in ONNX
    type_name: str  # in ONNX's words
    dtype: type
    largest: float
    normal: float
    smallest: float
    exact: int  # all integers up to here


FORMATS = {
    "fp16": FloatFormat(
        "fp16", TensorProto.FLOAT16, "tensor(float16)", np.float16, 65504.0, 2.0**-14, 2.0**-24, 2**11
    ),
    "bf16": FloatFormat(
        "bf16", TensorProto.BFLOAT16, "tensor(bfloat16)", ml_dtypes.bfloat16,
        (2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-133, 2**8,
    ),
    "fp8": FloatFormat(
        "fp8", TensorProto.FLOAT8E4M3FN, "tensor(float8e4m3fn)", ml_dtypes.float8_e4m3fn, 448.0, 2.0**-6, 2.0**-9, 2**4
    ),
}  # fmt: skip
HALVES = ("fp16", "bf16")
