"""Early exits: files that stop at the first exit that is sure enough, with a threshold chosen on validation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from compressor.errors import StageError
from compressor.exits import EarlyExit
from compressor.export.exits import EXIT, chosen, confidence, early_exit
from compressor.ledger import StageOutput, code_digest
from compressor.stages.mixed import Scorer
from compressor.stages.run import MODEL_FILE, Run
from compressor.types import Array, Artifact, LayerFact, TensorSpec, file_digest

CANDIDATES = 200  # thresholds that are tried: quantiles of the exits' confidences
SUFFIX = "early-exit"
THRESHOLD = "exit threshold"  # in the artifact's scheme
EXITS = "exits"  # in it as well: how many the file has
PREFIX = "exit_"


@dataclass(frozen=True)
class Choice:
    """A threshold, the score on validation with it, and the share of validation that leaves at each exit."""

    threshold: float
    score: float
    shares: tuple[float, ...]


def early_candidates(
    run: Run, wanted: EarlyExit, files: Sequence[Artifact], teacher: Artifact | None
) -> tuple[tuple[Artifact, ...], Mapping[str, str]]:
    """For each of the student's files one that leaves early, and why the others were not made.

    The threshold is the lowest at which, and above which, the score on validation keeps ``accept.max_drop`` against
    ``teacher``.
    """
    made: list[Artifact] = []
    failed: dict[str, str] = {}
    for artifact in files:
        try:
            made.append(_made(run, wanted, artifact, teacher))
        except StageError as error:
            failed[f"{artifact.name.rpartition('/')[2]}-{SUFFIX}"] = str(error)
    return tuple(made), failed


def _made(run: Run, wanted: EarlyExit, artifact: Artifact, teacher: Artifact | None) -> Artifact:
    drop = run.recipe.accept.max_drop
    key = {
        "source": artifact.digest,
        "teacher": None if teacher is None else teacher.digest,
        "threshold": wanted.threshold,
        "max_drop": drop if wanted.threshold is None else None,
        "validation": run.data.digests["validation"],
        "code": code_digest("export/exits", "stages/exits", "evaluate"),
    }

    def work(folder: Path) -> StageOutput:
        from compressor.models.onnx_graph import read_model, save_model

        names = [spec.name for spec in artifact.outputs if spec.name.startswith(PREFIX)]
        scorer = Scorer(run, teacher or artifact)
        choice = _choice(wanted, drop, scorer, scorer.all_outputs(artifact), names)
        taken = [name for name, share in zip(names, choice.shares, strict=False) if share]  # others would only cost
        if not taken:
            raise StageError(
                f"at {choice.threshold:.4f} no sample of validation leaves early", hint="Give a lower `threshold`."
            )
        save_model(early_exit(read_model(artifact.path), taken, choice.threshold), folder / MODEL_FILE)
        shares = dict(zip([*names, "the end"], choice.shares, strict=True))
        (folder / "choice.json").write_text(json.dumps({**vars(choice), "shares": shares}, indent=1))
        facts = tuple(
            LayerFact("exits", name, "kept", "output", f"{share:.1%} of validation", f"sure by {choice.threshold:.4f}")
            for name, share in shares.items()
        )
        metrics = {"threshold": choice.threshold, "validation": round(choice.score, 6), "exits": len(taken)}
        return StageOutput(metrics, facts)

    name = f"{artifact.name}-{SUFFIX}"
    result = run.ledger.stage(f"exits-{artifact.name.rpartition('/')[2]}", key, work)
    path = result.folder / MODEL_FILE
    first = artifact.outputs[0]
    return replace(
        artifact,
        name=name,
        path=path,
        precision=f"{artifact.precision}-{SUFFIX}",
        outputs=(first, TensorSpec(EXIT, "int64", first.shape[:1])),
        digest=file_digest(path),
        scheme={
            **artifact.scheme,
            THRESHOLD: f"{float(result.metrics['threshold']):.6g}",
            EXITS: str(int(result.metrics["exits"])),
        },
        facts=(*artifact.facts, *result.facts),
    )


def _choice(
    wanted: EarlyExit, drop: float | None, scorer: Scorer, outputs: Mapping[str, Array], names: Sequence[str]
) -> Choice:
    from compressor.evaluate import is_distribution

    final, exits = next(iter(outputs.values())), [outputs[name] for name in names]
    if final.ndim != 2 or is_distribution(final):
        raise StageError("the student's output is not logits of classes", hint="Leave `export` of the exits out.")
    if wanted.threshold is not None:
        answer, number = chosen(exits, final, wanted.threshold)
        return Choice(wanted.threshold, scorer.score_of(answer), _shares(number, len(exits)))
    floor = scorer.baseline - (drop or 0.0) - 1e-9
    plain = scorer.score_of(final)
    if plain < floor:
        lost = f"{100 * (scorer.baseline - plain):.2f} points"
        raise StageError(f"the whole student loses {lost} on validation already", hint="Train it longer.")
    best: Choice | None = None
    for threshold in _thresholds(exits):  # from above: the first that is too low ends the search
        answer, number = chosen(exits, final, threshold)
        score = scorer.score_of(answer)
        if score < floor:
            break
        best = Choice(threshold, score, _shares(number, len(exits)))
    if best is None or best.shares[-1] == 1.0:
        raise StageError("no threshold lets a sample leave early within `max_drop`", hint="Train the exits longer.")
    return best


def _thresholds(exits: Sequence[Array]) -> list[float]:
    """Confidences that occur, thinned out to quantiles, highest first."""
    seen = np.unique(np.concatenate([confidence(logits) for logits in exits]))
    if len(seen) > CANDIDATES:
        seen = np.unique(np.quantile(seen, np.linspace(0, 1, CANDIDATES), method="lower").astype(np.float32))
    return [float(value) for value in seen[::-1]]


def _shares(number: Array, count: int) -> tuple[float, ...]:
    return tuple(float(np.mean(number == position)) for position in range(count + 1))
