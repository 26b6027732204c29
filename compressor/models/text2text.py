"""Encoder-decoder checkpoints of transformers (T5, BART, Marian and their like) as one teacher-forced module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compressor.errors import PlanError
from compressor.models.types import LoadedModel, Provenance, TextInput
from compressor.recipe import DataConfig
from compressor.types import Task, TensorSpec

if TYPE_CHECKING:
    from torch import nn

SOURCE = ("input_ids", "attention_mask")
TARGET = ("decoder_input_ids", "decoder_attention_mask")
SEQUENCE, TARGET_SEQUENCE = "sequence", "target_sequence"  # dynamic dimensions


def text2text_model(model: Any, task: Task, preprocess: TextInput, data: DataConfig) -> LoadedModel:
    """An encoder-decoder model of transformers as a :class:`LoadedModel` without provenance and files.

    Raises:
        PlanError: the configuration does not say how a target begins or ends, or the recipe pairs texts.
    """
    from compressor.models.wrappers import EncoderDecoder

    if data.text_pair is not None:
        hint = "Give `data.target`: the column of what the model shall write."
        raise PlanError.single("data.text_pair", f"{task} reads one source text", hint=hint)
    if preprocess.names != SOURCE:
        what = f"takes {', '.join(preprocess.names)}; supported are encoders of {' and '.join(SOURCE)}"
        raise PlanError.single("teacher.model", what)
    end = preprocess.eos_id if preprocess.eos_id is not None else _token(model, "eos_token_id")
    starts = (_token(model, "decoder_start_token_id"), _token(model, "bos_token_id"))
    start = next((token for token in starts if token is not None), None)
    if start is None or end is None:
        what = "does not say with which token a target " + ("begins" if start is None else "ends")
        hint = "Set `decoder_start_token_id` and `eos_token_id` in its config.json."
        raise PlanError.single("teacher.model", what, hint=hint)
    model.config.use_cache = False  # the exported model takes whole sequences
    model.config.decoder_start_token_id, model.config.eos_token_id = start, end  # what generation reads, settled
    model.config.pad_token_id = preprocess.pad_id
    limits = [data.target_length or data.max_length, getattr(model.config, "max_position_embeddings", None)]
    length = min(limit for limit in limits if isinstance(limit, int))
    changed = {"eos_id": end, "start_id": start, "target_length": length}
    return LoadedModel(
        kind="checkpoint",
        task=task,
        module=EncoderDecoder(model).eval(),
        onnx=None,
        inputs=tuple(
            TensorSpec(name, "int64", ("batch", SEQUENCE if name in SOURCE else TARGET_SEQUENCE))
            for name in (*SOURCE, *TARGET)
        ),
        outputs=(TensorSpec("logits", "float32", ("batch", TARGET_SEQUENCE, _vocabulary(model))),),
        labels=(),
        preprocess=preprocess.model_copy(update=changed),
        provenance=Provenance("", "", None),
    )


def _token(model: Any, name: str) -> int | None:
    """The id of a special token, from config.json or generation_config.json."""
    for config in (model.config, getattr(model, "generation_config", None)):
        found = getattr(config, name, None)
        if isinstance(found, list | tuple) and found:
            found = found[0]
        if isinstance(found, int):
            return found
    return None


def _vocabulary(model: Any) -> int:
    """Rows of the output layer; a configuration may say less than a checkpoint whose vocabulary was padded."""
    head: nn.Module | None = model.get_output_embeddings()
    return int(model.config.vocab_size) if head is None else int(head.weight.shape[0])  # type: ignore[union-attr,index]
