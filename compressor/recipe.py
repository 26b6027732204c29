"""The recipe: what to compress, with which data, by which stages, and what loss is acceptable.

Data only: no Python path, import or expression ever stands in a recipe. ``docs/recipe.md`` is generated from here.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from compressor.config import Frozen, read_toml, validate
from compressor.language import LoRA, Rollouts, Sequences
from compressor.masks import CoFi, Masks, Pattern, SparseUpdate, Sparsity, Zeros, given_zeros
from compressor.qat import Qat
from compressor.schedule import LabelWeight, Option, Weight
from compressor.search import Argument, Search, SuperNet
from compressor.strategy import Negatives, Strategy
from compressor.types import Task

Ratio = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


class TeacherView(Frozen):
    """What a teacher sees, and what is known of it. Shared by the main teacher and by further ones."""

    weight: Positive = 1.0  # among several teachers; only the ratio counts
    view: Literal["same", "clean"] = "same"  # clean: without the student's augmentation
    max_length: Annotated[int, Field(ge=8)] | None = None  # tokens it sees; the data's when left out
    size: tuple[int, int] | None = None  # height, width of the pictures it sees; the student's when left out
    label_smoothing: Ratio | None = None  # it was trained with; warns when a temperature above 1 would meet it
    trained_on: tuple[str, ...] = ()  # sources of its own training data; compared with test, never trained on here


class MoreTeacher(TeacherView):
    """A further teacher. The student never starts from it; it only gives signals.

    Its logits join the combined ``logits``; its own signals are ``name:logits``, ``name:hidden[i]`` ... A Python
    factory is given on the command line as ``--teacher NAME=pkg.mod:factory``; an ``.onnx`` file gives logits only.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
    model: str | None = None
    revision: str | None = None
    licence: str | None = None
    signals: dict[str, str] = {}  # as for the main teacher


