"""Settings of the back end (`[options]` of a profile), GPU generations, and the range of every dynamic dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from compressor.config import Frozen, problems_of
from compressor.errors import CompileError, ConfigError, Problem
from compressor.profile import HardwareProfile
from compressor.types import TensorSpec

Flavour = Literal["rtx", "enterprise"]
Size = Annotated[int, Field(ge=1)]
Range = tuple[int, int, int]  # minimum, optimum, maximum
Shapes = dict[str, list[list[int]]]  # input name -> minimum, optimum and maximum shape

# trt.ComputeCapability of TensorRT-RTX 1.7.1 (without NONE and CURRENT); a test compares it with the installed
# bindings.
RTX_CAPABILITIES = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")


class TensorRtOptions(Frozen):
    """``[options]`` of a profile whose target is ``tensorrt``."""

    flavour: Flavour = "rtx"
    workspace_mib: Size = 1024
    max_batch: Size = 32
    max_sequence: Size = 128
    shapes: dict[str, Size | tuple[Size, Size, Size]] = Field(
        default_factory=dict
    )  # dimension -> size, or minimum, optimum, maximum
    timeout_s: Annotated[float, Field(gt=0)] = 300.0
    memory_limit_mib: Annotated[float, Field(gt=0)] = 8192.0  # resident set of the build process
    precision: Literal["fp32", "fp16", "bf16", "int8"] | None = None  # what the profile hopes for; the graph decides

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> TensorRtOptions:
        for name, given in self.shapes.items():
            if isinstance(given, tuple) and not given[0] <= given[1] <= given[2]:
                raise ValueError(f"`shapes.{name}` must be minimum <= optimum <= maximum, not {list(given)}")
        return self


def read_options(profile: HardwareProfile) -> TensorRtOptions:
    """Validate ``profile.options``. Raises :class:`ConfigError` listing every problem under ``options.``."""
    try:
        return TensorRtOptions.model_validate(profile.options)
    except ValidationError as error:
        problems = [_under_options(problem) for problem in problems_of(error, TensorRtOptions)]
        raise ConfigError(f"profile `{profile.name}`", problems) from None


def _under_options(problem: Problem) -> Problem:
    return Problem("options" if problem.where == "file" else f"options.{problem.where}", problem.what)


def capability_number(profile: HardwareProfile) -> int:
    """CUDA compute capability as one number: "8.9" -> 89, "12.0" -> 120.

    Raises :class:`CompileError` when there is none.
    """
    text = profile.compute.capability
    if text is None:
        raise CompileError(
            f"profile `{profile.name}` has no `compute.capability`",
            hint='Give the GPU\'s compute capability, such as "8.9".',
        )
    major, _, minor = text.partition(".")
    if not (major.isdigit() and minor.isdigit() and len(minor) == 1):
        raise CompileError(f"`compute.capability` is `{text}`", hint='It is written as major.minor, such as "8.9".')
    return int(major) * 10 + int(minor)


def rtx_capability(profile: HardwareProfile) -> str:
    """The builder's name of the profile's GPU generation.

    Raises :class:`CompileError` for one that RTX does not know.
    """
    name = f"SM{capability_number(profile)}"
    if name not in RTX_CAPABILITIES:
        raise CompileError(
            f"TensorRT-RTX has no {name}; use flavour `enterprise` on the device",
            hint=f"TensorRT-RTX 1.7 builds for {', '.join(RTX_CAPABILITIES)}.",
        )
    return name


def nearest_rtx_capability(profile: HardwareProfile) -> str:
    """The youngest RTX generation that is not younger than the device: what a kit for another GPU is validated with."""
    number = capability_number(profile)
    older = [name for name in RTX_CAPABILITIES if int(name[2:]) <= number]
    return older[-1] if older else RTX_CAPABILITIES[0]


def dimension_ranges(options: TensorRtOptions, profile: HardwareProfile) -> dict[str, Range]:
    """Ranges of all dimensions with a known name. The optimum is what kernels are chosen for.

    ``batch``: 1, the profile's measured batch, ``max_batch``. ``sequence``: 1, half of ``max_sequence``,
    ``max_sequence`` (texts are usually much shorter than the limit), or the recipe's ``max_length`` where that is less.
    ``options.shapes`` overrides and adds.
    """
    best_batch, longest = profile.runtime.batch, profile.runtime.sequence(options.max_sequence)
    ranges: dict[str, Range] = {
        "batch": (1, best_batch, max(best_batch, options.max_batch)),
        "sequence": (1, max(1, longest // 2), longest),
    }
    for name, given in options.shapes.items():
        ranges[name] = given if isinstance(given, tuple) else (given, given, given)
    return ranges


def unnamed_dimensions(inputs: tuple[TensorSpec, ...], ranges: Mapping[str, Range]) -> tuple[str, ...]:
    """One sentence for every dynamic dimension that has no range."""
    return tuple(
        f"input `{spec.name}`: dynamic dimension `{size}` (axis {axis}) has no range; give `options.shapes.{size}`"
        for spec in inputs
        for axis, size in enumerate(spec.shape)
        if isinstance(size, str) and size not in ranges
    )


def input_shapes(inputs: tuple[TensorSpec, ...], ranges: Mapping[str, Range]) -> Shapes:
    """Minimum, optimum and maximum shape of every input; fixed dimensions are the same in all three."""
    return {
        spec.name: [
            [ranges[size][which] if isinstance(size, str) else size for size in spec.shape] for which in range(3)
        ]
        for spec in inputs
    }
