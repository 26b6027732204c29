"""Several processes train one student (``accelerate launch``): who they are, and the few things they tell each other.

Every process computes its share of each batch; sums, counts and gradients are added up, so that all of them hold the
same weights after every step. Nothing is pickled: tensors and JSON travel.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from compressor.types import Array

if TYPE_CHECKING:
    from torch import Tensor

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # torchrun, then kinds of MPI
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
PATIENCE = timedelta(days=7)  # a process may wait this long while the first one exports and measures


def launched() -> int:
    """How many processes were launched together; 1 without a launcher. Needs no torch."""
    return max(1, *(int(os.environ.get(name, "1")) for name in _SIZES))


def is_main() -> bool:
    """Is this the process that writes? Needs no torch."""
    return not any(int(os.environ.get(name, "0")) for name in _RANKS)


class Processes:
    """This process among the others. Alone, every method returns at once."""

    def __init__(self) -> None:
        import torch

        self.rank, self.count = 0, 1
        self._control: Any = None  # the group for tensors in main memory; None: the default one
        if launched() > 1:
            from accelerate import PartialState

            state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
            self.rank, self.count = int(state.process_index), int(state.num_processes)
            if state.device.type != "cpu":
                self._control = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    def _group(self, tensor: Tensor) -> Any:
        return self._control if tensor.device.type == "cpu" else None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            from torch import distributed

            distributed.all_reduce(tensor, group=self._group(tensor))
        return tensor

    def share(self, tensor: Tensor) -> Tensor:
        """The first process's values, in place."""
        if self.count > 1:
            from torch import distributed

            distributed.broadcast(tensor, 0, group=self._group(tensor))
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """One row a process."""
        import torch

        if self.count == 1:
            return tensor[None]
        rows = [torch.empty_like(tensor) for _ in range(self.count)]
        torch.distributed.all_gather(rows, tensor, group=self._group(tensor))
        return torch.stack(rows)

    def total(self, number: int) -> int:
        """The sum of a whole number over all processes."""
        import torch

        return number if self.count == 1 else int(self.add(torch.tensor(number, dtype=torch.int64)))

    def agreed(self, values: Array) -> Array:
        """The first process's values on all of them, which may bring other numbers but the same shape."""
        import torch

        return values if self.count == 1 else self.share(torch.from_numpy(values.copy())).numpy()

    def tell(self, order: Mapping[str, Any] | None) -> None:
        """The first process gives the others an order, or None: there is nothing more to do."""
        import torch

        text = json.dumps(order).encode()
        self.share(torch.tensor(len(text), dtype=torch.int64))
        self.share(torch.frombuffer(bytearray(text), dtype=torch.uint8))

    def hear(self) -> dict[str, Any] | None:
        """Wait for an order of the first process."""
        import torch

        length = int(self.share(torch.tensor(0, dtype=torch.int64)))
        text = self.share(torch.empty(length, dtype=torch.uint8))
        found: dict[str, Any] | None = json.loads(bytes(text.tolist()))
        return found
