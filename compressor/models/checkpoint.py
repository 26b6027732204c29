"""Load a Hugging Face checkpoint folder through transformers and optimum.

optimum's exporter configurations (input names and dynamic axes per architecture) live in optimum-onnx, which pins
transformers < 4.58; without it ``TasksManager``'s registry of exporters is empty. What optimum itself still offers is
used: TasksManager for the task and the auto class, the normalized configs and the dummy input generators. The input
names come from the intersection of ``forward``'s signature and the tokenizer's ``model_input_names``.

Attention is loaded as ``eager``. Both ``eager`` and ``sdpa`` go through torch's dynamo exporter with dynamic batch and
sequence and agree with torch to 1e-8, but ``sdpa`` leaves IsNaN/Where pairs and extra Reshape and Slice nodes in every
layer (a BERT of 2 layers has 26 nodes more), which keep quantizers and attention fusions from matching.
"""

from __future__ import annotations

import importlib
import inspect
import io
import pickle
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from compressor.errors import ConfigError, PlanError
from compressor.models.gguf_file import GgufFacts, read_gguf
from compressor.models.preprocessing import (
    TOKENIZER_FILE,
    bare_tokenizer,
    image_input,
    labels_of,
    text_input,
)
from compressor.models.source import Source, licence_of, read_json, refuse_remote_code
from compressor.models.types import LoadedModel, Provenance, TextInput
from compressor.recipe import DataConfig, TeacherConfig
from compressor.types import EMBEDDING, TEXT2TEXT, Task, TensorSpec

if TYPE_CHECKING:
    from torch import nn

    from compressor.models.wrappers import Pooling

# optimum's task names -> ours
TASKS: Mapping[str, Task] = {
    "text-classification": "text-classification",
    "image-classification": "image-classification",
    "feature-extraction": "sentence-embedding",
    "sentence-similarity": "sentence-embedding",
    "token-classification": "token-classification",
    "text-generation": "causal-lm",
    "text2text-generation": "text2text-generation",
}
AUTO_CLASS_TASK: Mapping[Task, str] = {
    **dict.fromkeys(EMBEDDING, "feature-extraction"),
    "multi-label-text-classification": "text-classification",
    "multi-label-image-classification": "image-classification",
    "causal-lm": "text-generation",
    **dict.fromkeys(TEXT2TEXT, "text2text-generation"),
}
BY_TOKEN = frozenset({"token-classification", "causal-lm"})
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
IGNORED_WEIGHTS = ("pooler", "position_ids", "mask_token")  # not used by any task here


@dataclass(frozen=True)
class _Checkpoint:
    """A folder being loaded: what its json files, or its GGUF file, say."""

    source: Source
    config: dict[str, Any]
    task: Task
    remote_code: bool
    gguf: GgufFacts | None = None

    @property
    def file(self) -> dict[str, str]:
        """What transformers must be told to read a GGUF file."""
        return {} if self.source.gguf is None else {"gguf_file": self.source.gguf}


def load_checkpoint(
    source: Source, config: TeacherConfig, *, data: DataConfig | None = None, allow_remote_code: bool = False
) -> LoadedModel:
    """A checkpoint folder as a :class:`LoadedModel` in evaluation mode, float32.

    Raises :class:`ConfigError` for unreadable or unsafe files, :class:`PlanError` for a task that is not supported or
    weights that do not fit it.
    """
    if source.gguf is not None:
        return _load_gguf(source, source.gguf, config, data or DataConfig())
    settings = read_json(source.path / "config.json")
    refuse_remote_code(settings, source.name, allow_remote_code)
    task = config.task or find_task(settings, source)
    if task == "generic":
        raise PlanError.single("teacher.task", "`generic` is for factories and ONNX files, not for checkpoints")
    checkpoint = _Checkpoint(source, settings, task, allow_remote_code)
    model = _load_weights(checkpoint)
    if task in ("image-classification", "multi-label-image-classification"):
        return _image_model(checkpoint, model, config)
    if task in TEXT2TEXT:
        from compressor.models.text2text import text2text_model

        preprocess, tokenizer = _tokenizer(checkpoint, model, data or DataConfig())
        loaded = text2text_model(model, task, preprocess, data or DataConfig())
        provenance = _provenance(checkpoint, config, cast(Any, loaded.module), [])
        return replace(loaded, provenance=provenance, files={TOKENIZER_FILE: tokenizer})
    return _text_model(checkpoint, model, config, data or DataConfig())