class TeacherConfig(TeacherView):
    """Where the trained model is.

    ``model`` is a Hugging Face checkpoint folder, a hub id, a ``.gguf`` file, or an ``.onnx`` file. It is left out when
    the model is a Python factory, given on the command line as ``--model pkg.mod:factory``.
    """

    model: str | None = None
    revision: str | None = None  # hub ids only; pinned in the manifest
    task: Task | None = None  # found from the checkpoint when left out
    licence: str | None = None  # found from the model card when left out
    trust_remote_code: Literal[False] = False  # refused in files; `--trust-remote-code` allows it for one run
    signals: dict[str, str] = {}  # "hidden[0]" = "stage1": module paths of named signals, for factories
    more: tuple[MoreTeacher, ...] = ()  # further teachers, `[[teacher.more]]`
    weights: Literal["fixed", "learned", "confidence", "agreement"] = "fixed"  # how several teachers are weighed
    drop: Ratio = 0.0  # probability that a teacher is left out for a sample, the one farthest from the student never

    @field_validator("more")
    @classmethod
    def _names(cls, value: tuple[MoreTeacher, ...]) -> tuple[MoreTeacher, ...]:
        names = ["main", *(item.name for item in value)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the name `{twice[0]}` is given twice (`main` is the first teacher)")
        return value


class ImagePreprocess(Frozen):
    """uint8 pixels to float32: ``(pixel * scale - mean) / std``, per channel, after resizing."""

    size: tuple[int, int] | None = None  # height, width; left out keeps the picture's own size
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1 / 255
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal[1, 3] | None = None


class DataConfig(Frozen):
    """Labelled data and how it is cut. Sizes are counts (>= 1) or fractions (< 1) of the train part."""

    source: str | None = None  # folder (IDX, image folders), file (csv, json, parquet, npz) or hub id
    test: str | None = None  # a second source, or the name of a split of the first
    subset: str | None = None  # configuration name of a hub data set
    text: str | None = None  # column names
    text_pair: str | None = None
    image: str | None = None
    label: str | None = None
    target: str | None = None  # encoder-decoder models: the column of what they shall write
    score: str | None = None  # column of offline scores of pairs of texts: what a teacher (or a person) says of them
    domain: str | None = None  # column of each sample's domain, for the strategy `mix`
    labels: tuple[str, ...] | None = None  # class names in order of the teacher's outputs
    validation: Positive = 0.1
    calibration: Positive = 0.02
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2  # used when there is no test source
    transfer: str | None = None  # unlabelled extra data that only the distillation sees
    max_length: Annotated[int, Field(ge=8)] = 128  # tokens; compiled files with fixed shapes are no longer
    fixed_length: Annotated[int, Field(ge=8)] | None = None  # length of those, where less than `max_length` will do
    target_length: Annotated[int, Field(ge=2)] | None = None  # tokens of a target at most; `max_length` when left out
    limit: Annotated[int, Field(ge=1)] | None = None  # keep the first N train samples (for trials)
    simulated: Annotated[int, Field(ge=1)] | None = None  # simulators choose by the first N samples of validation
    simulated_test: Annotated[int, Field(ge=1)] | None = None  # and are tested on the first N of test; all if left out
    duplicates: Literal["refuse", "drop"] = "refuse"  # train samples that also stand in test
    near_duplicates: Literal["report", "drop", "refuse", "off"] = "report"  # train samples almost equal to a test one
    fresh: str | None = None  # a second labelled test source, collected anew or paraphrased: the canary
    preprocess: ImagePreprocess | None = None  # images of factories and ONNX files; checkpoints bring their own


class AcceptConfig(Frozen):
    """The promise. A profile that misses it, on validation or on test, makes the command end with exit code 3."""

    max_drop: float | None = 0.01  # of the task metric, absolute (0.01 = one point), against the teacher
    max_latency_ms: Positive | None = None  # p50 at batch 1
    max_size_mib: Positive | None = None  # of the file; `quantize` plans for it (docs/quantize.md)
    min_speedup: Positive | None = None  # p50 of the teacher's fp32 export / p50 of what ships

    @field_validator("max_drop", mode="before")
    @classmethod
    def _percent(cls, value: Any) -> Any:
        return parse_drop(value)


def parse_drop(value: Any) -> Any:
    """``"1%"`` and ``0.01`` both mean one point of accuracy."""
    if isinstance(value, str):
        text = value.strip()
        try:
            number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            raise ValueError(f"`{value}` is neither a number nor a percentage such as `1%`") from None
        value = number
    if isinstance(value, int | float) and not 0 <= value < 1:
        raise ValueError("must be at least 0 and less than 1 (`0.01` or `1%` is one point of accuracy)")
    return value


class Match(Frozen):
    """Which student signal learns from which teacher signal. ``g`` is the layer map."""

    student: str = "hidden[i]"
    teacher: str = "hidden[g(i)]"
    map: Literal["uniform", "last", "skip"] = "uniform"
    proj: Literal["none", "linear"] = "linear"


class ObjectiveConfig(Frozen):
    """One loss term: ``use`` names a registered objective, ``options`` are its own parameters."""

    use: str
    weight: Weight = 1.0  # a number, or a schedule
    match: Match | None = None
    options: dict[str, Option] = {}  # of the objective; numbers may be schedules


class TokenDrop(Frozen):
    """After a block only so many tokens go on, the highest-scored ones."""

    after: Annotated[int, Field(ge=0)]  # number of the block, from 0
    keep: Annotated[int, Field(ge=1)]  # tokens that stay, the first one (CLS) among them; all of a shorter text


class StudentStage(Frozen):
    """Make the student from the teacher: keep some layers, or build it narrower (factories with a width argument)."""

    kind: Literal["student"]
    keep_layers: tuple[int, ...] | int | None = None  # indices, or how many (spread evenly)
    decoder_layers: tuple[int, ...] | int | None = None  # of encoder-decoder models; `keep_layers` is the encoder's
    hidden_size: Annotated[int, Field(ge=8)] | None = None  # transformers: narrower, weights sliced by importance
    heads: Annotated[int, Field(ge=1)] | None = None  # of each attention at most, the most important
    neurons: Annotated[int, Field(ge=1)] | None = None  # of each feed-forward layer at most, the most important
    width: Annotated[float, Field(gt=0, le=1)] | None = None  # CNN factories: all widths times this, new weights
    factory: dict[str, Argument] = {}  # instead of the teacher's layers: what its factory makes with these arguments
    search: Search | None = None  # choose the keys above from a space
    vocabulary: Literal["corpus"] | None = None  # texts: only the tokens of train, validation, calibration, transfer
    keep_tokens: Annotated[int, Field(ge=1)] | None = None  # of these at most so many, the most frequent
    extra_corpus: str | None = None  # a text file whose tokens stay too, a text a line
    tokenizer: str | None = None  # texts: another one, a checkpoint folder (or, without `omp`, a tokenizer.json)
    transplant: Literal["omp", "mixed", "pieces", "mean", "zero"] = (
        "omp"  # how tokens that only it has get their embedding
    )
    mixed_steps: Annotated[int, Field(ge=1)] = 200  # mixed: steps of 8 texts in which the new rows learn in the teacher
    mixed_share: Annotated[float, Field(ge=0, le=1)] = 0.5  # mixed: of the words that the new tokenizer cuts
    atoms: Annotated[int, Field(ge=1)] = 64  # omp: shared tokens that a new one is combined of, at most
    rank: Annotated[float, Field(gt=0, lt=1)] | None = (
        None  # low rank: share of a layer's multiply-accumulates that stay
    )
    rank_energy: Annotated[float, Field(gt=0, lt=1)] | None = (
        None  # or: share of the squared singular values that stays
    )
    ranks: dict[str, Annotated[int, Field(ge=1)]] = {}  # module name pattern -> rank; before `rank` and `rank_energy`
    rank_inputs: bool = False  # weigh by what the layers read on calibration data, instead of by the weights alone
    drop_tokens: tuple[TokenDrop, ...] = ()  # transformers with one output a sample: `[{ after = 2, keep = 64 }, ...]`
    token_score: Literal["attention", "norm"] | None = (
        None  # what tokens are kept by; attention of CLS where it is known
    )

    @property
    def drops_only(self) -> bool:
        """Does the stage drop tokens and do nothing else?"""
        return bool(self.drop_tokens) and self.changed <= {"kind", "drop_tokens", "token_score"}

    @model_validator(mode="after")
    def _chosen_or_given(self) -> StudentStage:
        axes = self.search.space.axes if self.search is not None else {}
        given = self.factory.keys() | {key for key in axes if getattr(self, key, None) is not None}
        twice = [key for key in axes if key.removeprefix("factory.") in given]
        if twice:
            raise ValueError(f"`{twice[0]}` is given and searched for: leave one of them out")
        return self

    @model_validator(mode="after")
    def _drops_in_order(self) -> StudentStage:
        pairs = list(pairwise(self.drop_tokens))
        if any(a.after >= b.after or a.keep <= b.keep for a, b in pairs):
            raise ValueError("`drop_tokens`: later blocks must keep fewer tokens; give them in order")
        if self.token_score is not None and not self.drop_tokens:
            raise ValueError("`token_score` needs `drop_tokens`")
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> StudentStage:
        if self.vocabulary is None and (self.keep_tokens is not None or self.extra_corpus is not None):
            raise ValueError('`keep_tokens` and `extra_corpus` need `vocabulary = "corpus"`')
        if self.tokenizer is None and {"transplant", "atoms", "mixed_steps", "mixed_share"} & self.changed:
            raise ValueError("`transplant`, `atoms` and `mixed_...` need `tokenizer`")
        if self.tokenizer is not None and self.vocabulary is not None:
            raise ValueError("`tokenizer` and `vocabulary` do not go together")
        if self.rank is not None and self.rank_energy is not None:
            raise ValueError("give `rank` or `rank_energy`, not both")
        if self.rank_inputs and self.rank is None and self.rank_energy is None and not self.ranks:
            raise ValueError("`rank_inputs` needs `rank`, `rank_energy` or `ranks`")
        return self


class PruneStage(Frozen):
    """Cut channels, heads, neurons or layers away for good, or make weights zero. Ratios are fractions removed."""

    kind: Literal["prune"]
    ratio: Ratio | None = None  # of every kind of unit that is not named below
    channels: Ratio | None = None
    heads: Ratio | None = None
    neurons: Ratio | None = None
    experts: Ratio | None = None  # of a mixture of experts, least used first; `ratio` does not touch them
    layers: Annotated[int, Field(ge=0)] = 0  # how many blocks to drop, least important first
    importance: Literal["magnitude", "activation", "activation-weight", "taylor", "relevance", "random"] = "activation"
    scope: Literal["uniform", "global", "latency", "sensitivity"] = "uniform"
    target_speedup: Annotated[float, Field(gt=1)] | None = None  # latency, sensitivity: of the layers with weights
    cost: Literal["auto", "macs"] = "auto"  # auto: latency where the first profile is this machine
    rounds: Annotated[int, Field(ge=1)] = 1  # cut in so many steps, with a part of the next distil stage after each
    round_to: Annotated[int, Field(ge=1)] | None = None  # channel multiple; the profile's when left out
    protect: tuple[str, ...] = ()  # module name patterns (fnmatch) that are never cut
    sparsity: Sparsity | None = None  # share of every layer's weights that becomes zero; nothing is cut then
    pattern: Pattern | None = None  # of the zeros: `unstructured` (when left out), `2:4` or another N:M, `block`
    block: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (1, 4)  # outputs x inputs

    @property
    def zeros(self) -> Zeros | None:
        """The zeros that the stage asks for instead of a cut."""
        return given_zeros(self.sparsity, self.pattern, self.block, "global" if self.scope == "global" else "uniform")

    @model_validator(mode="after")
    def _asks_for_something(self) -> PruneStage:
        if self.zeros is not None:
            other = set(self.model_fields_set) - {"kind", "sparsity", "pattern", "block", "scope", "protect"}
            if other - {"importance"} or self.scope not in ("uniform", "global"):
                raise ValueError("`sparsity` and `pattern` make zeros and cut nothing: give the cut a stage of its own")
            if "importance" in other and self.importance != "magnitude":
                raise ValueError('zeros are chosen by `importance = "magnitude"`')
            return self
        if (self.scope in ("latency", "sensitivity")) != (self.target_speedup is not None):
            raise ValueError('`scope = "latency"` or `"sensitivity"` and `target_speedup` need each other')
        wishes = (self.ratio, self.channels, self.heads, self.neurons, self.experts, self.layers, self.target_speedup)
        if not any(wishes):
            raise ValueError("nothing to prune: give `ratio`, `channels`, `heads`, `neurons`, `experts` or `layers`")
        return self


class DistilStage(Frozen):
    """Train the student on labels and on the teacher."""

    kind: Literal["distil"]
    epochs: Annotated[int, Field(ge=1)] = 3
    batch: Annotated[int, Field(ge=1)] = 64
    learning_rate: Positive = 1e-3
    optimiser: Literal["adamw", "sgd"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup: Ratio = 0.1
    schedule: Literal["cosine", "linear", "constant", "one-cycle"] = "cosine"
    clip: Positive | None = 1.0
    labels: LabelWeight = 0.5  # weight of cross-entropy with the labels: a number, a schedule, or `"estimate"`
    rounds: Annotated[int, Field(ge=1)] = 1  # self-distillation: each further round learns from the one before
    objective: tuple[ObjectiveConfig, ...] = (ObjectiveConfig(use="kd", weight=0.5, options={"temperature": 2.0}),)
    augment: tuple[Literal["flip", "shift", "erase", "token-drop", "mask"], ...] = ()
    views: Annotated[int, Field(ge=1)] = 1  # fixed augmented views a sample; the teacher is cached per view
    cache: Literal["auto", "on", "off"] = "auto"
    cache_logits: Annotated[int, Field(ge=1)] | None = None  # keep the teacher's k largest logits; all when left out
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    patience: Annotated[int, Field(ge=1)] | None = None  # epochs without a better validation score
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    freeze: tuple[str, ...] = ()  # parameter name patterns
    unfreeze: tuple[str, ...] = ()  # name patterns that wait; the first trains at once, the others join one by one
    unfreeze_by: Ratio = 0.5  # fraction of the run after which all of `unfreeze` train
    accumulate: Annotated[int, Field(ge=1)] = 1  # pieces in which a batch is computed, to save memory
    checkpoint_activations: bool = False  # compute activations twice instead of keeping them
    data: Literal["all", "train", "transfer"] = "all"  # which samples the stage sees
    strategy: tuple[Strategy, ...] = ()  # data strategies, in order
    negatives: Negatives | None = None  # retrieval: wrong passages in a batch; those of the data when left out
    rollouts: Rollouts | None = None  # language and encoder-decoder models: the student writes, the teacher judges
    sequences: Sequences | None = None  # language and encoder-decoder models: learn from text that the teacher wrote
    lora: LoRA | None = None  # train low-rank additions to the weights only
    masks: Masks | None = None  # zeros that grow while it trains
    cofi: CoFi | None = None  # masks that learn which units go
    supernet: SuperNet | None = None  # train all sub-nets of a space at once, keep the best
    sparse_update: SparseUpdate | None = None  # only a share of the weights changes
    qat: Qat | None = None  # round weights and activations as the target will, and learn the ranges

    @model_validator(mode="after")
    def _one_kind_of_masks(self) -> DistilStage:
        kinds = ("masks", "cofi", "supernet", "sparse_update", "lora", "qat")
        given = [name for name in kinds if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"`{given[0]}` and `{given[1]}` do not go together: give each a stage of its own")
        if self.cofi is not None and self.patience is not None:
            raise ValueError("`cofi` settles its masks at the end of the stage: leave `patience` out")
        if self.qat is not None and self.rounds > 1:
            raise ValueError("`qat` and `rounds` do not go together: give each a stage of its own")
        if self.qat is not None and self.precision == "bf16":
            raise ValueError("`qat` rounds in float32: leave `precision` out")
        if self.supernet is not None and self.patience is not None:
            raise ValueError("`supernet` chooses its sub-net at the end of the stage: leave `patience` out")
        return self


Correction = Literal["equalise", "smooth", "bias"]
WeightMethod = Literal["auto", "rtn", "scale-estimation", "gptq", "awq", "awq-gptq"]


class QuantizeStage(Frozen):
    """Post-training quantization: every variant that fits the target becomes a candidate of the never-worse gate."""

    kind: Literal["quantize"]
    engines: tuple[Literal["onnxruntime", "nncf"], ...] = ("onnxruntime", "nncf")
    schemes: tuple[Literal["static-per-channel", "static-per-tensor", "dynamic"], ...] | Literal["auto"] = "auto"
    calibration: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "minmax"  # auto: the best on the data
    corrections: tuple[Correction, ...] | Literal["auto"] = "auto"  # auto: those that help on the calibration data
    samples: Annotated[int, Field(ge=1)] = 256  # of the calibration split, balanced over classes
    restore: Literal["auto", "never"] = "auto"  # put layers back to float when no int8 file keeps `max_drop`
    trials: Annotated[int, Field(ge=1)] = 16  # files that may be made and scored on validation for that
    weights: tuple[Literal["int8", "int4"], ...] = ()  # also weight-only files of MatMul (ONNX Runtime's MatMulNBits)
    group: Literal[16, 32, 64, 128, 256] = 32  # input rows that share a scale in them
    floats: tuple[Literal["fp16", "bf16", "fp8"], ...] | Literal["auto"] = "auto"  # auto: those the profile takes
    weight_method: WeightMethod = "auto"  # rtn needs no data; auto: int8 by rtn, int4 by gptq (docs/quantize.md)


Stage = Annotated[StudentStage | PruneStage | DistilStage | QuantizeStage, Field(discriminator="kind")]


class Recipe(Frozen):
    """A whole run as data."""

    name: str = "run"
    seed: Annotated[int, Field(ge=0)] = 0  # of split, order, dropout; `run --seeds N` trains with the next ones too
    teacher: TeacherConfig = TeacherConfig()
    data: DataConfig = DataConfig()
    accept: AcceptConfig = AcceptConfig()
    profiles: tuple[str, ...] = ("this-machine",)
    null_twin: bool = True  # the same student trained with labels only; the report shows both
    stage: tuple[Stage, ...] = ()

    def student_with(self, key: str) -> tuple[str, StudentStage] | None:
        """The student stage that gives ``key``, and its name in messages."""
        for position, stage in enumerate(self.stage):
            if isinstance(stage, StudentStage) and getattr(stage, key) is not None:
                return f"stage.{position}.{stage.kind}", stage
        return None


def load_recipe(path: Path) -> Recipe:
    """Read and validate a recipe; relative paths in it are relative to the current folder, as on the command line."""
    return validate(Recipe, read_toml(path), f"`{path}`")
