"""One file of at most so many bytes: each layer in float32, float16, int8 or 4 bits, for the least noise in all."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onnx import GraphProto, ModelProto, helper, numpy_helper, version_converter

from compressor.errors import StageError, sdk_errors
from compressor.models.onnx_graph import name_nodes, opset_of, save_model
from compressor.quantize.promise.bases import Base, FloatBase
from compressor.quantize.promise.knapsack import Option, allocate
from compressor.quantize.promise.noise import PRECISIONS, Item, Prospect, put_first
from compressor.quantize.promise.packing import IR, OPSET, halved, size_of, written
from compressor.quantize.promise.restore import ROUNDING
from compressor.quantize.promise.stored import eight_bit_weights
from compressor.quantize.ptq import prove
from compressor.types import Artifact, LayerFact, file_digest

NAME = "mixed-size-ort"
FLOATING = ("fp16", "fp32")
ROUNDS = 6  # allocations whose real size is looked at, for one trial
MIB = 2**20
UNPACKED = "unpacked to the same 8-bit tensor while the file is loaded: no call is slower, memory is that of int8"
UNPACKED_FLOAT = "unpacked to float32 while the file is loaded: no call is slower, memory is that of float32"

Choice = Mapping[str, str]  # layer -> precision
Score = Callable[[Artifact], float]


class TooSmall(StageError):
    """No mixture fits the budget. ``smallest``: bytes of the smallest file that was written."""

    smallest = 0


@dataclass(frozen=True)
class Sized:
    """The file, its score, and how it was found. ``trials``: base, bytes, predicted noise and score of every file that
    was scored. ``pieces``: bytes in the file of each layer's weight."""

    artifact: Artifact
    score: float
    holds: bool
    choice: Choice
    prospect: Prospect
    pieces: Mapping[str, int]
    trials: tuple[tuple[str, int, float, float], ...]


@dataclass
class _Made:
    """One file under the budget."""

    prospect: Prospect
    choice: dict[str, str]
    path: Path
    pieces: dict[str, int]
    score: float = float("-inf")
    banned: set[tuple[str, str]] = field(default_factory=set)

    @property
    def noise(self) -> float:
        return sum(item.option(self.choice[item.layer]).noise for item in self.prospect.items)


def fit_size(
    prospects: Sequence[Prospect],
    score: Score,
    floor: float,
    budget: int,
    out: Path,
    *,
    trials: int = 16,
) -> Sized:
    """Write ``out`` of at most ``budget`` bytes whose ``score`` (on the validation split) is at least ``floor``, or as
    high as ``trials`` files allow.

    ``prospects`` are bases with their layers, the fastest first. On each of them the knapsack of noise against bytes is
    solved, the file is written, and the budget of the next solution is corrected by what its real size shows. Layers go
    to float in an int8 file, and a later base is tried, only where the floor is missed without: both cost time.
    The trials that are left go to neighbours of the best file: the layer that brings most
    noise may not keep its precision, and the knapsack is solved again.

    Raises:
        TooSmall: no mixture has so few bytes on any base.
        StageError: no base has layers to choose between.
    """
    if not prospects:
        raise StageError("there is no int8 file to start from", hint="See why none was made.")
    return _Search(score, floor, budget, out, trials).run(prospects)


