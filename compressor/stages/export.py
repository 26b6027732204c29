"""Export: a module becomes an optimised fp32 ONNX file that is checked, per output, against the module."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compressor.errors import StageError
from compressor.ledger import StageOutput, code_digest
from compressor.stages.run import MODEL_FILE, Line, Run, version
from compressor.types import TEXT2TEXT, Artifact, Format, Inputs, TensorSpec, file_digest

if TYPE_CHECKING:
    from torch import nn

    from compressor.export.verify import Parity

PARITY_SAMPLES = 64
OUTPUTS_FILE = "outputs.json"


def onnx_teacher(run: Run, path: Path) -> Artifact:
    """The artifact of a teacher that is an ONNX file already."""
    from compressor.models.onnx_facts import describe

    return Artifact(
        "teacher/fp32", "teacher", path, Format.ONNX, "fp32", run.model.inputs, run.model.outputs,
        file_digest(path), describe(path).parameters,
    )  # fmt: skip


def export(run: Run, line: Line) -> tuple[Artifact, tuple[Parity, ...]]:
    """The checked fp32 ONNX file of a lineage, and how far each output is from the torch module's."""
    key = {
        "previous": line.key,
        "role": line.role,
        "inputs": [vars(spec) for spec in run.model.inputs],
        "samples": run.data.digests["validation"],
        "code": code_digest("export", "models/onnx_graph", "models/onnx_facts", "models/heads", "models/tokens"),
        "torch": version("torch"),
    }
    result = run.ledger.stage(f"export-{line.role}", key, lambda folder: _export_to(run, line, folder))
    from compressor.export.verify import Parity

    parity = tuple(Parity(**row) for row in json.loads((result.folder / "parity.json").read_text()))
    path = result.folder / MODEL_FILE
    specs = json.loads((result.folder / OUTPUTS_FILE).read_text())
    outputs = tuple(TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"])) for spec in specs)
    artifact = Artifact(
        f"{line.role}/fp32", line.role, path, Format.ONNX, "fp32", run.model.inputs, outputs,
        file_digest(path), int(result.metrics["parameters"]), facts=result.facts,
    )  # fmt: skip
    return artifact, parity


def _export_to(run: Run, line: Line, folder: Path) -> StageOutput:
    from compressor.export.onnx import export_onnx
    from compressor.export.optimise import optimise
    from compressor.export.verify import verify
    from compressor.models.fakequant import is_rounded, settled
    from compressor.models.onnx_facts import describe
    from compressor.models.sparse import drop_masks

    module = drop_masks(line.load().eval())
    if is_rounded(module):
        module = settled(module)  # the rounded weights as floats; its quantized files hold the codes
    refuse_training_parts(module)
    outputs = run.outputs(module)
    (folder / OUTPUTS_FILE).write_text(json.dumps([vars(spec) for spec in outputs]))
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    raw = scratch / MODEL_FILE
    metadata = {"role": line.role, "licence": run.model.provenance.licence or "unknown"}
    export_onnx(
        module, run.samples("validation", 2), run.model.inputs, outputs, raw,
        name=f"{run.recipe.name}-{line.role}", metadata=metadata,
    )  # fmt: skip
    facts = optimise(raw, folder / MODEL_FILE)
    rows = verify(run.runner(module), folder / MODEL_FILE, _parity_batches(run), artifact=f"{line.role}/fp32")
    (folder / "parity.json").write_text(json.dumps([vars(row) for row in rows], indent=1))
    for row in rows:
        if not row.passed:
            raise StageError(
                f"the ONNX export of the {line.role} differs from its torch module: output `{row.output}` by "
                f"{row.worst:.2e} (tolerance {row.tolerance:.0e})",
                hint="The exporter or an optimisation changed the numbers; please report this model.",
            )
    described = describe(folder / MODEL_FILE)
    return StageOutput({"parameters": described.parameters, "macs": described.macs or 0, "worst": rows[0].worst}, facts)


def refuse_training_parts(module: nn.Module) -> None:
    """What only training needs is never exported.

    Raises:
        StageError: the module still holds such a part, named in the message.
    """
    from compressor.models.heads import heads_of

    found = [path for path, part in heads_of(module).items() if part.training_only]
    if found:
        raise StageError(
            f"the student still holds parts that are for training only: {', '.join(found)}",
            hint="Its training did not end properly; run the distil stage again.",
        )


def _parity_batches(run: Run) -> Iterator[Inputs]:
    """Batches of sizes 1, 3, 16 ... so that the dynamic axes are really exercised."""
    part = run.data.splits["validation"]
    total, start = min(PARITY_SAMPLES, len(part)), 0
    wide = run.model.task == "causal-lm" or run.model.task in TEXT2TEXT  # logits of a vocabulary are large
    sizes = (1, 3) if wide else (1, 3, 16, PARITY_SAMPLES)
    for size in sizes:
        stop = min(start + size, total)
        if stop > start:
            yield part.batch(np.arange(start, stop))
        start = stop
