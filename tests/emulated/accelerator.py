"""An accelerator that this machine does not have: its tensors live in CPU memory and behave as if
they did not.

They say device ``emu:0`` (or ``emu:1``), refuse operators with tensors of another device, may
refuse float64 as Apple's MPS does, run out of memory when told how much there is, and every wait of
the host for the device is counted with the place in the code that waited.

A wrapper subclass carries the operators out on its ``raw`` CPU tensor, and the kernels that make
tensors on the device make such wrappers. A device, once registered, stays for the life of the
process: never import this where ordinary tests run (``inside/`` is a pytest run of its own).
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.autograd.grad_mode import inference_mode
from torch.utils import backend_registration
from transformers import PreTrainedModel

NAME = "emu"
HOST = torch.device("cpu")
_WIDE = (torch.float64, torch.complex128)
# Where the code that waited is looked for.
_PACKAGES = ("abliterate", "transformers", "accelerate")


@dataclass(frozen=True)
class Wait:
    """A transfer between host and device, or a result whose size only the device knows.

    Attributes:
        kind: ``down`` to the host, ``up`` to the device, ``size``.
        package: whose code it was.
        where: module and function.
        operator: by which operator.
    """

    kind: str
    package: str
    where: str
    operator: str


@dataclass(frozen=True)
class Made:
    """Memory that an operator took on the device.

    Attributes:
        package: whose code it was.
        where: module and function.
        operator: which operator.
        dtype: of the tensor.
        numel: of how many numbers.
    """

    package: str
    where: str
    operator: str
    dtype: torch.dtype
    numel: int


@dataclass
class State:
    """What the accelerator is at the moment.

    Attributes:
        active: whether there is one.
        devices: how many.
        float64: whether it has float64 and complex128.
        memory: bytes of each device, or None without bound.
        used: bytes taken, by device.
        peak: the largest of them so far.
        waits: what the host waited for.
        refused: how often memory ran out.
        forwards: passes through whole models.
        pinned: bytes that went up from pinned memory without a wait.
        pageable: bytes that went up otherwise.
        made: what was allocated, while somebody listens.
    """

    active: bool = False
    devices: int = 1
    float64: bool = True
    memory: int | None = None
    used: Counter[int] = field(default_factory=Counter)
    peak: int = 0
    waits: Counter[Wait] = field(default_factory=Counter)
    refused: int = 0
    forwards: int = 0
    pinned: int = 0
    pageable: int = 0
    made: list[Made] | None = None

    def synchronisations(self, package: str | None = None, where: str = "") -> int:
        """How often the host waited for the device in the code of a package.

        What goes up from memory that is not pinned counts: CUDA waits for it.
        """
        return sum(
            count
            for wait, count in self.waits.items()
            if package in (None, wait.package) and where in wait.where
        )


STATE = State()
# By device and storage: how many tensors show it, and its bytes.
_held: dict[tuple[int, int], list[int]] = {}


class _Module:
    """``torch.emu``, what ``torch.cuda`` is to CUDA."""

    def is_available(self) -> bool:
        return STATE.active

    def device_count(self) -> int:
        return STATE.devices if STATE.active else 0

    def current_device(self) -> int:
        return 0

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...

    def manual_seed(self, seed: int) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def set_device(self, device: Any) -> None: ...

    def get_rng_state(self, device: Any = 0) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = 0) -> None: ...

    def memory_allocated(self, device: Any = None) -> int:
        return STATE.used[_index(torch.device(device or NAME))]

    def memory_reserved(self, device: Any = None) -> int:
        return self.memory_allocated(device)

    def max_memory_allocated(self, device: Any = None) -> int:
        return STATE.peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        STATE.peak = self.memory_allocated(device)

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        most = STATE.memory or 1 << 40
        return most - STATE.used[_index(torch.device(device or NAME))], most


backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())


class Emulated(torch.Tensor):
    """A tensor of the device; ``raw`` is the CPU tensor that it stands for, ``at`` the device's
    index."""

    raw: torch.Tensor
    at: int
    hold: _Hold

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.device}({self.raw})"

    def tolist(self) -> Any:
        _waited("down", "tolist")
        return self.raw.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy "
            "the tensor to host memory first."
        )

    __array__ = numpy

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def set_(self, *source: Any) -> Emulated:  # type: ignore[override]
        raws = [one.raw if isinstance(one, Emulated) else one for one in source]
        return _emulated(torch.empty(0, dtype=self.dtype).set_(*raws), self.at)


_DEVICES = [torch.device(NAME, index) for index in range(8)]
_make = torch.Tensor._make_wrapper_subclass


def _emulated(raw: torch.Tensor, at: int) -> Emulated:
    """What shows a CPU tensor as one of the device."""
    made = _make(
        Emulated,
        raw.shape,
        strides=raw.stride(),
        storage_offset=raw.storage_offset(),
        dtype=raw.dtype,
        device=_DEVICES[at],
        requires_grad=raw.requires_grad,
    )
    made.raw = raw
    made.at = at
    return made


def _index(device: torch.device) -> int:
    return device.index or 0


def _caller() -> tuple[str, str]:
    """The innermost code of this project or of what it calls: package, module and function."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        package = module.partition(".")[0]
        if package in _PACKAGES:
            return package, f"{module}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "", ""


