"""A direction set on a model: which direction each writer and each hook takes.

Block ``l`` takes row ``l`` for what it writes; what lies outside of the blocks takes the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from abliterate.direction_set import DirectionSet
from abliterate.errors import UnsupportedArchitectureError
from abliterate.precision import widest
from abliterate.writers import WriterPlan, block_of, find_writers, stream_width
from abliterate.writers.op_trace import elements_of
from abliterate.writers.parameter_names import parameter_aliases
from abliterate.writers.residual_stream import largest


@dataclass(frozen=True)
class LayerUnits:
    """Unit directions by layer.

    Attributes:
        rows: ``[1 + n_layers, d_model]``, that of what lies outside of the blocks first; a zero row
            where there is none.
        blocks: names of the decoder blocks.
    """

    rows: Tensor
    blocks: tuple[str, ...]
    _there: tuple[bool, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_there", tuple(self.rows.any(dim=1).tolist()))

    def of(self, layer: int | None) -> Tensor | None:
        """The direction ``[d_model]`` of a block, or outside of them; None: it has none."""
        row = 0 if layer is None else 1 + layer
        return self.rows[row] if self._there[row] else None

    def of_module(self, name: str) -> Tensor | None:
        """The same, of a module or parameter."""
        return self.of(block_of(name, self.blocks))

    def scaled(self, factor: float) -> LayerUnits:
        return LayerUnits(self.rows * factor, self.blocks)


def layer_units(model: PreTrainedModel, plan: WriterPlan, directions: DirectionSet) -> LayerUnits:
    """The directions of a set for a model.

    Args:
        model: with or without its weights.
        plan: its writers, by its own names.
        directions: the set.

    Raises:
        InputError: it does not fit.
        UnsupportedArchitectureError: a parameter belongs to several layers that have different
            directions.
    """
    units = LayerUnits(directions.units(len(plan.blocks), stream_width(model, plan)), plan.blocks)
    names: dict[str, list[str]] = {}
    for name, first in parameter_aliases(model).items():
        names.setdefault(first, []).append(name)
    for writer in plan.writers:
        layers = {block_of(name, plan.blocks) for name in names.get(writer.parameter, ())}
        inside = sorted(layer for layer in layers if layer is not None)
        if len(inside) > 1 and not _same([units.of(layer) for layer in inside]):
            held = ", ".join(map(str, inside[:-1])) + f" and {inside[-1]}"
            raise UnsupportedArchitectureError(
                f"{writer.parameter} is one tensor of layers {held}, whose directions differ: give "
                "a set in which these layers have the same direction, or one direction for all"
            )
    return units


def _same(vectors: Sequence[Tensor | None]) -> bool:
    if any(vector is None for vector in vectors):
        return all(vector is None for vector in vectors)
    first, *others = (vector for vector in vectors if vector is not None)
    return all(torch.equal(first, other) for other in others)


def check_sites(model: PreTrainedModel, plan: WriterPlan) -> None:
    """Refuse a model in which ``ablate`` acts on the stream itself.

    Projected there, block ``l`` would also lose what earlier blocks wrote along its direction,
    which with one direction for all is nothing.

    Raises:
        UnsupportedArchitectureError: it is such a model.
    """
    for site in plan.sites:
        if site.at == "input" or site.module in plan.blocks:
            raise UnsupportedArchitectureError(
                f"architecture '{model.config.model_type}' writes terms that are no module's "
                f"output ({site.module}): only one direction for all layers can be ablated"
            )


@contextmanager
def watching_shares(model: PreTrainedModel, units: LayerUnits) -> Iterator[list[Tensor]]:
    """Within the context, what each term that is added to the stream has along its own direction.

    Yields:
        A list that grows with each term: its largest ``|c . r|`` over tokens, in units of its
        largest ``||c||``.

    Raises:
        UnsupportedArchitectureError: terms are no module's output.
    """
    plan = find_writers(model)
    check_sites(model, plan)
    seen: list[Tensor] = []

    def watch(index: int, unit: Tensor) -> Callable[..., None]:
        def measure(module: nn.Module, args: Any, output: Any) -> None:
            term = elements_of(output)[index]
            if term is None:
                return
            wide = term.detach().to(widest(term.device)).reshape(-1, unit.shape[0])
            along = (wide @ unit.to(wide)).abs().max()
            seen.append(along / wide.norm(dim=-1).max().clamp_min(1e-30))

        return measure

    with ExitStack() as stack:
        for site in plan.sites:
            unit = units.of_module(site.module)
            if unit is not None:
                module = model.get_submodule(site.module)
                stack.callback(module.register_forward_hook(watch(site.index, unit)).remove)
        yield seen


def leak_by_layer(model: PreTrainedModel, units: LayerUnits, input_ids: Tensor) -> float:
    """The largest of :func:`watching_shares` on token ids ``[batch, tokens]``."""
    with watching_shares(model, units) as seen, torch.no_grad():
        model(input_ids=input_ids, use_cache=False)
    return largest(seen) if seen else 0.0