def _load_gguf(source: Source, gguf: str, config: TeacherConfig, data: DataConfig) -> LoadedModel:
    """A language model from one GGUF file, its weights de-quantised to float32."""
    facts = read_gguf(source.path / gguf, source.name)
    if config.task not in (None, "causal-lm"):
        what = f"`{config.task}` does not fit `{source.name}`: a GGUF file is a causal language model"
        raise PlanError.single("teacher.task", what)
    checkpoint = _Checkpoint(source, {}, "causal-lm", False, facts)
    with redirect_stderr(io.StringIO()):  # a progress bar that has no switch
        model = _load_weights(checkpoint)
    return _text_model(checkpoint, model, config, data)


def find_task(settings: Mapping[str, Any], source: Source) -> Task:
    """The task of a checkpoint: sentence-transformers' modules.json, or optimum's table by architecture name."""
    if (source.path / "modules.json").is_file():
        return "sentence-embedding"
    names = settings.get("architectures") or []
    if not names:
        raise PlanError.single(
            "teacher.task", f"config.json of `{source.name}` names no architecture", hint="Give `teacher.task`."
        )
    import transformers
    from optimum.exporters.tasks import TasksManager

    model_class = getattr(transformers, str(names[0]), None)
    if model_class is None:
        raise PlanError.single(
            "teacher.model",
            f"`{source.name}` is a `{names[0]}`, which transformers {transformers.__version__} does not have",
            hint="Use a factory, or export it to ONNX yourself.",
        )
    try:
        found = str(TasksManager.infer_task_from_model(model_class))
    except ValueError:
        found = "unknown"
    if str(names[0]) in _encoder_decoders():
        found = "text2text-generation"  # BART can fill masks, too, and that is what optimum says of it
    if found not in TASKS:
        raise PlanError.single(
            "teacher.task",
            f"`{source.name}` is a `{names[0]}` (task {found}); supported are {', '.join(sorted(set(TASKS.values())))}",
            hint="Give `teacher.task` when it was saved under another head, or use a factory.",
        )
    return several_labels(TASKS[found], settings)


