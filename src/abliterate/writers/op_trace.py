"""Record one forward pass: every tensor operation, where it ran, and which memory it wrote.

The recorder sits below autograd (``TorchDispatchMode``), where Python, fused helpers, views and
in-place updates have all become a few hundred primitive operations. Memory, not tensor objects, is
what gets tracked: a view needs no rule because it shares its base's storage, and an in-place write
is one more *version* of the storage.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Op:
    """One executed operation: its bare name ("add" for ``aten.add_.Tensor``) and arguments."""

    seq: int
    name: str
    arguments: Mapping[str, Any]
    module: str


@dataclass(frozen=True)
class Write:
    """``op`` wrote ``tensor`` (its output number ``index``); ``inplace`` if it existed before."""

    op: Op
    tensor: Tensor
    index: int
    inplace: bool


@dataclass(frozen=True)
class Call:
    """One call of a module: the tensors in and out, and when (in operations) it began and ended."""

    module: str
    begin: int
    end: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor | None, ...]


def storage_of(tensor: Tensor) -> int:
    """An identity of the memory behind a tensor, unique while the tensor is alive."""
    return int(tensor.untyped_storage()._cdata)


@dataclass
class Trace:
    """What one forward pass did."""

    writes: dict[int, list[Write]] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    seq: int = 0

    def version(self, tensor: Tensor, before: int) -> int:
        """How many times the memory of ``tensor`` had been written before operation ``before``."""
        return bisect_left(self.writes.get(storage_of(tensor), []), before, key=lambda w: w.op.seq)

    def last_write(self, tensor: Tensor, before: int) -> Write | None:
        """The latest write to the memory of ``tensor`` before operation ``before``."""
        version = self.version(tensor, before)
        return self.writes[storage_of(tensor)][version - 1] if version else None


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fills a ``Trace``. Holds every tensor it sees, so that memory addresses stay unique."""

    def __init__(self, trace: Trace, stack: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace
        self.stack = stack

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        schema = _schema(func)
        arguments = {**schema.defaults, **dict(zip(schema.arguments, args, strict=False)), **kwargs}
        op = Op(self.trace.seq, schema.name, arguments, self.stack[-1])
        self.trace.seq += 1
        mutated = [arguments[name] for name in schema.mutated]
        for index, tensor in enumerate(tensors_in(mutated)):
            self._write(Write(op, tensor, index, inplace=True))
        held = {storage_of(tensor) for tensor in tensors_in((args, kwargs))}
        for index, tensor in enumerate(_leaves(out)):
            if isinstance(tensor, Tensor) and storage_of(tensor) not in held:
                self._write(Write(op, tensor, index, inplace=False))
        return out

    def _write(self, write: Write) -> None:
        self.trace.writes.setdefault(storage_of(write.tensor), []).append(write)


@dataclass(frozen=True)
class _Schema:
    """What an operator's schema says, taken out of it once."""

    name: str
    arguments: tuple[str, ...]
    defaults: Mapping[str, Any]
    mutated: tuple[str, ...]


@cache
def _schema(operator: Any) -> _Schema:
    schema = operator._schema
    found = schema.arguments
    return _Schema(
        name=schema.name.split("::")[-1].rstrip("_"),
        arguments=tuple(a.name for a in found),
        defaults={a.name: a.default_value for a in found if a.has_default_value()},
        mutated=tuple(a.name for a in found if a.alias_info is not None and a.alias_info.is_write),
    )


def _leaves(value: Any) -> Iterator[Any]:
    """As ``tree_leaves``, which takes long to find out what plain containers are."""
    kind = type(value)
    if kind is tuple or kind is list:
        for each in value:
            yield from _leaves(each)
    elif kind is dict:
        for each in value.values():
            yield from _leaves(each)
    elif value is None or isinstance(value, Tensor | int | float | str):
        yield value
    else:  # whatever has been registered
        yield from tree_leaves(value)


def tensors_in(value: Any) -> tuple[Tensor, ...]:
    """The tensors in nested arguments, in order, looking into tuples, lists, dicts and outputs."""
    return tuple(t for t in _leaves(value) if isinstance(t, Tensor))


def elements_of(output: Any) -> tuple[Tensor | None, ...]:
    """A module's output as the elements that a hook can address: a tensor is element 0."""
    if isinstance(output, Tensor):
        return (output,)
    if isinstance(output, Mapping):  # ModelOutput: not what a block returns, but never mind
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        return tuple(t if isinstance(t, Tensor) else None for t in output)
    return ()


@contextmanager
def _watch_modules(model: nn.Module, trace: Trace, stack: list[str]) -> Iterator[None]:
    begins: list[int] = []

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            stack.append(name)
            begins.append(trace.seq)

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            stack.pop()
            inputs = tensors_in((args, kwargs))
            call = Call(name, begins.pop(), trace.seq, inputs, elements_of(output))
            trace.calls.append(call)

        return hook

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record(model: nn.Module, input_ids: Tensor) -> Trace:
    """Run the model once on ``input_ids`` ``[batch, tokens]`` and return what it did.

    It runs in evaluation mode (dropout would be a gate) and is left in the mode that it was in.
    """
    trace, stack = Trace(), [""]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Not inference_mode: there, composite operations such as linear arrive undecomposed.
        with torch.no_grad(), _watch_modules(model, trace, stack), Recorder(trace, stack):
            model(input_ids=input_ids, use_cache=False)
    finally:
        for module in training:
            module.training = True
    return trace
