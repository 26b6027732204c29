"""``diff``: where two forms of one model part, layer by layer, on real data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.cli.output import stdout_json, table
from compressor.errors import ConfigError
from compressor.types import Inputs, write_atomic

if TYPE_CHECKING:
    from onnx import ModelProto

    from compressor.data.types import Split
    from compressor.models.types import LoadedModel
    from compressor.quantize.compare import Difference

BATCH = 8  # samples whose inner tensors are held at once


@dataclasses.dataclass(frozen=True)
class DiffRequest:
    """What the user asked for: two models, data, and optionally the recipe that says how the data is prepared."""

    first: str
    second: str
    data: str | None
    recipe: Path | None
    samples: int
    threshold_db: float
    page: Path


def diff_command(request: DiffRequest, *, as_json: bool) -> int:
    """Compare, print the table, write the page."""
    from compressor.quantize.compare import compare
    from targets.report.difference import difference_page

    models, split, source = _open(request)
    count = min(request.samples, len(split))

    def batches() -> Iterator[Inputs]:
        for start in range(0, count, BATCH):
            yield split.batch(np.arange(start, min(start + BATCH, count)))

    first, second = (_graph(model, split) for model in models)
    found = compare(first, second, batches, threshold_db=request.threshold_db)
    view = _view(request, found, source)
    request.page.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(request.page, difference_page(view))
    if as_json:
        stdout_json({**dataclasses.asdict(found), "verdict": view.verdict, "page": str(request.page)})
    else:
        _show(view, request.page)
    return 0


def _recipe(request: DiffRequest) -> Any:
    from compressor.config import validate
    from compressor.recipe import Recipe, load_recipe

    recipe = load_recipe(request.recipe) if request.recipe is not None else Recipe()
    data: dict[str, Any] = recipe.model_dump(mode="json", exclude_unset=True)
    if request.data is not None and not _is_loader(request.data):
        data.setdefault("data", {})["source"] = request.data
    if request.recipe is None:
        data.setdefault("teacher", {})["task"] = "generic"
    return validate(Recipe, data, "the command line")


def _is_loader(name: str) -> bool:
    from compressor.cli.session import IMPORT_STRING

    return IMPORT_STRING.fullmatch(name) is not None


def _open(request: DiffRequest) -> tuple[list[LoadedModel], Split, str]:
    """Both models, and validation data prepared as the one that knows how wants it (a checkpoint brings its
    tokenizer, an ONNX file takes arrays as they are or pictures as the recipe says)."""
    from compressor.cli.session import IMPORT_STRING
    from compressor.data import load_data, read_raw
    from compressor.models import load_model

    recipe = _recipe(request)
    loader = request.data if request.data is not None and _is_loader(request.data) else None
    if recipe.data.source is None and loader is None:
        hint = "Give `--data` a folder, a csv, json, parquet or npz file, or `pkg.mod:loader`."
        raise ConfigError.single("the command line", "--data", "there is no data to compare on", hint=hint)
    raw = read_raw(recipe.data, loader=loader)
    models = []
    for name in (request.first, request.second):
        factory = name if IMPORT_STRING.fullmatch(name) else None
        config = recipe.teacher.model_copy(update={"model": None if factory else name})
        models.append(load_model(config, factory=factory, data=recipe.data, sample=raw.sample))
    model = next((item for item in models if item.onnx is None), models[0])
    bundle = load_data(recipe.data, model, loader=loader, seed=recipe.seed, raw=raw)
    return models, bundle.splits["validation"], bundle.source


def _graph(model: LoadedModel, split: Split) -> ModelProto:
    """The ONNX form; a torch model is exported for it, so that its layers have names to compare by."""
    import tempfile

    from compressor.models.onnx_graph import read_model

    if model.onnx is not None:
        return read_model(model.onnx)
    from compressor.export.onnx import export_onnx
    from compressor.export.optimise import optimise

    assert model.module is not None
    with tempfile.TemporaryDirectory(prefix="diff-") as folder:
        raw, path = Path(folder) / "raw.onnx", Path(folder) / "model.onnx"
        sample = split.batch(np.arange(min(2, len(split))))
        export_onnx(model.module.eval(), sample, model.inputs, model.outputs, raw, name="diff", metadata={})
        optimise(raw, path)  # as a run exports it: names and fusions fit the run's own files
        return read_model(path)


def _view(request: DiffRequest, found: Difference, source: str) -> Any:
    from targets.report.difference import DifferenceView, LayerRow, SampleRow

    layers = tuple(
        LayerRow(row.layer, row.operator, row.sqnr_db, row.added, row.sqnr_db < found.threshold_db)
        for row in found.layers
    )
    worst = tuple(
        SampleRow(
            row.index,
            f"{row.error:.2%}",
            "yes" if row.same_class else "no",
            " ".join(f"{value:.3f}" for value in row.first),
            " ".join(f"{value:.3f}" for value in row.second),
        )
        for row in found.worst
    )
    return DifferenceView(
        request.first,
        request.second,
        source,
        found.samples,
        verdict(found),
        found.threshold_db,
        layers,
        worst,
        found.unmatched,
    )


def verdict(found: Difference) -> str:
    """One sentence for people."""
    from targets.report.difference import decibels

    ends = ", ".join(f"`{item.tensor}` {decibels(item.sqnr_db)} dB" for item in found.outputs)
    told = f"Outputs: {ends}"
    if found.same_class is not None:
        told += f"; the same class for {found.same_class:.1%} of the samples"
    if found.first_bad is not None:
        bad = found.first_bad
        return f"{told}. First layer below {found.threshold_db:g} dB: `{bad.layer}` ({bad.sqnr_db:.1f} dB)."
    told += f". No layer is below {found.threshold_db:g} dB"
    if found.dearest is None or not found.dearest.added:
        return f"{told}."
    return f"{told}; most noise comes from `{found.dearest.layer}`."


def _show(view: Any, page: Path) -> None:
    rows = [[row.layer, row.operator, row.sqnr, row.noise, "bad" if row.bad else ""] for row in view.layers]
    table(["layer", "operator", "dB", "noise added", ""], rows, f"{view.first} against {view.second}")
    worst = [[str(row.index), row.error, row.same, row.first, row.second] for row in view.worst]
    table(["sample", "error", "same class", "first", "second"], worst, "worst samples")
    print(view.verdict)
    print(f"page      {page}")