class _Search:
    def __init__(self, score: Score, floor: float, budget: int, out: Path, trials: int) -> None:
        self.judge, self.floor, self.budget, self.out, self.left = score, floor, budget, out, trials
        self.log: list[tuple[str, int, float, float]] = []
        self.count = 0
        self.scratch: list[Path] = []

    def run(self, prospects: Sequence[Prospect]) -> Sized:
        try:
            return self._told(self._neighbours(self._best(prospects)))
        finally:
            for path in self.scratch:
                path.unlink(missing_ok=True)

    def _best(self, prospects: Sequence[Prospect]) -> _Made:
        best, failures = None, list[StageError]()
        for prospect in prospects:
            try:
                for made in self._files(prospect) if self.left and not self._holds(best) else ():
                    best = made if best is None or made.score > best.score + ROUNDING else best
            except StageError as error:
                failures.append(error)
        if best is None:
            raise min(failures, key=lambda error: error.smallest if isinstance(error, TooSmall) else 2**62)
        return best

    def _files(self, prospect: Prospect) -> Iterator[_Made]:
        """The best file of a base whose layers stay in int8 kernels; and, where it misses the floor, of all files."""
        self._refuse(prospect)
        costly = FLOATING if prospect.base.floats_cost_time else ()
        slow = {(item.layer, kind) for item in prospect.items for kind in costly}
        made = self._scored(self._fitted(prospect, slow))
        yield made
        least = prospect.smallest()  # noise only ranks roughly: the one file that is certain to fit gets its score too
        if self.left and not self._holds(made) and least != made.choice:
            path, pieces = self._written(prospect, least)
            yield self._scored(_Made(prospect, least, path, pieces, banned=slow))
        if slow and self.left and not self._holds(made):
            free = self._fitted(prospect, set())
            if free.choice != made.choice:
                yield self._scored(free)

    def _holds(self, made: _Made | None) -> bool:
        return made is not None and made.score >= self.floor - ROUNDING

    def _refuse(self, prospect: Prospect) -> None:
        """Nothing is measured where not even the smallest file fits."""
        size = self._written(prospect, prospect.smallest())[0].stat().st_size
        if size > self.budget:
            where = f"{prospect.precisions[0]} wherever it can be; {prospect.base.computes}"
            found = TooSmall(
                f"the smallest file has {size / MIB:.3f} MiB ({where}), {self.budget / MIB:.3f} are allowed",
                hint="Allow more, prune the student, or take a smaller one.",
            )
            found.smallest = size
            raise found

    def _fitted(self, prospect: Prospect, banned: set[tuple[str, str]]) -> _Made:
        """The solution with the least noise whose real file keeps the budget."""
        items = prospect.items
        allowed = self.budget - self._rest(prospect)
        best, seen = None, set[tuple[str, ...]]()
        for _ in range(ROUNDS):
            options = [self._options(item, banned) for item in items]
            chosen = allocate(options, allowed)
            if chosen is None:
                choice = {item.layer: given[0].precision for item, given in zip(items, options, strict=True)}
            else:
                choice = {
                    item.layer: given[at].precision for item, given, at in zip(items, options, chosen, strict=True)
                }
            key = tuple(choice.values())
            if key in seen:
                break
            seen.add(key)
            path, pieces = self._written(prospect, choice)
            made = _Made(prospect, choice, path, pieces, banned=banned)
            spare = self.budget - path.stat().st_size
            if spare >= 0 and (best is None or made.noise < best.noise):
                best = made
            allowed += spare
        if best is None:
            raise TooSmall("no mixture keeps the budget", hint="Allow more, or take a smaller student.")
        return best

    def _rest(self, prospect: Prospect) -> int:
        """Bytes of a file that are no layer's weight: seen on the smallest one."""
        path, pieces = self._written(prospect, prospect.smallest())
        return path.stat().st_size - sum(pieces.values())

    def _options(self, item: Item, banned: set[tuple[str, str]]) -> tuple[Option, ...]:
        left = tuple(option for option in item.options if (item.layer, option.precision) not in banned)
        return left or item.options[-1:]

    def _written(self, prospect: Prospect, choice: Choice) -> tuple[Path, dict[str, int]]:
        """A file with this choice, and the bytes of each layer's weight in it."""
        path = self.out.with_name(f"{self.out.stem}-{self.count}.onnx")
        self.count += 1
        model, pieces = compose(prospect, choice)
        save_model(model, path)
        self.scratch.append(path)
        return path, pieces

    def _scored(self, made: _Made) -> _Made:
        self.left -= 1
        prove(made.prospect.base.source.path, made.path, made.prospect.calibration)
        source = made.prospect.base.source
        artifact = dataclasses.replace(source, path=made.path, digest=file_digest(made.path), name=NAME)
        made.score = self.judge(artifact)
        size = made.path.stat().st_size
        self.log.append((made.prospect.base.name, size, made.noise, round(made.score, 6)))
        return made

    def _neighbours(self, best: _Made) -> _Made:
        """Solutions in which the loudest layer has to take another precision, as long as the floor is missed."""
        waiting = self._loudest(best)
        while waiting and self.left and not self._holds(best):
            move = waiting.pop(0)
            try:
                made = self._fitted(best.prospect, best.banned | {move})
            except TooSmall:
                continue
            if made.choice == best.choice:
                continue
            if self._scored(made).score > best.score + ROUNDING:
                best, waiting = made, self._loudest(made)
        return best

    def _loudest(self, made: _Made) -> list[tuple[str, str]]:
        rows = [(made_noise(item, made.choice), item.layer, made.choice[item.layer]) for item in made.prospect.items]
        return [(layer, precision) for noise, layer, precision in sorted(rows, reverse=True) if noise > 0]

    def _told(self, best: _Made) -> Sized:
        self.out.write_bytes(best.path.read_bytes())
        source = best.prospect.base.source
        artifact = dataclasses.replace(
            source,
            path=self.out,
            name=re.sub(r"/[^/]*$", "", source.name) + f"/{NAME}",
            digest=file_digest(self.out),
            precision="mixed-size",
        )
        told = Sized(artifact, best.score, self._holds(best), best.choice, best.prospect, best.pieces, tuple(self.log))
        scheme = _scheme(told, best.prospect.base, self.budget, self.floor)
        facts = (*_facts(told, best.prospect.base), *_layers(told, best.prospect.base))
        return dataclasses.replace(told, artifact=dataclasses.replace(artifact, scheme=scheme, facts=facts))


def made_noise(item: Item, choice: Choice) -> float:
    return item.option(choice[item.layer]).noise


