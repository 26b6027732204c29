"""Arrays that go in as they are: sensor windows, features, token ids made elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from compressor.data.raw import ONLY, RawPart
from compressor.errors import PlanError
from compressor.models.types import LoadedModel
from compressor.types import Array, Inputs, TensorSpec


@dataclass(frozen=True)
class ArrayStore:
    """Arrays (N, ...) by the model's input names."""

    columns: Mapping[str, Array]
    specs: Mapping[str, TensorSpec]


def array_store(part: RawPart, model: LoadedModel) -> ArrayStore:
    """Match the data's arrays with the model's inputs: by name, or the only one with the only one."""
    specs = {spec.name: spec for spec in model.inputs}
    if isinstance(part.samples, np.ndarray):
        columns: Mapping[str, Array] = {ONLY: part.samples}
    elif isinstance(part.samples, Mapping):
        columns = part.samples
    else:
        raise PlanError.single("data", f"holds {part.kind}, but the model wants arrays ({', '.join(specs)})")
    if len(columns) == 1 and len(specs) == 1:
        columns = {next(iter(specs)): next(iter(columns.values()))}
    missing = [name for name in specs if name not in columns]
    if missing:
        have = ", ".join(name or "one unnamed array" for name in columns)
        raise PlanError.single(
            "data", f"has no array for the input{'s' * (len(missing) > 1)} {', '.join(missing)}; it has {have}"
        )
    return ArrayStore({name: columns[name] for name in specs}, specs)


@dataclass(eq=False)
class ArraySplit:
    """One part of a data set of arrays."""

    name: str
    labels: Array | None
    digests: Array
    store: ArrayStore
    rows: Array

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Array) -> Inputs:
        """The rows by input name, in the model's types."""
        rows = self.rows[index]
        return {
            name: column[rows].astype(self.store.specs[name].dtype, copy=False)
            for name, column in self.store.columns.items()
        }
