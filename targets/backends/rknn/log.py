"""What RKNN-Toolkit2 says of a build: its table of operations with cycles, and the memory it plans.

The table is in the verbose log only (version 2.5.0). Columns: number, operation, type, where it runs, shapes, cycles of
memory, of the NPU, and of both overlapped (the larger), kilobytes moved, name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_ROW = re.compile(
    r"\]\s+(?P<id>\d+)\s+(?P<operator>\S+)\s+(?P<type>[A-Z]+\d*)\s+(?P<target>NPU|CPU|GPU)\s+.*?\s"
    r"(?P<ddr>\d+)/(?P<npu>\d+)/(?P<total>\d+)\s+\S+\s+(?P<name>\S+)\s*$",
    re.MULTILINE,
)
_MEMORY = re.compile(r"Total (Internal|Weight) Memory Size: ([\d.]+)\s*KB")
_ENDS = ("InputOperator", "OutputOperator")


@dataclass(frozen=True)
class Operation:
    """One row of the table."""

    operator: str
    type: str
    target: str
    cycles: int
    name: str

    @property
    def integer(self) -> bool:
        return self.type.startswith(("INT", "UINT"))


@dataclass(frozen=True)
class Build:
    """The last table of a log, without the model's ends, and memory in KiB by what it is for."""

    operations: tuple[Operation, ...]
    memory_kib: dict[str, float]

    @property
    def placed(self) -> tuple[Operation, ...]:
        return tuple(item for item in self.operations if item.target == "NPU")

    @property
    def left(self) -> tuple[str, ...]:
        return tuple(f"{item.operator} {item.name}" for item in self.operations if item.target != "NPU")

    @property
    def counted(self) -> Sequence[Operation]:
        """Operations that the table has cycles for."""
        return [item for item in self.placed if item.cycles]


def read_build(log: str) -> Build:
    """Of several tables (one a pass of the compiler) the last one counts; numbers start at 0 in each."""
    rows = list(_ROW.finditer(log))
    start = max((place for place, row in enumerate(rows) if row["id"] == "0"), default=0)
    operations = tuple(
        Operation(row["operator"], row["type"], row["target"], int(row["total"]), row["name"].partition(":")[2])
        for row in rows[start:]
        if row["operator"] not in _ENDS
    )
    memory = {kind.lower(): float(size) for kind, size in _MEMORY.findall(log)}
    return Build(operations, memory)
