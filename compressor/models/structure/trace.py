"""Run a module once and record which elements belong together.

The module runs eagerly on a small example while every ATen operation is intercepted; unlike symbolic tracing this
follows any Python control flow, needs no rewrite of the model and sees each parameter by identity, so that modules and
weights that are used twice are one and the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compressor.models.structure.groups import Key
from compressor.models.structure.labels import LabelSpace, Value, axes_of
from compressor.models.structure.rules import RULES, Call, default_rule

FRACTION_OF_A_BATCH = 2  # samples that are enough to follow shapes; two, because size 1 would look like a broadcast

CONSTANTS = {f"aten::{name}" for name in ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and without fused kernels; the former modes come back."""
    modes = {name: part.training for name, part in module.named_modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for name, part in module.named_modules():
            part.training = modes[name]


def run(module: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """Call a module with its inputs by name, or in order for a module whose ``forward`` names them otherwise."""
    from inspect import Parameter, signature

    parameters = signature(module.forward).parameters
    by_name = any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()) or all(n in parameters for n in batch)
    return module(**batch) if by_name else module(*batch.values())


def few_samples(example: Mapping[str, Tensor], count: int = FRACTION_OF_A_BATCH) -> dict[str, Tensor]:
    """The first samples of a batch."""
    return {name: tensor[:count] if tensor.dim() else tensor for name, tensor in example.items()}


class Recorder(TorchDispatchMode):  # type: ignore[misc]
    """Propagates labels through every operation that runs under it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing here is compiled, and the guard that True asks for imports all of dynamo (seconds)."""
        return False

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.space = LabelSpace()
        self.values: dict[int, tuple[Tensor, Value]] = {}  # the tensor is held so that its id stays its own
        stored = module.state_dict(keep_vars=True)  # other buffers (rotary frequencies) are computed, not learnt: fixed
        for name, tensor in named_tensors(module):
            if name in stored and id(tensor) not in self.values and tensor.is_floating_point():
                self._remember(tensor, self._source(name, tensor))

    def _source(self, name: str, tensor: Tensor) -> Value:
        layers = []
        for axis, size in enumerate(tensor.shape):
            shape = [size if other == axis else 1 for other in range(tensor.dim())]
            layers.append(self.space.allocate(size, Key(name, axis)).reshape(shape))
        return Value([layer for layer in layers if axes_of(layer)], param=True)

    def _remember(self, tensor: Tensor, value: Value) -> None:
        self.values[id(tensor)] = (tensor, value)

    def value(self, tensor: Tensor) -> Value:
        known = self.values.get(id(tensor))
        return known[1] if known is not None else Value()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func._schema.name in CONSTANTS:  # of one value: as many of it as are wanted
            self._remember(output, Value(free=frozenset(range(output.dim()))))
            return output
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(self.value(tensor).layers or self.value(tensor).free for tensor in tensors) or _expands(func):
            self._propagate(func, args, kwargs or {}, output)
        return output

    def _propagate(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        call = Call(name, func, args, kwargs, output, self.space, self.value)
        rule = RULES.get(name) or RULES.get(name.removesuffix("_")) or default_rule(func)
        results = rule(call)
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        for tensor, value in zip(outputs, results, strict=False):
            self._remember(tensor, value)
        if name.endswith("_") and results:
            self._remember(args[0], results[0])


def _expands(func: Any) -> bool:
    return bool(func._schema.name == "aten::expand")


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, with every name that a shared tensor has."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def record(module: nn.Module, example: Mapping[str, Tensor]) -> LabelSpace:
    """Labels of all parameters of ``module``, joined as one forward pass on a few samples of ``example`` joins them."""
    with evaluating(module):
        recorder = Recorder(module)
        with recorder:
            output = run(module, few_samples(example))
        leaves = [leaf for leaf in tree_leaves(_plain(output)) if isinstance(leaf, Tensor)]
        recorder.space.freeze_all([recorder.value(leaf) for leaf in leaves], "is the model's output")
    recorder.space.settle_grids()
    return recorder.space


def _plain(output: Any) -> Any:
    """Model outputs of transformers are mappings; anything else is what it is."""
    return list(output.values()) if isinstance(output, Mapping) else output
