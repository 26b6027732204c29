"""Quantization-aware training that a distil stage may ask for, as data. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from compressor.config import Frozen

Precision = Literal["int8", "int6", "int5", "int4", "int3", "int2", "ternary"]
Quantizer = Literal["lsq", "minmax", "twn", "dlt"]
BITS: dict[Precision, int] = {"int8": 8, "int6": 6, "int5": 5, "int4": 4, "int3": 3, "int2": 2, "ternary": 2}


class Qat(Frozen):
    """Fake quantization while a distil stage trains: weights and activations are rounded as the target will round them.

    Scales are learnt (LSQ: Esser et al., "Learned Step Size Quantization", 2020), start from calibration data, and are
    written into the file as they are. Ternary weights: TWN (Li et al., "Ternary Weight Networks", 2016; methods Q1) or
    `dlt` (Chen et al., "TernaryLLM", 2024; methods Q2).
    """

    weights: Precision = "int8"
    quantizer: Quantizer | Literal["auto"] = "auto"  # auto: lsq, for ternary weights twn
    activations: Literal["rules", "float"] = "rules"  # as the target takes them, or not quantized at all
    group: Literal[16, 32, 64, 128, 256] | None = None  # inputs of a linear layer that share a scale; left out: all
    int8: tuple[str, ...] = ()  # module name patterns whose weights take 8 bits instead
    protect: tuple[str, ...] = ()  # module name patterns that stay float
    teacher: Literal["original", "student"] = "original"  # or the student as it enters the stage, in float
    profile: str | None = None  # whose rules are trained for; those that all profiles of the recipe share if left out
    samples: Annotated[int, Field(ge=1)] = 256  # of the calibration split, for the first ranges

    @property
    def method(self) -> Quantizer:
        """The quantizer of the weights that are not in ``int8``."""
        if self.quantizer != "auto":
            return self.quantizer
        return "twn" if self.weights == "ternary" else "lsq"

    @model_validator(mode="after")
    def _goes_together(self) -> Qat:
        if self.quantizer in ("twn", "dlt") and self.weights != "ternary":
            raise ValueError(f'`{self.quantizer}` makes ternary weights: give `weights = "ternary"`')
        if self.quantizer == "minmax" and self.weights == "ternary":
            raise ValueError('ternary weights take `quantizer = "twn"`, `"dlt"` or `"lsq"`')
        if self.quantizer == "minmax" and self.weights == "int8":
            raise ValueError("`minmax` is for fewer bits than 8: asymmetric 8-bit weights fit no target's rules")
        if self.group is not None and self.activations != "float":
            raise ValueError(
                '`group` is for `activations = "float"`: integer kernels take one scale per output channel'
            )
        return self