def _encoder_decoders() -> set[str]:
    """Names of transformers' classes with an encoder of text, a decoder and a language-model head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as NAMES

    return {str(name) for names in NAMES.values() for name in (names if isinstance(names, tuple) else (names,))}


def several_labels(task: Task, settings: Mapping[str, Any]) -> Task:
    """The task of a classifier whose config.json says that a sample may have several labels."""
    if settings.get("problem_type") != "multi_label_classification":
        return task
    return {  # type: ignore[return-value]
        "text-classification": "multi-label-text-classification",
        "image-classification": "multi-label-image-classification",
    }.get(task, task)


def _load_weights(checkpoint: _Checkpoint) -> Any:
    import torch
    from optimum.exporters.tasks import TasksManager
    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # only the command line prints
    source = checkpoint.source
    auto_class = TasksManager.get_model_class_for_task(AUTO_CLASS_TASK.get(checkpoint.task, checkpoint.task))
    try:
        model, report = auto_class.from_pretrained(
            source.path,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=checkpoint.remote_code,
            local_files_only=True,
            output_loading_info=True,
            **checkpoint.file,
        )
    except (pickle.UnpicklingError, EOFError) as error:
        raise ConfigError.single(
            f"`{source.name}`",
            "teacher.model",
            f"its weights are a pickle that cannot be read safely: {_first_line(error)}",
            hint="Convert it to safetensors where you trust it (`save_pretrained`).",
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, TypeError, SafetensorError) as error:
        raise ConfigError.single(
            f"`{source.name}`",
            "teacher.model",
            f"cannot be loaded: {_first_line(error)}",
            hint="Check that the folder is complete.",
        ) from error
    _refuse_new_weights(checkpoint, sorted(report["missing_keys"]))
    return model.eval()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _refuse_new_weights(checkpoint: _Checkpoint, missing: list[str]) -> None:
    """transformers fills missing weights with random numbers and only logs it; a teacher must not have any."""
    unknown = [name for name in missing if not any(part in name for part in IGNORED_WEIGHTS)]
    if unknown:
        raise PlanError.single(
            "teacher.model",
            f"`{checkpoint.source.name}` has no weights for {', '.join(unknown[:4])} ({len(unknown)} in all)",
            hint=f"It was not trained for {checkpoint.task}; fine-tune it first or change `teacher.task`.",
        )


def _provenance(checkpoint: _Checkpoint, config: TeacherConfig, module: nn.Module, notes: list[str]) -> Provenance:
    from compressor.models.wrappers import state_digest

    facts = checkpoint.gguf
    found = facts.licence if facts is not None else licence_of(checkpoint.source.path)
    return Provenance(
        source=checkpoint.source.name,
        digest=state_digest(module),
        licence=config.licence or found,
        revision=checkpoint.source.revision or config.revision,
        notes=(*notes, *(facts.notes if facts is not None else ())),
    )


def _image_model(checkpoint: _Checkpoint, model: Any, config: TeacherConfig) -> LoadedModel:
    from compressor.models.wrappers import ImageModel

    module = ImageModel(model).eval()
    dummy = _dummy_inputs(model, ("pixel_values",), "image-classification")
    _, channels, height, width = dummy["pixel_values"].shape
    processor = read_json(checkpoint.source.path / "preprocessor_config.json")
    preprocess, notes = image_input(processor, size=(height, width), channels=channels if channels in (1, 3) else None)
    if not processor:
        notes.append("no preprocessor_config.json: pixels are scaled to 0..1 and not normalised")
    size = preprocess.settings.size or (height, width)
    return LoadedModel(
        kind="checkpoint",
        task=checkpoint.task,
        module=module,
        onnx=None,
        inputs=(TensorSpec("pixel_values", "float32", ("batch", channels, *size)),),
        outputs=(_output(module, dummy, "logits"),),
        labels=labels_of(model.config.to_dict()),
        preprocess=preprocess,
        provenance=_provenance(checkpoint, config, module, notes),
    )


def _text_model(checkpoint: _Checkpoint, model: Any, config: TeacherConfig, data: DataConfig) -> LoadedModel:
    from compressor.models.wrappers import TextModel

    notes: list[str] = []
    pooling = None
    if checkpoint.task in EMBEDDING:
        pooling, notes = _pooling(checkpoint)
        if "add_pooling_layer" in inspect.signature(type(model).__init__).parameters:
            model.pooler = None  # never read when tokens are pooled, so it must not be counted, pruned or exported
    if checkpoint.task == "causal-lm":
        model.config.use_cache = False  # the exported model takes whole sequences
    module = TextModel(model, pooling).eval()
    preprocess, tokenizer = _tokenizer(checkpoint, model, data)
    dummy = _dummy_inputs(model, preprocess.names, AUTO_CLASS_TASK.get(checkpoint.task, checkpoint.task))
    by_token = checkpoint.task in BY_TOKEN
    return LoadedModel(
        kind="checkpoint",
        task=checkpoint.task,
        module=module,
        onnx=None,
        inputs=tuple(TensorSpec(name, "int64", ("batch", "sequence")) for name in preprocess.names),
        outputs=(_output(module, dummy, "embedding" if pooling else "logits", by_token=by_token),),
        labels=() if pooling or checkpoint.task == "causal-lm" else labels_of(model.config.to_dict()),
        preprocess=preprocess,
        provenance=_provenance(checkpoint, config, module, notes),
        files={TOKENIZER_FILE: tokenizer},
    )


def _pooling(checkpoint: _Checkpoint) -> tuple[Pooling, list[str]]:
    """The pooling of a sentence-transformers folder; mean and L2 normalisation for a bare encoder."""
    from compressor.models.wrappers import Pooling

    folder = checkpoint.source.path
    listed = read_json(folder / "modules.json").get("_", [])
    kinds = [str(part.get("type", "")).rsplit(".", 1)[-1] for part in listed]
    strange = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    if strange:
        raise PlanError.single(
            "teacher.model", f"`{checkpoint.source.name}` has a {strange[0]} module, which is not supported"
        )
    notes = (
        [] if "Normalize" in kinds else ["the checkpoint does not normalise its embeddings; here they have unit length"]
    )
    part = next((part for part, kind in zip(listed, kinds, strict=True) if kind == "Pooling"), None)
    if part is None:
        return Pooling("mean"), [*notes, "no pooling is stated: mean over the tokens"]
    settings = read_json(folder / str(part["path"]) / "config.json")
    modes = [
        key.removeprefix("pooling_mode_")
        for key, value in settings.items()
        if key.startswith("pooling_mode_") and value is True
    ]
    if isinstance(settings.get("pooling_mode"), str):
        modes = [settings["pooling_mode"]]
    if modes in (["mean_tokens"], ["mean"]):
        return Pooling("mean"), notes
    if modes in (["cls_token"], ["cls"]):
        return Pooling("cls"), notes
    raise PlanError.single(
        "teacher.model", f"pooling by {' and '.join(modes) or 'nothing'} is not supported; mean and cls are"
    )


def _tokenizer(checkpoint: _Checkpoint, model: Any, data: DataConfig) -> tuple[TextInput, bytes]:
    from transformers import AutoTokenizer

    folder = checkpoint.source.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=checkpoint.remote_code, **checkpoint.file
        )
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ConfigError.single(
            f"`{checkpoint.source.name}`", "tokenizer", f"cannot be loaded: {_first_line(error)}"
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = _tokenizer_text(checkpoint, backend)
    accepted = inspect.signature(model.forward).parameters
    produced = {*tokenizer.model_input_names, "attention_mask"}
    names = tuple(name for name in TEXT_INPUTS if name in accepted and name in produced)
    sentence = read_json(folder / "sentence_bert_config.json")
    preprocess = text_input(
        names,
        wanted=data.max_length,
        limits=[
            tokenizer.model_max_length,
            getattr(model.config, "max_position_embeddings", None),
            sentence.get("max_seq_length"),
        ],
        pad_id=tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else getattr(model.config, "pad_token_id", 0),
    )
    if checkpoint.task == "causal-lm" or checkpoint.task in TEXT2TEXT:
        preprocess = preprocess.model_copy(update={"eos_id": tokenizer.eos_token_id})
    elif checkpoint.task not in EMBEDDING and data.text_pair is not None:
        preprocess = preprocess.model_copy(update={"pair": True})
    if getattr(tokenizer, "mask_token_id", None) is not None:
        preprocess = preprocess.model_copy(update={"mask_id": tokenizer.mask_token_id})
    return preprocess, bare_tokenizer(text, f"`{checkpoint.source.name}`")


def _tokenizer_text(checkpoint: _Checkpoint, backend: Any) -> str:
    """The text of tokenizer.json: the file itself where there is one, as the teacher was trained with it."""
    file = checkpoint.source.path / TOKENIZER_FILE
    if file.is_file() and checkpoint.gguf is None:
        return file.read_text(encoding="utf-8")
    if backend is not None:
        return str(backend.to_str())
    what = f"`{checkpoint.source.name}` has only a slow tokenizer"
    raise PlanError.single("teacher.model", what, hint="Save a fast one (tokenizer.json).")


def _dummy_inputs(model: Any, names: tuple[str, ...], task: str) -> dict[str, Any]:
    """Random inputs (batch 2) by optimum's generators, sized by its normalized config of the architecture."""
    from optimum.utils import DummyTextInputGenerator, DummyVisionInputGenerator, NormalizedConfigManager
    from optimum.utils.normalized_config import NormalizedTextConfig, NormalizedVisionConfig

    vision = names == ("pixel_values",)
    try:
        normalized = NormalizedConfigManager.get_normalized_config_class(model.config.model_type)
    except KeyError:  # optimum lists some 70 architectures; most others use the usual attribute names
        normalized = NormalizedVisionConfig if vision else NormalizedTextConfig
    generator = DummyVisionInputGenerator if vision else DummyTextInputGenerator
    made = generator(task, normalized(model.config), batch_size=2, sequence_length=8)
    return {name: made.generate(name) for name in names}


def _output(module: nn.Module, dummy: Mapping[str, Any], name: str, *, by_token: bool = False) -> TensorSpec:
    torch = cast(Any, importlib.import_module("torch"))
    with torch.inference_mode():
        out = module(**dummy)
    rest: tuple[int | str, ...] = ("sequence", *out.shape[2:]) if by_token else tuple(out.shape[1:])
    return TensorSpec(name, "float32", ("batch", *rest))