def _waited(kind: str, operator: str) -> None:
    """Count a wait, for the code that waited."""
    package, where = _caller()
    STATE.waits[Wait(kind, package, where, operator)] += 1


def _went_up(source: torch.Tensor, name: str, non_blocking: bool) -> None:
    """Count a transfer to the device, which is waited for unless it comes from pinned memory."""
    if non_blocking and id(source) in _pinned:
        STATE.pinned += source.nbytes
    else:
        STATE.pageable += source.nbytes
        _waited("up", name)


def _note_made(name: str, out: Any, raws: Iterable[torch.Tensor]) -> None:
    """Note the tensors that an operator gives and that are neither its arguments nor views."""
    assert STATE.made is not None
    known = {raw.untyped_storage()._cdata for raw in raws}
    for tensor in out if isinstance(out, tuple | list) else (out,):
        if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
            STATE.made.append(Made(*_caller(), name, tensor.dtype, tensor.numel()))


# Operators that move between devices, or that ask of two tensors what needs no values.
_CROSSING = {
    "_to_copy", "to", "type_as", "copy_", "copy", "_copy_from", "_copy_from_and_resize",
    "_has_compatible_shallow_copy_type",
}  # fmt: skip
_TO_HOST = {"_local_scalar_dense", "item", "is_nonzero", "equal"}
# What they give is as large as the values say.
_SIZED = {
    "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
}  # fmt: skip
# They would change what the wrapper says of its raw tensor.
_RESHAPING = {"resize_", "t_", "transpose_", "squeeze_", "unsqueeze_", "as_strided_", "swapaxes_"}