def compose(prospect: Prospect, choice: Choice) -> tuple[ModelProto, dict[str, int]]:
    """The model with this choice, and the bytes that each layer's weight takes in its file."""
    base = prospect.base
    told = {"fp16": "stored in float16 under the size budget", "fp32": "kept in float32 under the size budget"}
    model = base.eight_bits({layer: told[kind] for layer, kind in choice.items() if kind in FLOATING})
    small = "int4" in choice.values()
    if small:
        model = _raised(model)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    eight = {weight.layer: weight for weight in eight_bit_weights(model, set(base.layers))}
    parts: dict[str, GraphProto] = {}
    pieces: dict[str, int] = {}
    dropped: set[str] = set()
    for number, (layer, kind) in enumerate(choice.items()):
        float_name = "" if layer in eight and kind not in FLOATING else base.layers[layer]
        name = _float_weight(model, layer, float_name) if float_name else eight[layer].name
        tensor = tensors[name]
        if kind == "int4" and layer in eight:
            packed = prospect.packed(eight[layer], numpy_helper.to_array(tensor))
            parts[layer] = written(packed, name, f"w{number}.")
        elif kind == "fp16":
            parts[layer] = halved(tensor, f"w{number}.")
        if layer in parts:
            dropped.add(name)
            pieces[layer] = size_of(parts[layer])
        else:
            pieces[layer] = size_of(GraphProto(initializer=[tensor]))
    put_first(model, list(parts.values()), dropped)
    return base.finish(model), pieces


def _float_weight(model: ModelProto, layer: str, name: str) -> str:
    """The stored weight of a layer in float. The dynamic quantizer turns a Gemm into a MatMul of another name whose
    weight is transposed, also where it stays float."""
    tensors = {tensor.name for tensor in model.graph.initializer if len(tensor.dims) > 1}
    if name in tensors:
        return name
    nodes = [node for node in model.graph.node if node.name == layer or node.name.startswith(f"{layer}_")]
    found: str | None = next((given for node in nodes for given in node.input if given in tensors), None)
    if found is None:
        raise StageError(f"the weight of `{layer}` is not in the file", hint="Keep the int8 file.")
    return found


def _raised(model: ModelProto) -> ModelProto:
    """At least the opset that knows INT4; operators of other domains stay."""
    if opset_of(model) < OPSET:
        with sdk_errors(StageError, f"raise the model to opset {OPSET}", hint="Export it at a later opset."):
            model = version_converter.convert_version(model, OPSET)
        name_nodes(model)
    model.ir_version = max(model.ir_version, IR, helper.find_min_ir_version_for([helper.make_opsetid("", OPSET)]))
    return model


def _scheme(found: Sized, base: Base, budget: int, floor: float) -> dict[str, str]:
    size = found.artifact.file_bytes
    stored = []
    for kind in PRECISIONS:
        layers = [layer for layer, taken in found.choice.items() if taken == kind]
        if layers:
            stored.append(f"{kind}: {len(layers)} layers, {sum(found.pieces[layer] for layer in layers):,} bytes")
    told = ", ".join(f"{name} {size:,} bytes {score:.4f}" for name, size, _, score in found.trials)
    return {
        "base": base.name,
        "computes": base.computes,
        "size budget": f"{size:,} bytes of {budget:,}",
        "stored": "; ".join(stored),
        "promise": f"validation score {found.score:.4f}"
        + (f", at least {floor:.4f} was asked for" if floor > float("-inf") else ""),
        "trials": told,
    }


def _facts(found: Sized, base: Base) -> tuple[LayerFact, ...]:
    """A row a layer with its bytes and why it has them, and one for all other bytes: together they are the file."""
    rows = [
        LayerFact("size", item.layer, "stored", "float32", found.choice[item.layer], _why(item, found, base))
        for item in found.prospect.items
    ]
    rest = found.artifact.file_bytes - sum(found.pieces[item.layer] for item in found.prospect.items)
    told = f"{rest:,} bytes: nodes, scales, biases and small weights"
    return (*rows, LayerFact("size", "(everything else)", "stored", "float32", "as in the base", told))


def _why(item: Item, found: Sized, base: Base) -> str:
    """What the choice costs beside the precisions next to it."""
    kind = found.choice[item.layer]
    place = [option.precision for option in item.options].index(kind)
    here = item.options[place]
    told = f"{found.pieces[item.layer]:,} bytes, noise {here.noise:.1e} at the outputs"
    if place + 1 < len(item.options):
        above = item.options[place + 1]
        told += f"; {above.precision} would take {above.cost - here.cost:,} bytes more for {_change(above, here)}"
    if place:
        below = item.options[place - 1]
        told += f"; {below.precision} would save {here.cost - below.cost:,} bytes for {_change(below, here)}"
    if kind == "int4":
        told += f"; {UNPACKED_FLOAT if isinstance(base, FloatBase) else UNPACKED}"
    return told


def _change(other: Option, here: Option) -> str:
    gap = other.noise - here.noise
    return f"{abs(gap):.1e} {'more' if gap > 0 else 'less'}"


def _layers(found: Sized, base: Base) -> tuple[LayerFact, ...]:
    """The base's account of its layers, with 4 bits where they are."""
    rows = []
    for fact in base.facts([layer for layer, kind in found.choice.items() if kind in FLOATING]):
        four = fact.stage == "quantize" and fact.action == "quantized" and found.choice.get(fact.layer) == "int4"
        rows.append(dataclasses.replace(fact, after="int4", reason=UNPACKED) if four else fact)
    return tuple(rows)
