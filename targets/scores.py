"""Validation and test figures of files through a profile's runtime, without timing anything."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

from compressor.errors import CompressError
from compressor.profile import HardwareProfile
from compressor.types import Array, Artifact, Figure, Unavailable
from targets.base import Missing, TargetBackend
from targets.deploy import compiled_trial, figure_of, probed
from targets.measure import Settings
from targets.site import find_site
from targets.trial import Deployment, EvaluationData, Event, Trial, predictions

Scores = tuple[Figure, Figure]  # validation, test


def scores(
    profile: HardwareProfile,
    backend: TargetBackend,
    files: Sequence[Artifact],
    data: EvaluationData,
    out: Path,
    *,
    cache: MutableMapping[str, Array],
    on_event: Event,
) -> Mapping[str, Scores]:
    """Figures by the file's digest; the first of ``files`` is the reference of metrics that need one (the teacher).

    A file that does not compile or run has Unavailable figures with the reason; so have all where the target is
    missing. Predictions that a deployment of the same runtime left in ``cache`` are not made again.
    """
    ready = probed(backend)
    if isinstance(ready, Missing):
        gone = Unavailable(ready.reason, ready.hint)
        return {file.digest: (gone, gone) for file in files}
    site = find_site(profile, backend, ready)
    run = Deployment(profile, backend, data, out, site, cache, Settings(), None, on_event)
    found: dict[str, Scores] = {}
    references: list[Array | None] = [None, None]
    for file in files:
        trial = compiled_trial(run, next(iter(backend.entrants(file, profile))))
        made = [_outputs(run, trial, test=test) for test in (False, True)]
        if not found:
            references = [outputs if not isinstance(outputs, Unavailable) else None for outputs in made]
        pair = [_figure(run, trial, made[test], references[test], test=bool(test)) for test in (0, 1)]
        found[file.digest] = (pair[0], pair[1])
    return found


def _outputs(run: Deployment, trial: Trial, *, test: bool) -> Array | Unavailable:
    evalset = run.data.test if test else run.data.validation
    if evalset is None:
        return Unavailable("there is no test split")
    if trial.failure:
        return Unavailable(trial.failure)
    try:
        return predictions(run, trial, evalset)
    except CompressError as error:
        return Unavailable(str(error), error.hint)


def _figure(
    run: Deployment, trial: Trial, outputs: Array | Unavailable, reference: Array | None, *, test: bool
) -> Figure:
    evalset = run.data.test if test else run.data.validation
    if isinstance(outputs, Unavailable) or evalset is None:
        return outputs if isinstance(outputs, Unavailable) else Unavailable("there is no test split")
    return figure_of(run, trial, outputs, evalset, reference)
