"""One door for every kind of teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.errors import ConfigError, PlanError
from compressor.models.source import locate
from compressor.models.types import LoadedModel
from compressor.recipe import DataConfig, TeacherConfig
from compressor.types import TEXT2TEXT

if TYPE_CHECKING:
    from compressor.models.factory import Sample


def load_model(
    config: TeacherConfig,
    *,
    factory: str | None = None,
    data: DataConfig | None = None,
    allow_remote_code: bool = False,
    sample: Sample | None = None,
) -> LoadedModel:
    """Load a Hugging Face checkpoint (folder or hub id), an ``.onnx`` file, or ``pkg.mod:factory``.

    ``factory`` comes from the command line only. ``sample`` is one raw sample of the data
    (:attr:`compressor.data.RawData.sample`): factories need it to find the shape of their input, ONNX files to tell
    pictures from other arrays. ``data`` gives preprocessing, label names and the number of tokens.

    Raises :class:`ConfigError` when the model is missing, broken or unsafe, :class:`PlanError` when it is not
    supported.
    """
    if config.task in TEXT2TEXT and (factory is not None or str(config.model).endswith(".onnx")):
        what = f"{config.task} needs a checkpoint of transformers: nothing else says how a target begins and ends"
        raise PlanError.single("teacher.task", what)
    if factory is not None:
        from compressor.models.factory import load_factory

        return load_factory(factory, config, data=data, sample=sample)
    source = locate(config, allow_remote_code=allow_remote_code)
    assert source is not None  # None only without download
    if source.kind == "onnx":
        from compressor.models.onnx_load import load_onnx

        return load_onnx(source, config, data=data, picture=_is_picture(sample))
    try:
        from compressor.models.checkpoint import load_checkpoint

        return load_checkpoint(source, config, data=data, allow_remote_code=allow_remote_code)
    except ModuleNotFoundError as error:
        raise ConfigError.single(
            f"`{source.name}`",
            "teacher.model",
            f"checkpoints need the [train] extra ({error.name} is not installed)",
            hint="pip install 'compress-for-device[train]', or give an .onnx file.",
        ) from error


def _is_picture(sample: Sample | None) -> bool | None:
    if sample is None:
        return None
    shape = getattr(sample, "shape", None)
    return shape is not None and len(shape) in (2, 3) and str(getattr(sample, "dtype", "")) == "uint8"