# Masks may choose in them, or the CPU has them otherwise.
_LOOKED_AT = {"index", "index_put_", "index_put", "_unsafe_index", "histc"}
_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.layout, torch.memory_format}
# Operators of which nothing needs to be known but that their tensors lie on one device, and what
# carries them out.
_ordinary: dict[Any, Any] = {}


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Carry an operator out on the CPU, as the device would or would not have.

    Every operator of a model comes here: the short way is for those that need no looking at.
    """
    try:
        kernel = _ordinary[func]
    except KeyError:
        name = func._schema.name.rpartition("::")[2]
        special = name in _CROSSING | _TO_HOST | _SIZED | _RESHAPING | _LOOKED_AT
        kernel = _ordinary[func] = None if special else func._op
    if kernel is None:
        return _run_with_care(func, args, kwargs)
    seen: list[Emulated] = []
    plain: list[Any] = []
    for arg in (*args, *kwargs.values()) if kwargs else args:
        kind = type(arg)
        if kind is Emulated:
            seen.append(arg)
            plain.append(arg.raw)
        elif kind in _PLAIN:
            plain.append(arg)
        elif kind is list or kind is tuple:
            inner = []
            for one in arg:
                kind = type(one)
                if kind is Emulated:
                    seen.append(one)
                    inner.append(one.raw)
                elif kind in _PLAIN:
                    inner.append(one)
                else:
                    return _run_with_care(func, args, kwargs)
            plain.append(inner)
        else:  # a tensor of another device, a device
            return _run_with_care(func, args, kwargs)
    if not seen or "pin_memory" in kwargs:
        return _run_with_care(func, args, kwargs)
    at = seen[0].at
    for one in seen:
        if one.at != at:
            return _run_with_care(func, args, kwargs)
    if kwargs:
        out = kernel(*plain[: len(args)], **dict(zip(kwargs, plain[len(args) :], strict=True)))
    else:
        out = kernel(*plain)
    if STATE.made is not None:
        _note_made(func._schema.name.rpartition("::")[2], out, [one.raw for one in seen])
    if type(out) is torch.Tensor:
        for one in seen:
            if one.raw is out:  # what was changed in place
                return one
        return _new(out, at)
    return _wrap(out, at, {id(one.raw): one for one in seen})


def _run_with_care(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same for operators that move, wait, choose or must be refused."""
    name = func._schema.name.rpartition("::")[2]
    homes: set[int] = set()
    wrapped: dict[int, Emulated] = {}
    foreign = device = None

    def strip(value: Any) -> Any:
        nonlocal foreign, device
        if type(value) in _PLAIN:
            return value
        if isinstance(value, Emulated):
            homes.add(value.at)
            wrapped[id(value.raw)] = value
            return value.raw
        if isinstance(value, torch.Tensor):
            if value.ndim and value.numel() and value.device.type == "cpu":
                foreign = value
            return value
        if isinstance(value, torch.device):
            device = value
            return HOST if value.type == NAME else value
        if type(value) in (list, tuple):
            return type(value)(map(strip, value))  # noqa: F821 - it is deleted below
        return value

    plain = [strip(arg) for arg in args]
    named = {key: strip(arg) for key, arg in kwargs.items() if key != "pin_memory"}
    del strip  # it refers to itself, and would keep the tensors until the next collection
    on_device = device is not None and device.type == NAME
    if on_device:
        _existing(device)
    if ((homes and foreign is not None) or len(homes) > 1) and name not in _CROSSING:
        places = ", ".join([f"{NAME}:{i}" for i in sorted(homes)] + ["cpu"] * (foreign is not None))
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{places}! ({func})"
        )
    if homes and name in _RESHAPING:
        raise NotImplementedError(f"{func} of a tensor on {NAME}")
    home: int | None
    if name in ("copy_", "_copy_from"):
        goal = args[0] if name == "copy_" else args[1]
        home = goal.at if isinstance(goal, Emulated) else None
    elif device is not None:
        home = _index(device) if on_device else None
    else:
        home = min(homes, default=None)
    if homes and device is not None and not on_device and device.type == "cpu":
        _refuse_wide(kwargs.get("dtype"))  # the cast would run on the device
    if homes and (name in _TO_HOST or home is None):
        _waited("down", name)
    elif foreign is not None and home is not None:
        _went_up(foreign, name, bool(named.get("non_blocking") or (plain[2:] and plain[2])))
    elif homes and (name in _SIZED or _chosen_by_mask(name, plain)):
        _waited("size", name)
    if name == "histc" and homes and not plain[0].is_floating_point():
        # Accelerators count whole numbers, a CPU does not.
        counts = func(plain[0].double(), *plain[1:], **named)
        return _wrap(counts.to(plain[0].dtype), min(homes), {})
    out = func(*plain, **named)
    if home is None:
        return out
    if STATE.made is not None:
        _note_made(name, out, [one.raw for one in wrapped.values()])
    return _wrap(out, home, wrapped)


def _chosen_by_mask(name: str, args: list[Any]) -> bool:
    if name not in ("index", "index_put_", "index_put", "_unsafe_index") or len(args) < 2:
        return False
    return any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])


def _wrap(value: Any, index: int, wrapped: dict[int, Emulated]) -> Any:
    if isinstance(value, torch.Tensor) and not isinstance(value, Emulated):
        if id(value) in wrapped:  # what was changed in place
            return wrapped[id(value)]
        return _new(value, index)
    if type(value) in (list, tuple):
        return type(value)(_wrap(one, index, wrapped) for one in value)
    return value


def _new(raw: torch.Tensor, index: int) -> Emulated:
    if not STATE.float64:
        _refuse_wide(raw.dtype)
    if STATE.memory is None:
        return _emulated(raw, index)
    storage = raw.untyped_storage()
    key, size = (index, storage._cdata), storage.nbytes()
    if key not in _held:
        if STATE.used[index] + size > STATE.memory:
            STATE.refused += 1
            raise torch.OutOfMemoryError(
                f"{NAME} out of memory. Tried to allocate {size} bytes: {STATE.used[index]} of "
                f"{STATE.memory} are in use."
            )
        STATE.used[index] += size
        STATE.peak = max(STATE.peak, STATE.used[index])
        _held[key] = [0, size]
    _held[key][0] += 1
    made = _emulated(raw, index)
    made.hold = _Hold(key, STATE.used)
    return made


class _Hold:
    """What a tensor takes of its device, until it is gone."""

    __slots__ = ("key", "used")

    def __init__(self, key: tuple[int, int], used: Counter[int]) -> None:
        self.key, self.used = key, used

    def __del__(self) -> None:
        if self.key in _held:
            _held[self.key][0] -= 1
            if not _held[self.key][0]:
                self.used[self.key[0]] -= _held.pop(self.key)[1]


