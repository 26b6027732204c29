"""Load a PyTorch module from ``pkg.mod:factory``: the user's own code, named on the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.errors import ConfigError, PlanError
from compressor.models.entry import import_entry
from compressor.models.types import ImageInput, LoadedModel, Provenance, RawInput
from compressor.recipe import DataConfig, ImagePreprocess, TeacherConfig
from compressor.types import EMBEDDING, Array, Task, TensorSpec

if TYPE_CHECKING:
    from torch import nn

Sample = Array | Mapping[str, Array]  # one raw sample: a picture (H, W[, C]) uint8, an array, or arrays by input name


def build(factory: str) -> nn.Module:
    """Import and call the factory; it must return an ``nn.Module``, which is put into evaluation mode."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise ConfigError.single(
            f"`{factory}`", "factory", "needs torch", hint="pip install 'compress-for-device[train]'"
        ) from error

    made = import_entry(factory, "factory")
    required = [
        parameter.name
        for parameter in inspect.signature(made).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if required:
        raise ConfigError.single(
            f"`{factory}`",
            "factory",
            f"must be callable without arguments but wants {', '.join(required)}",
            hint="Give them defaults.",
        )
    return _called(made, factory, {})


FACTORY = "_made_by"  # attribute of a factory's module: what made it, so that a record can ask for another one


def parameters_of(module: nn.Module) -> tuple[str, ...] | None:
    """Keyword parameters of the factory that made ``module``; None where no factory did, ``*`` where it takes any."""
    made = getattr(module, FACTORY, None)
    if made is None:
        return None
    found = inspect.signature(made).parameters.values()
    names = [item.name for item in found if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
    return (*names, *("*" for item in found if item.kind is item.VAR_KEYWORD))


def remake(module: nn.Module, arguments: Mapping[str, Any], seed: int = 0) -> nn.Module:
    """What the factory of ``module`` makes with ``arguments``, in evaluation mode; random weights come from ``seed``.

    Raises:
        ConfigError: no factory made the module, or it fails with these arguments.
    """
    import torch

    made = getattr(module, FACTORY, None)
    if made is None:
        raise ConfigError.single("the model", "factory", "was not made by a factory (`--model pkg.mod:factory`)")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _called(made, getattr(made, "__name__", "factory"), arguments)


def _called(made: Callable[..., Any], factory: str, arguments: Mapping[str, Any]) -> nn.Module:
    from torch import nn

    try:
        module = made(**arguments)
    except Exception as error:
        raise ConfigError.single(
            f"`{factory}`", "factory", f"failed: {type(error).__name__}: {error}", hint="Mend the factory."
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError.single(
            f"`{factory}`",
            "factory",
            f"returned a {type(module).__name__}, not a torch.nn.Module",
            hint="Return the module itself.",
        )
    setattr(module, FACTORY, made)
    return module.eval()


def load_factory(
    factory: str, config: TeacherConfig, *, data: DataConfig | None = None, sample: Sample | None = None
) -> LoadedModel:
    """A module and the inputs it takes, found from ``forward``'s signature and one raw ``sample`` of the data.

    Without a sample, ``data.preprocess`` must give ``size`` and ``channels``. Raises :class:`ConfigError` when the
    factory is at fault, :class:`PlanError` when module and data do not fit together.
    """
    from compressor.models.wrappers import state_digest

    data = data or DataConfig()
    module = build(factory)
    preprocess, arrays, notes = _first_input(module, factory, data, sample)
    out = _run_once(module, arrays, factory)
    task = config.task or _task(preprocess, out.ndim)
    count = int(out.shape[-1])
    return LoadedModel(
        kind="factory",
        task=task,
        module=module,
        onnx=None,
        inputs=tuple(TensorSpec(name, array.dtype.name, ("batch", *array.shape[1:])) for name, array in arrays.items()),
        outputs=(TensorSpec(_output_name(task), "float32", ("batch", *(int(size) for size in out.shape[1:]))),),
        labels=_labels(task, data, count, factory),
        preprocess=preprocess,
        provenance=Provenance(source=factory, digest=state_digest(module), licence=config.licence, notes=tuple(notes)),
    )


def _run_once(module: nn.Module, arrays: Mapping[str, Array], factory: str) -> Any:
    """The module's output for a batch of two samples; it must be one tensor with a batch axis."""
    import torch

    try:
        with torch.inference_mode():
            out = module(**{name: torch.from_numpy(array) for name, array in arrays.items()})
    except Exception as error:
        shapes = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
        raise PlanError.single(
            "teacher",
            f"`{factory}` cannot take a sample of the data ({shapes}): {type(error).__name__}: {str(error)[:300]}",
            hint="Check `data.preprocess` (size, channels, layout) against what the module expects.",
        ) from error
    if not isinstance(out, torch.Tensor) or out.ndim < 2:
        raise ConfigError.single(
            f"`{factory}`",
            "factory",
            f"its module returns a {type(out).__name__}, not one tensor (N, ...)",
            hint="Return logits only.",
        )
    return out


def _task(preprocess: ImageInput | RawInput, rank: int) -> Task:
    return "image-classification" if isinstance(preprocess, ImageInput) and rank == 2 else "generic"


def _output_name(task: Task) -> str:
    return "embedding" if task in EMBEDDING else "output" if task == "generic" else "logits"


def _labels(task: Task, data: DataConfig, count: int, factory: str) -> tuple[str, ...]:
    if task in EMBEDDING or task in ("generic", "causal-lm"):
        return data.labels or ()
    if data.labels and len(data.labels) != count:
        raise PlanError.single("data.labels", f"names {len(data.labels)} classes but `{factory}` has {count} outputs")
    return data.labels or tuple(str(index) for index in range(count))


def _input_names(module: nn.Module, factory: str) -> list[str]:
    parameters = [
        parameter
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    names = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    names = names or [parameter.name for parameter in parameters[:1]]
    if not names:
        raise ConfigError.single(
            f"`{factory}`", "factory", "its module's forward takes no named inputs", hint="Name them."
        )
    return names


def _first_input(
    module: nn.Module, factory: str, data: DataConfig, sample: Sample | None
) -> tuple[ImageInput | RawInput, dict[str, Array], list[str]]:
    """Preprocessing, one batch of two samples by input name, and notes."""
    names = _input_names(module, factory)
    if isinstance(sample, Mapping):
        if set(sample) < set(names) or not set(sample) <= set(inspect.signature(module.forward).parameters):
            raise PlanError.single("data", f"gives inputs {', '.join(sample)} but `{factory}` takes {', '.join(names)}")
        return RawInput(), {name: np.stack([np.asarray(array)] * 2) for name, array in sample.items()}, []
    if len(names) > 1:
        raise PlanError.single(
            "data",
            f"`{factory}` takes {len(names)} inputs ({', '.join(names)})",
            hint="Let the loader return arrays by input name.",
        )
    if sample is not None and (sample.dtype != np.uint8 or sample.ndim not in (2, 3)):
        array = np.stack([sample] * 2)
        return RawInput(), {names[0]: array.astype(np.float32) if array.dtype.kind == "f" else array}, []
    settings = data.preprocess or ImagePreprocess()
    notes = [] if data.preprocess else ["no data.preprocess: pixels are scaled to 0..1 and not normalised"]
    shape = _picture_shape(settings, sample)
    if shape is None:
        raise PlanError.single(
            "data",
            f"the input shape of `{factory}` is not known",
            hint="Give data, or `data.preprocess` with `size` and `channels`.",
        )
    height, width, channels = shape
    order = (channels, height, width) if settings.layout == "NCHW" else (height, width, channels)
    return ImageInput(settings=settings), {names[0]: np.zeros((2, *order), np.float32)}, notes


def _picture_shape(settings: ImagePreprocess, sample: Array | None) -> tuple[int, int, int] | None:
    size = settings.size or (sample.shape[:2] if sample is not None else None)
    channels = settings.channels or ((sample.shape[2] if sample.ndim == 3 else 1) if sample is not None else None)
    return (int(size[0]), int(size[1]), int(channels)) if size is not None and channels is not None else None
