"""The two interventions of the paper as context managers (section 2.4).

``ablate``: ``c <- c - (c . r) r`` for every component output ``c`` written to the residual stream,
at every token and layer. ``add``: ``h[l] <- h[l] + a * r`` at the input of one block, all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from abliterate.direction_set import DirectionSet
from abliterate.errors import InputError, UnsupportedArchitectureError, UsageError
from abliterate.inference.forward import block_input
from abliterate.inference.layer_directions import LayerUnits, check_sites, layer_units
from abliterate.inference.replayable_hooks import replayable
from abliterate.models.device_placement import to_device
from abliterate.writers import HookPoint, decoder_blocks, find_writers, stream_width


def unit_direction(direction: Tensor, width: int) -> Tensor:
    """``direction`` divided by its norm, float64 ``[d_model]``.

    Raises:
        InputError: it has another size than ``width``, is zero or is not finite.
    """
    checked = check_direction(direction, width)
    unit: Tensor = checked / checked.norm()
    return unit


def check_direction(direction: Tensor, width: int) -> Tensor:
    """``direction`` as float64 ``[d_model]``; raises as :func:`unit_direction` does."""
    if not isinstance(direction, Tensor) or direction.is_complex():
        raise InputError(
            f"the direction must be a tensor of {width} real numbers, not {_named(direction)}"
        )
    if direction.shape != (width,):
        raise InputError(
            f"the direction has shape {list(direction.shape)}, the model needs [{width}]: it was "
            "made for another model"
        )
    wide = direction.detach().cpu().double()
    if not bool(torch.isfinite(wide).all()):
        raise InputError("the direction holds NaN or infinity")
    if float(wide.norm()) == 0.0:
        raise InputError("the direction is zero")
    return wide


def _named(value: Any) -> str:
    return f"{value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def ablation_units(model: PreTrainedModel, direction: Tensor | DirectionSet) -> Tensor | LayerUnits:
    """What ``ablate`` projects out: the unit direction, or that of each layer.

    Raises:
        InputError: the direction does not fit.
        UnsupportedArchitectureError: the model's writers are not known, or a set cannot be ablated.
    """
    plan = find_writers(model)
    if isinstance(direction, Tensor) and direction.ndim == 2:
        direction = DirectionSet(direction)
    if isinstance(direction, DirectionSet):
        check_sites(model, plan)
        return layer_units(model, plan, direction)
    return unit_direction(direction, stream_width(model, plan))


@contextmanager
def ablate(
    model: PreTrainedModel,
    direction: Tensor | DirectionSet,
    scale: float = 1.0,
    layers: Collection[int] | None = None,
) -> Iterator[None]:
    """Within the context, no component of ``model`` writes along ``direction``.

    Args:
        model: any supported causal language model.
        direction: ``[d_model]``, of any length but zero; or one for each block, a set or
            ``[n_layers, d_model]``: what block ``l`` writes loses row ``l``, what is written before
            the first block loses the first.
        scale: ``s`` of ``c <- c - s (c . r) r``, 0 to 1: 1 removes all, 0.5 half of it.
        layers: the blocks whose components are ablated; None for all, and for what writes outside
            the blocks too (embeddings).

    Raises:
        InputError: the direction does not fit, or there is no such layer.
        UnsupportedArchitectureError: the model's writers are not known, or it is to lose a part
            of the direction, one for each layer or in some layers, where the stream itself is
            projected, block after block.
        UsageError: the scale is not between 0 and 1.
    """
    plan = find_writers(model)
    units = ablation_units(model, direction)
    if not _is_number(scale) or not 0 <= scale <= 1:
        raise UsageError(f"the share to ablate must lie between 0 and 1, not {scale}")
    sites = plan.sites
    if layers is not None:
        chosen = {check_layer(layer, len(plan.blocks)) for layer in layers}
        if not chosen:
            raise InputError("no layers are given: give at least one, or None for all")
        sites = tuple(site for site in plan.sites if site.layer in chosen)
    in_parts = scale not in (0, 1) or layers is not None
    if in_parts and any(site.at == "input" for site in plan.sites):
        raise UnsupportedArchitectureError(
            f"architecture '{model.config.model_type}' writes terms that are no module's output: "
            "only the whole direction can be ablated, in all layers"
        )
    # c - (c . u) u with u = sqrt(s) r is c - s (c . r) r.
    share = math.sqrt(scale)
    shortened = units.scaled(share) if isinstance(units, LayerUnits) else units * share
    with ablate_at(model, shortened, sites if scale else ()):
        yield


Units = Tensor | LayerUnits


def check_layer(layer: Any, n_layers: int) -> int:
    """``layer``, which must be one of the model's.

    Raises:
        InputError: it is none.
    """
    if isinstance(layer, bool) or not isinstance(layer, Integral) or not 0 <= int(layer) < n_layers:
        if layer is None:
            raise InputError(
                "the direction does not record its own layer: name one of the model's layers 0 to "
                f"{n_layers - 1}"
            )
        raise InputError(
            f"layer {layer!r} does not exist: the model has layers 0 to {n_layers - 1}"
        )
    return int(layer)


@contextmanager
def ablate_at(
    model: PreTrainedModel, units: Units | Callable[[], Units | None], sites: Sequence[HookPoint]
) -> Iterator[None]:
    """Project unit directions out of what passes ``sites``.

    Args:
        model: the model.
        units: ``[d_model]`` for all rows of a batch, ``[batch, d_model]``, one for each, or one for
            each layer; or what gives those of the batch that is running, None to leave it alone.
        sites: the sites of ``find_writers(model)``.
    """
    with AblationSites(model, sites).under(units):
        yield


class AblationSites:
    """Where a model is ablated: modules and their hooks, made once for many passes.

    Args:
        model: the model.
        sites: some of those of ``find_writers(model)``.
    """

    def __init__(self, model: PreTrainedModel, sites: Sequence[HookPoint]) -> None:
        self._model = model
        self._width: int | None = None
        self._units: Units | Callable[[], Units | None] | None = None
        # Moved once for each device: the hooks then stay there and in the dtype of their modules.
        self._moved: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._hooks: list[tuple[nn.Module, bool, Callable[..., Any]]] = []
        for site in sites:
            ablated = partial(self._ablated, site.module)
            leaves = site.at == "output"
            hook = (
                _output_hook(ablated, site.index)
                if leaves
                else _input_hook(ablated, lambda: self._stream_width)
            )
            self._hooks.append((model.get_submodule(site.module), leaves, hook))

    @contextmanager
    def under(self, units: Units | Callable[[], Units | None]) -> Iterator[None]:
        """Project ``units`` out of what passes; see :func:`ablate_at`. One at a time."""
        assert self._units is None
        self._units = units
        try:
            with ExitStack() as stack:
                for module, leaves, hook in self._hooks:
                    replayable(hook, holds=not callable(units))
                    if leaves:
                        handle = module.register_forward_hook(hook)
                    else:
                        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
                yield
        finally:
            self._units = None
            self._moved.clear()

    @property
    def _stream_width(self) -> int:
        if isinstance(self._units, Tensor):
            return self._units.shape[-1]
        if self._width is None:
            self._width = stream_width(self._model, find_writers(self._model))
        return self._width

    def _ablated(self, module: str, value: Tensor, inplace: bool = False) -> Tensor:
        units = self._units
        key = "" if isinstance(units, Tensor) else module, value.device, value.dtype
        held = self._moved.get(key)
        if held is not None:
            return project_out(value, held, inplace)
        now = units() if callable(units) else units
        if isinstance(now, LayerUnits):
            now = now.of_module(module)
        if now is None:
            return value
        here = to_device(now.to(value.dtype), value.device)
        if not callable(units):
            self._moved[key] = here
        return project_out(value, here, inplace)


@contextmanager
def add(
    model: PreTrainedModel, direction: Tensor, layer: int, coeff: float = 1.0
) -> Iterator[None]:
    """Within the context, ``coeff * direction`` is added to ``resid_pre`` of ``layer``.

    Args:
        model: any causal language model.
        direction: ``[d_model]``, used as it is (not normalised).
        layer: the block whose input it is added to, at every token.
        coeff: +1 induces refusal with a refusal direction, -1 suppresses it.

    Raises:
        InputError: the direction does not fit or there is no such layer.
        UsageError: the coefficient is not a finite number.
    """
    checked = check_direction(direction, stream_width(model, find_writers(model)))
    blocks = decoder_blocks(model)
    check_layer(layer, len(blocks))
    if not _is_number(coeff):
        raise UsageError(f"the coefficient must be a finite number, not {coeff!r}")
    vector = coeff * checked
    if not bool(torch.isfinite(vector.to(model.dtype)).all()):
        raise UsageError(f"{coeff:g} times the direction is too large for {model.dtype}")
    with add_vectors(blocks[layer], vector):
        yield


@contextmanager
def add_vectors(block: nn.Module, vectors: Tensor) -> Iterator[None]:
    """Add vectors to the residual stream that enters ``block``.

    Args:
        block: a decoder block.
        vectors: ``[d_model]`` for all rows of a batch, or ``[batch, d_model]``, one for each.
    """

    # Moved once for each device, as in :func:`ablate_at`.
    ready: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def shift(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = block_input(args, kwargs)
        key = hidden.device, hidden.dtype
        if key not in ready:
            ready[key] = to_device(vectors.to(key[1]), key[0])
        moved = shifted(hidden, ready[key])
        if args:
            return (moved, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": moved}

    handle = block.register_forward_pre_hook(replayable(shift), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def shifted(hidden: Tensor, vectors: Tensor) -> Tensor:
    """``hidden`` with vectors added to every token, in its device and dtype.

    Args:
        hidden: a residual stream, ``[batch, tokens, d_model]``. Of several parallel streams (side
            by side in the last axis, or on one of their own) each is shifted.
        vectors: ``[d_model]`` for all rows of a batch, or ``[batch, d_model]``, one for each.
    """
    moved: Tensor = hidden + per_row(to_device(vectors.to(hidden.dtype), hidden.device), hidden)
    return moved


def per_row(vectors: Tensor, hidden: Tensor) -> Tensor:
    """Vectors ``[d_model]`` or ``[batch, d_model]`` in a shape that broadcasts over ``hidden``."""
    wide = vectors.repeat(*([1] * (vectors.ndim - 1)), hidden.shape[-1] // vectors.shape[-1])
    if vectors.ndim == 1:
        return wide
    return wide.view(len(wide), *([1] * (hidden.ndim - 2)), wide.shape[-1])


# Modules whose output is a tensor of its own that no one else holds: it may be overwritten.
_FRESH = (nn.Linear, nn.Embedding, Conv1D)


def project_out(written: Tensor, units: Tensor, inplace: bool = False) -> Tensor:
    """``written`` less its component along unit directions, by one rank-1 update.

    Args:
        written: ``[..., d_model]`` (or several streams of that width side by side); with one
            direction per row its first axis is the batch.
        units: ``[d_model]`` or ``[batch, d_model]``, in the device and dtype of ``written``.
        inplace: ``written`` may be overwritten.
    """
    width = units.shape[-1]
    inplace = inplace and not written.requires_grad and written.is_contiguous()
    if units.dim() == 2:
        rows = written.reshape(len(units), -1, width)
        along = torch.bmm(rows, units.unsqueeze(2))
        batched = rows.baddbmm_ if inplace else rows.baddbmm
        return batched(along, units.unsqueeze(1), alpha=-1).view(written.shape)
    flat = written.reshape(-1, width)
    update = flat.addmm_ if inplace else flat.addmm
    return update((flat @ units).unsqueeze(1), units.unsqueeze(0), alpha=-1).view(written.shape)


def _output_hook(ablated: Callable[[Tensor, bool], Tensor], index: int) -> Callable[..., Any]:
    def project(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return ablated(output, isinstance(module, _FRESH))
        if isinstance(output, dict):  # a ModelOutput
            key = list(output)[index]
            output[key] = ablated(output[key], False)
            return output
        items = [ablated(v, False) if i == index else v for i, v in enumerate(output)]
        if hasattr(output, "_fields"):  # a named tuple takes its fields one by one
            return type(output)(*items)
        return items if isinstance(output, list) else tuple(items)

    return project


def _input_hook(
    ablated: Callable[[Tensor, bool], Tensor], width: Callable[[], int]
) -> Callable[..., Any]:
    def is_stream(value: Any) -> bool:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return bool(is_float and value.shape[-1] % width() == 0)

    def project(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for at, value in enumerate(args):
            if is_stream(value):
                return (*args[:at], ablated(value, False), *args[at + 1 :]), kwargs
        for key, value in kwargs.items():
            if is_stream(value):
                return args, kwargs | {key: ablated(value, False)}
        return None

    return project