def _refuse_wide(dtype: torch.dtype | None) -> None:
    if dtype in _WIDE and not STATE.float64:
        raise TypeError(
            f"Cannot convert a {NAME} Tensor to {dtype} dtype as the {NAME} framework doesn't "
            "support float64. Please use float32 instead."
        )


# What makes tensors on the device: all else of the kind ends in these.
_LIBRARY = torch.library.Library("aten", "IMPL")


def _existing(device: Any) -> int:
    index = _index(torch.device(device))
    if not STATE.active or index >= STATE.devices:
        raise RuntimeError(f"{NAME} error: invalid device ordinal")
    return index


def _empty_strided(
    size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None,
    pin_memory: Any = None,
) -> Emulated:  # fmt: skip
    return _new(torch.empty_strided(size, stride, dtype=dtype), _existing(device))


def _empty(
    size: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
    memory_format: Any = None,
) -> Emulated:  # fmt: skip
    return _new(torch.empty(size, dtype=dtype), _existing(device))


def _copy_from(source: Any, goal: Any, non_blocking: bool = False) -> Any:
    up, down = not isinstance(source, Emulated), not isinstance(goal, Emulated)
    if up and source.numel():
        _went_up(source, "_copy_from", non_blocking)
    elif down and source.numel():
        _waited("down", "_copy_from")
    (goal if down else goal.raw).copy_(source if up else source.raw)
    return goal


_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
_LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
_LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")


def _whole(operator: Any) -> Any:
    return lambda *args, **kwargs: _run(operator, args, kwargs)


# They would come here in many parts, each of which takes its time; a device has a kernel for each.
# Their gradients are lost: nothing in this project takes any on a device.
for _operator in (
    torch.ops.aten.linear.default,
    torch.ops.aten.matmul.default,
    torch.ops.aten.scaled_dot_product_attention.default,
):
    _LIBRARY.impl(_operator, _whole(_operator), "AutogradPrivateUse1")


def snapshot(state: State) -> State:
    """A copy that the next accelerator does not reset."""
    return replace(state, used=state.used.copy(), waits=state.waits.copy())


@contextlib.contextmanager
def accelerator(
    float64: bool = True, devices: int = 1, memory: int | None = None
) -> Iterator[State]:
    """Within the context the machine has the accelerator.

    Args:
        float64: whether it has float64, as CUDA, or not, as Apple's MPS.
        devices: how many of it.
        memory: bytes of each.
    """
    fresh = State(True, devices, float64, memory)
    STATE.__dict__.update(fresh.__dict__)
    _held.clear()
    patched: dict[tuple[Any, str], Any] = {
        (torch.accelerator, "current_accelerator"): lambda check_available=False: torch.device(
            NAME
        ),
        (torch.accelerator, "device_count"): lambda: devices,
        (torch.accelerator, "is_available"): lambda: True,
        (torch.accelerator, "synchronize"): lambda *_: None,
        (inference_mode, "__enter__"): _without_gradients,
        (inference_mode, "__exit__"): _as_before,
        (PreTrainedModel, "__call__"): _counted_call,
        (torch.Tensor, "pin_memory"): _pin_memory,
    }
    own = {where: getattr(*where) for where in patched}
    try:
        for (owner, name), value in patched.items():
            setattr(owner, name, value)
        yield STATE
    finally:
        for (owner, name), value in own.items():
            setattr(owner, name, value)
        STATE.active = False


# Tensors in pinned memory, as long as they live.
_pinned: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()


def _pin_memory(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    if isinstance(tensor, Emulated):
        raise RuntimeError(f"cannot pin '{tensor.device}': only dense CPU tensors can be pinned")
    pinned = tensor.contiguous().clone()
    _pinned[id(pinned)] = pinned
    return pinned


_plain_call = PreTrainedModel.__call__


def _counted_call(model: Any, *args: Any, **kwargs: Any) -> Any:
    """A pass through a model that gives logits; its decoder is one too, and is not counted."""
    STATE.forwards += model.get_output_embeddings() is not None
    return _plain_call(model, *args, **kwargs)


# Wrapper subclasses and inference mode do not go together; gradients are off all the same.
def _without_gradients(self: Any) -> None:
    self._before = torch.is_grad_enabled()
    torch.set_grad_enabled(not self.mode)


def _as_before(self: Any, *_: Any) -> None:
    torch.set_grad_enabled(self._before)
