"""Put layers back to float, fewest and cheapest first, until a score on validation holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto, NodeProto

from compressor.errors import StageError
from compressor.models.onnx_graph import read_model
from compressor.profile import QuantizationRules
from compressor.quantize import ort
from compressor.quantize.prepare import prepare
from compressor.quantize.promise.sensitivity import LAYERS, Sensitivity, sensitivities
from compressor.quantize.ptq import quantize
from compressor.quantize.ranges import Ranges, collect
from compressor.quantize.variants import Variant
from compressor.quantize.watch import Calibration
from compressor.types import Artifact, LayerFact

NAME = "int8-mixed-ort"
ROUNDING = 1e-9  # a score of exactly the floor holds
Score = Callable[[Artifact], float]


@dataclass(frozen=True)
class Restored:
    """The mixed file, its score, and how it was found. ``holds``: is the score at least what was asked for?

    ``trials`` are (layers in float, score) of every file that was made, in order.
    """

    artifact: Artifact
    score: float
    holds: bool
    kept_float: tuple[str, ...]
    ranking: tuple[Sensitivity, ...]
    trials: tuple[tuple[int, float], ...]


def restore(
    source: Artifact,
    variant: Variant,
    rules: QuantizationRules,
    calibration: Calibration,
    score: Score,
    floor: float,
    out: Path,
    *,
    cache: Path | None = None,
    trials: int = 16,
) -> Restored:
    """The int8 file with the fewest, cheapest layers in float whose ``score`` is at least ``floor``.

    ``score`` judges a file on the *validation* split. Layers are ordered by the noise each brings to the outputs per
    share of the work (:func:`order`); the number of layers is found by doubling and halving, and afterwards each one is
    tried back in int8, the dearest first. Where not even all but one layer are enough, the best file is returned with
    ``holds`` False. Raises :class:`StageError` when fewer than two layers are quantized.
    """
    ranking = rank(source, variant, rules, calibration, cache)
    if len(ranking) < 2:
        raise StageError("there are no layers to choose between", hint="Keep fp32 for this model.")
    search = _Search(source, variant, rules, calibration, score, floor, out, cache, trials, ranking)
    wanted = search.trim(search.grow(order(ranking)))
    best = search.best(wanted)
    artifact, got = search.made[best], search.scores[best]
    out.write_bytes(artifact.path.read_bytes())
    scratch = [item.path for item in search.made.values()]
    holds = got >= floor - ROUNDING
    kept = tuple(item.layer for item in ranking if item.layer in best)
    shown = dataclasses.replace(artifact, path=out, name=f"{source.name.rsplit('/', 1)[0]}/{NAME}")
    told = Restored(shown, got, holds, kept, ranking, tuple(search.log))
    shown = dataclasses.replace(
        shown,
        precision="int8-mixed",
        scheme={**shown.scheme, **_scheme(told, variant, floor)},
        facts=(*shown.facts, *_facts(told)),
    )
    for path in scratch:
        path.unlink(missing_ok=True)
    return dataclasses.replace(told, artifact=shown)


def rank(
    source: Artifact, variant: Variant, rules: QuantizationRules, calibration: Calibration, cache: Path | None
) -> tuple[Sensitivity, ...]:
    """The layers that ``variant`` quantizes, the most sensitive first."""
    model = prepare(read_model(source.path))
    method = "minmax" if variant.calibration == "auto" else variant.calibration
    ranges: Ranges = collect(model, calibration, method, cache) if variant.kind == "static" else {}
    return sensitivities(model, variant, rules, ranges, calibration, ort.static_skips(model, variant, rules))


def order(ranking: Sequence[Sensitivity]) -> tuple[str, ...]:
    """Layers in the order in which they go back: noise that is taken away per latency that is added.

    A layer costs its share of the work and, whatever its size, the way between int8 and float: one layer's mean share.
    """
    overhead = 1 / max(1, len(ranking))
    ordered = sorted(ranking, key=lambda item: (-item.noise / (item.share + overhead), item.layer))
    return tuple(item.layer for item in ordered)


def followers(model: ModelProto, layers: Collection[str]) -> dict[str, str]:
    """What must stay float with these layers: operators between them and the next layers. Left in int8 they would
    round the layer's output all the same. A node that joins branches is the last of them: what follows is common."""
    users: dict[str, list[NodeProto]] = {}
    made = {name for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    found: dict[str, str] = {}
    pending = [(node, node.name) for node in model.graph.node if node.name in layers]
    while pending:
        node, layer = pending.pop()
        joins = node.name not in layers and sum(name in made for name in node.input) > 1
        for name in () if joins else node.output:
            for user in users.get(name, []):
                if user.op_type not in LAYERS and user.name not in found:
                    found[user.name] = f"stands behind `{layer}`, which is in float"
                    pending.append((user, layer))
    return found


class _Search:
    """Files that were made and their scores; a set of layers is never made twice."""

    def __init__(
        self,
        source: Artifact,
        variant: Variant,
        rules: QuantizationRules,
        calibration: Calibration,
        score: Score,
        floor: float,
        out: Path,
        cache: Path | None,
        trials: int,
        ranking: tuple[Sensitivity, ...],
    ) -> None:
        self.source, self.variant, self.rules, self.calibration = source, variant, rules, calibration
        self.judge, self.floor, self.out, self.cache = score, floor, out, cache
        self.left, self.model = trials, prepare(read_model(source.path))
        self.by_name = {item.layer: item for item in ranking}
        self.made: dict[frozenset[str], Artifact] = {}
        self.scores: dict[frozenset[str], float] = {}
        self.log: list[tuple[int, float]] = []

    def holds(self, layers: Sequence[str]) -> bool:
        """Make and score the file with these layers in float. False, without making it, when no trial is left."""
        key = frozenset(layers)
        if key not in self.scores:
            if not self.left:
                return False
            self.left -= 1
            reasons = followers(self.model, layers) if self.variant.operators is None else {}
            reasons |= {name: self.reason(name) for name in layers}
            path = self.out.with_name(f"{self.out.stem}-{len(self.made)}.onnx")
            self.made[key] = quantize(
                self.source, self.variant, self.rules, self.calibration, path, cache=self.cache, keep_float=reasons
            )
            self.scores[key] = self.judge(self.made[key])
            self.log.append((len(key), round(self.scores[key], 6)))
        return self.scores[key] >= self.floor - ROUNDING

    def reason(self, name: str) -> str:
        item = self.by_name[name]
        told = f"put back to float to keep the accuracy: alone in int8 it leaves {item.sqnr_db:.1f} dB at the outputs"
        return f"{told}, with {item.share:.1%} of the work"

    def grow(self, ordered: tuple[str, ...]) -> tuple[str, ...]:
        """The shortest beginning of the order that holds: doubled until one does, then halved between."""
        low, high = 0, 1
        most = len(ordered) - 1
        while not self.holds(ordered[:high]):
            if high >= most or not self.left:
                return ordered[:high]
            low, high = high, min(2 * high, most)
        while high - low > 1 and self.left:
            middle = (low + high) // 2
            if self.holds(ordered[:middle]):
                high = middle
            else:
                low = middle
        return ordered[:high]

    def trim(self, layers: tuple[str, ...]) -> tuple[str, ...]:
        """Try every layer back in int8, the one with most work first; the last one that was added is needed."""
        if not self.holds(layers):
            return layers
        for name in sorted(layers[:-1], key=lambda item: -self.by_name[item].share):
            fewer = tuple(item for item in layers if item != name)
            if fewer and self.left and self.holds(fewer):
                layers = fewer
        return layers

    def best(self, wanted: tuple[str, ...]) -> frozenset[str]:
        """The chosen set where it holds, otherwise the one with the best score (fewest layers among equals)."""
        key = frozenset(wanted)
        if self.scores.get(key, float("-inf")) >= self.floor - ROUNDING:
            return key
        return max(self.scores, key=lambda item: (self.scores[item], -len(item)))


def _scheme(found: Restored, variant: Variant, floor: float) -> Mapping[str, str]:
    told = ", ".join(f"{count}: {score:.4f}" for count, score in found.trials)
    return {
        "base": variant.name,
        "in float": f"{len(found.kept_float)} of {len(found.ranking)} layers",
        "promise": f"validation score {found.score:.4f}, at least {floor:.4f} was asked for",
        "trials": f"layers in float: score on validation ({told})",
    }


def _facts(found: Restored) -> tuple[LayerFact, ...]:
    """The ranking: one row a layer, the most sensitive first."""
    rows = []
    for place, item in enumerate(found.ranking, 1):
        state = "float32" if item.layer in found.kept_float else "int8"
        reason = f"rank {place} of {len(found.ranking)}: {item.sqnr_db:.1f} dB at the outputs with only this layer in "
        reason += f"int8, {item.share:.1%} of the work"
        rows.append(LayerFact("sensitivity", item.layer, "ranked", "float32", state, reason))
    return tuple(rows)
