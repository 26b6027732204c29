"""Make and apply deltas."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from compressor.delta_file import ANSWERS, DATA, HEADER, VERSION, DeltaError, apply, patched, read_delta
from compressor.errors import ConfigError
from compressor.quantize.delta.allocate import Tensor, smallest, spend
from compressor.quantize.delta.changes import Pair, compare
from compressor.quantize.delta.factors import Stored, deflated
from compressor.quantize.delta.report import Report, report, squared_error
from compressor.types import Array, write_atomic

_EPOCH = (1980, 1, 1, 0, 0, 0)  # archives must not differ by when they were made
ATTEMPTS = 6  # estimated sizes and errors are corrected by real ones so often
CLOSE = 0.97  # of the budget: near enough

Answers = Callable[[bytes], Sequence[Mapping[str, Array]]]  # outputs for stored samples of an updated model


@dataclasses.dataclass(frozen=True)
class Target:
    """What the delta is made for: at most so many bytes, or a share of NEW's; or at most so large a relative error of
    each tensor's change (Frobenius norm); or neither: bit for bit."""

    bytes: int | None = None
    share: float | None = None
    error: float | None = None

    def __str__(self) -> str:
        if self.error is not None:
            return f"error of each change at most {self.error:g}"
        if self.share is not None:
            return f"at most {100 * self.share:g} % of the new model"
        return "bit for bit" if self.bytes is None else f"at most {self.bytes} bytes"


def make_delta(base: Path, new: Path, out: Path, target: Target, *, answers: Answers | None = None) -> Report:
    """Write ``out``, which turns ``base`` into (almost) ``new``. Both are .onnx or .safetensors of one topology.

    ``answers`` gives outputs of the updated model for samples that a package holds; they go along for its self-check.
    Raises :class:`ConfigError` for models of different topology, and for a budget below what must stay exact.
    """
    if out.resolve() in (base.resolve(), new.resolve()):
        raise ConfigError.single(f"`{out}`", "--out", "would replace one of the models", hint="Give another path.")
    pair = compare(base, new)
    tensors = [Tensor(change) for change in pair.changes]
    budget = _budget(pair, target)
    if budget is not None:
        _check_budget(tensors, budget, target, new)
        content = _within_bytes(pair, tensors, base.name, budget, answers)
    elif target.error is not None:
        content = _pack(pair, [_within_error(tensor, target.error) for tensor in tensors], base.name, answers)
    else:
        content = _pack(pair, [tensor.stored(tensor.exact) for tensor in tensors], base.name, answers)
    if budget is not None and len(content) > budget:
        hint = "Allow more bytes; `--exact` shows what the whole difference takes."
        raise ConfigError.single(f"`{new.name}`", "--size", f"no delta of {budget} bytes could be made", hint=hint)
    write_atomic(out, content)
    return report(pair, out)


def apply_delta(base: Path, delta: Path, out: Path) -> None:
    """Write the updated model; :class:`ConfigError` for another base, a damaged delta, or a file that is no delta."""
    if out.resolve() == base.resolve():
        raise ConfigError.single(f"`{out}`", "--out", "would replace the base", hint="Give another path.")
    try:
        made = apply(base.read_bytes(), read_delta(delta), f"`{base}`")
    except DeltaError as error:
        hint = "Take the base that the delta was made against, and get the delta from its source again."
        raise ConfigError.single(f"`{delta}`", "delta", str(error), hint=hint) from error
    write_atomic(out, made)


def _budget(pair: Pair, target: Target) -> int | None:
    return int(target.share * len(pair.new)) if target.share is not None else target.bytes


def _check_budget(tensors: Sequence[Tensor], budget: int, target: Target, new: Path) -> None:
    least = smallest(tensors)
    if least > budget:
        held = sorted((tensor for tensor in tensors if not tensor.change.lossy), key=lambda item: -item.exact.cost)
        names = ", ".join(f"`{tensor.change.name}`" for tensor in held[:3])
        what = f"{target} ({budget} bytes) is less than what must stay exact takes: about {least:.0f} bytes ({names})"
        raise ConfigError.single(f"`{new.name}`", "--size", what, hint="Allow more bytes.")


def _within_bytes(pair: Pair, tensors: Sequence[Tensor], base: str, budget: int, answers: Answers | None) -> bytes:
    """The best delta of at most ``budget`` bytes; estimates of sizes are corrected by what a try really took."""
    wanted, best, before = float(budget), b"", None
    for _ in range(ATTEMPTS):
        chosen = spend(tensors, wanted)
        if chosen == before:
            break
        before = chosen
        content = _pack(
            pair, [tensor.stored(choice) for tensor, choice in zip(tensors, chosen, strict=True)], base, answers
        )
        if len(content) <= budget and len(content) > len(best):
            best = content
        if CLOSE * budget <= len(content) <= budget:
            break
        wanted *= 0.99 * budget / len(content)
    return best or content


def _within_error(tensor: Tensor, limit: float) -> Stored | None:
    """The smallest form whose real error keeps the limit; estimates are corrected by what a try really gave."""
    change = tensor.change
    if not change.lossy:
        return tensor.stored(tensor.exact)
    allowed = limit**2 * change.energy
    wanted = allowed
    for _ in range(ATTEMPTS):
        choice = tensor.within(wanted)
        stored = tensor.stored(choice)
        if choice.kind == "exact":
            return stored
        found = squared_error(change, stored)
        if found <= allowed:
            return stored
        wanted *= 0.95 * allowed / found
    return tensor.stored(tensor.exact)


def _pack(pair: Pair, stored: Sequence[Stored | None], base: str, answers: Answers | None) -> bytes:
    """The bytes of a delta file; the same every time."""
    kept = [item for item in stored if item is not None]
    streams = [deflated(item.data) for item in kept]
    entries = [{**item.entry, "packed": len(stream)} for item, stream in zip(kept, streams, strict=True)]
    data = b"".join(streams)
    result = patched(pair.base, entries, data)
    header = {
        "delta_version": VERSION,
        "base": {"name": base, "sha256": hashlib.sha256(pair.base).hexdigest(), "bytes": len(pair.base)},
        "result": {"sha256": hashlib.sha256(result).hexdigest(), "bytes": len(result)},
        "tensors": entries,
    }
    members = {HEADER: json.dumps(header, separators=(",", ":")).encode(), DATA: data}
    if answers is not None:
        members[ANSWERS] = _arrays(answers(result))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            entry.compress_type = zipfile.ZIP_STORED if name == DATA else zipfile.ZIP_DEFLATED
            archive.writestr(entry, content, compresslevel=9)
    return stream.getvalue()


def _arrays(outputs: Sequence[Mapping[str, Array]]) -> bytes:
    stream = io.BytesIO()
    named = {f"{index}.{name}": value for index, sample in enumerate(outputs) for name, value in sample.items()}
    np.savez(stream, **named)  # type: ignore[arg-type]
    return stream.getvalue()
