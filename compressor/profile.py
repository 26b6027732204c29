"""Hardware profiles: what a device is, which target compiles for it, and what pruning and quantization must respect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from compressor.config import Frozen, read_toml, suggestion, validate
from compressor.errors import ConfigError
from compressor.masks import Pattern

Positive = Annotated[float, Field(gt=0)]
Platform = Literal["python", "cpp", "android", "ios", "web", "micro"]


class Source(Frozen):
    """Where figures of the profile come from: a datasheet, a manual page, or a command that was run."""

    figures: tuple[str, ...]  # keys of this profile, such as "memory.ram_mib"
    title: str
    url: str | None = None
    command: str | None = None


class Compute(Frozen):
    """The processor that runs the model."""

    processor: str
    architecture: Literal["x86_64", "aarch64", "armv7", "cuda", "none"]
    cores: Annotated[int, Field(ge=1)] | None = None
    clock_ghz: Positive | None = None
    features: tuple[str, ...] = ()  # instruction sets: avx2, avx512_vnni, asimddp ...
    capability: str | None = None  # CUDA compute capability, "8.9"


class Memory(Frozen):
    """Main memory of the device."""

    ram_mib: Positive | None = None
    bandwidth_gbs: Positive | None = None


class Runtime(Frozen):
    """How the runtime is set up on the device."""

    threads: Annotated[int, Field(ge=1)] = 1
    graph_level: Literal["disabled", "basic", "extended", "all"] = "all"
    arena: bool = True
    batch: Annotated[int, Field(ge=1)] = 1  # the batch that latency is measured at
    max_sequence: Annotated[int, Field(ge=1)] | None = None  # longest text, in tokens; a run takes it from the recipe

    def sequence(self, limit: int) -> int:
        """Length of a file with fixed shapes: ``limit``, or shorter where no text is longer."""
        return min(limit, self.max_sequence or limit)


class QuantizationRules(Frozen):
    """What the target's int8 takes and what is fast on it; the quantizer emits only this, and a lint holds every file
    against it before the compiler sees it."""

    int8: bool = True
    activation: Literal["uint8", "int8", "uint16", "int16"] = "uint8"
    symmetric_activation: bool = False  # zero points of 0 only (TensorRT)
    weight: Literal["int8", "uint8"] = "int8"
    per_channel: bool = True  # may weights have a scale per output channel?
    quantize_bias: bool = True  # TensorRT refuses int32 bias pairs
    weighted_only: bool = False  # quantize only Conv, Gemm, MatMul (TensorRT placement)
    whole_graph: bool = False  # quantize transformers whole too: float beside int8 falls off the accelerator (QNN)
    integer_only: bool = False  # the same, and no kernel mixes int8 weights with float at all (TFLite on small devices)
    dynamic: bool = True
    saturates: bool = False  # sums of two products saturate in 16 bits (x86 without VNNI); found from the features
    reduce_range: bool = False  # seven-bit weights, so that nothing saturates; true where `saturates` is, if left out
    by_target: bool = False  # does the target's compiler quantize a float file itself, too?
    opset: Annotated[int, Field(ge=13)] | None = None  # the smallest opset that the compiler maps whole

    @property
    def whole(self) -> bool:
        """Are transformers quantized as a whole?"""
        return self.whole_graph or self.integer_only


STRICT = ("symmetric_activation", "quantize_bias", "weighted_only", "saturates", "reduce_range")


class Constraints(Frozen):
    """What surgeries must respect."""

    channel_multiple: Annotated[int, Field(ge=1)] = 1
    # int4: of weights in a file, unpacked when it is loaded (under a size budget)
    precisions: tuple[Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4"], ...] = ("fp32", "int8")
    static_shapes: bool = False


class SparsityRules(Frozen):
    """Which zeros make a model faster on the target as this tool builds for it."""

    faster: tuple[Pattern, ...] = ()  # patterns that its kernels, or its weight decoder, skip
    why: str = ""  # one sentence: where the gain comes from, or why there is none


class PackageRules(Frozen):
    """What a package for this device holds beside the model and ``infer.py``: sample programs (docs/package.md)."""

    platforms: tuple[Platform, ...] = ()


class HardwareProfile(Frozen):
    """A device: data with a source for every figure."""

    name: str
    title: str
    target: str  # a registered back end: onnxruntime-cpu, tensorrt, ...
    here: Literal["this-machine", "elsewhere"] = "elsewhere"  # is the device this very machine?
    compute: Compute
    memory: Memory = Memory()
    runtime: Runtime = Runtime()
    constraints: Constraints = Constraints()
    quantization: QuantizationRules = QuantizationRules()
    sparsity: SparsityRules = SparsityRules()
    package: PackageRules = PackageRules()
    options: dict[str, Any] = {}  # the back end's own settings, checked by the back end
    sources: tuple[Source, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _without_vnni(cls, data: Any) -> Any:
        """x86 that is known to lack int8 dot products: seven-bit weights unless the profile says otherwise."""
        from compressor.machine import INT8_DOT_X86

        compute = data.get("compute") if isinstance(data, dict) else None
        if not isinstance(compute, dict) or compute.get("architecture") != "x86_64":
            return data
        features, rules = compute.get("features") or (), data.get("quantization", {})
        if not features or INT8_DOT_X86 & set(features) or not isinstance(rules, dict):
            return data
        return {**data, "quantization": {"saturates": True, "reduce_range": True, **rules}}


def joint_rules(profiles: Sequence[HardwareProfile]) -> QuantizationRules:
    """The strictest rules of all profiles: what is rounded by them has a form in which each of their targets takes it.

    Signed and unsigned codes are the same grid, so the first profile's are named. Raises ``ValueError`` where some
    targets take activations of 8 bits and others of 16.
    """
    rules = [profile.quantization for profile in profiles] or [QuantizationRules()]
    if len({item.activation.endswith("16") for item in rules}) > 1:
        raise ValueError("some of the profiles take 8-bit activations, others 16-bit ones")
    strict = {name: any(getattr(item, name) for item in rules) for name in STRICT}
    loose = {name: all(getattr(item, name) for item in rules) for name in ("int8", "per_channel", "dynamic")}
    return rules[0].model_copy(update=strict | loose)


def profile_folders() -> tuple[Path, ...]:
    """Where named profiles lie: beside an installed package, or in a checkout."""
    package = Path(__file__).parent
    return tuple(folder for folder in (package / "_profiles", package.parent / "profiles") if folder.is_dir())


def profile_names() -> tuple[str, ...]:
    """Names of the built-in profiles."""
    return tuple(sorted({path.stem for folder in profile_folders() for path in folder.glob("*.toml")}))


def expanded(names: Iterable[str]) -> tuple[str, ...]:
    """``all`` stands for every built-in profile, this machine's first: widths are chosen by the first one's costs."""
    every = sorted(profile_names(), key=lambda name: (name != "this-machine", name))
    found = (each for name in names for each in (every if name == "all" else (name,)))
    return tuple(dict.fromkeys(found))


def load_profile(name: str) -> HardwareProfile:
    """A built-in profile by name, or any profile by the path of its TOML file.

    ``this-machine`` is completed by what :func:`compressor.machine.detect` finds.
    """
    path = Path(name)
    if path.suffix != ".toml":
        found = [folder / f"{name}.toml" for folder in profile_folders() if (folder / f"{name}.toml").is_file()]
        if not found:
            raise ConfigError.single(
                f"profile `{name}`",
                "name",
                "unknown profile" + suggestion(name, profile_names()),
                hint="`compress-for-device profiles list` shows all; a path to your own .toml works too.",
            )
        path = found[0]
    data = read_toml(path)
    if data.get("here") == "this-machine":
        from compressor.machine import complete

        data = complete(data)
    return validate(HardwareProfile, data, f"`{path}`")
