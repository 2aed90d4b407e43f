"""``W <- W - r r^T W`` on a model in memory (paper, section 2.4, equation 5), and its undoing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from abliterate.checkpoints.quantized_formats import plain_config
from abliterate.editing.edit_plan import require_exact
from abliterate.editing.edited_tensor import EditedTensor
from abliterate.editing.tied_embeddings import tied_head, untie_config
from abliterate.errors import PlanError, UnsupportedArchitectureError, UsageError
from abliterate.inference.interventions import unit_direction
from abliterate.models.quantized_loading import is_quantized
from abliterate.precision import widest
from abliterate.writers import Proof, Writer, WriterPlan, find_writers, proof_of, stream_width
from abliterate.writers.discovery import orthonormal, writer_direction
from abliterate.writers.residual_stream import leak

# What rounding leaves of a direction in a forward pass: 1e-5 in float32 and wider, more in half
# precision, where the activations themselves are rounded along it.
_ROUNDING, _ROUNDING_HALF = 1e-5, 2e-2
# What undoes the edits of a model, the latest last; of an edit that nobody holds, nothing.
_in_force: WeakKeyDictionary[PreTrainedModel, list[ref[ExitStack]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class InMemoryEdit:
    """What was edited in a model, and how to undo it.

    Attributes:
        tensors: every edited parameter, by its name in the model.
        leak: largest ``|h . r| / ||h||`` over block boundaries and tokens, after the edit.
        leak_before: the same before it.
        proof: that the writers are all, on a small random copy; None where none can be built and
            the model itself was measured.
        restore: puts every parameter back, bit for bit.
    """

    tensors: tuple[EditedTensor, ...]
    leak: float
    leak_before: float
    proof: Proof | None
    restore: Callable[[], None] = field(repr=False)


def orthogonalize_in_memory(
    model: PreTrainedModel, direction: Tensor, allow_leak: float | None = None
) -> InMemoryEdit:
    """Project a direction out of every parameter that writes to the stream, in place.

    A tied output head keeps the original matrix: it reads the stream.

    Args:
        model: whose weights are in memory, in a float dtype.
        direction: ``[d_model]``, of any length but zero.
        allow_leak: accept an architecture that no edit makes exact, if no more than this share of
            the stream remains along the direction.

    Raises:
        InputError: the direction does not fit.
        PlanError: more is left along the direction than rounding; nothing is changed then.
        UnsupportedArchitectureError: the writers cannot be found or made exact.
        UsageError: the weights are quantised, or not in memory.
    """
    if is_quantized(model):
        raise UsageError("quantised weights cannot be edited in memory: edit the files")
    plan = find_writers(model)
    unit = unit_direction(direction, stream_width(model, plan))
    if any(model.get_parameter(writer.parameter).is_meta for writer in plan.writers):
        raise UsageError("some weights are not in memory: load the model whole, or edit the files")
    proof = _proof(model, allow_leak)
    ids = _tokens(model)
    before = leak(model, unit, ids, plan.blocks)
    with ExitStack() as undo:
        _untie(model, undo)
        tensors = _project(model, plan, unit, undo)
        after = leak(model, unit, ids, plan.blocks)
        allowed = _ROUNDING if model.dtype.itemsize >= 4 else _ROUNDING_HALF
        if not after <= max(allowed, allow_leak or 0.0):
            raise PlanError(
                f"after the edit {after:.1e} of the stream still lies along the direction, more "
                "than rounding explains: the model is as it was (--allow-leak accepts it)"
            )
        kept = undo.pop_all()
    _in_force.setdefault(model, []).append(ref(kept))
    return InMemoryEdit(tensors, after, before, proof, partial(_restore, model, kept))


def _restore(model: PreTrainedModel, kept: ExitStack) -> None:
    """Undo an edit once; edits that lie on each other are undone from the last to the first."""
    edits = [edit for edit in _in_force.get(model, ()) if edit() is not None]
    if all(edit() is not kept for edit in edits):
        return
    if edits[-1]() is not kept:
        raise UsageError("the model was edited again since: restore the later edit first")
    kept.close()
    _in_force[model] = edits[:-1]


def _proof(model: PreTrainedModel, allow_leak: float | None) -> Proof | None:
    config = plain_config(model.config)
    try:
        proof = proof_of(config)
    except UnsupportedArchitectureError:
        return None  # found on the model itself, which is measured after the edit
    require_exact(config, proof, allow_leak)
    return proof


def _tokens(model: PreTrainedModel) -> Tensor:
    """Token ids ``[2, 17]`` to measure with, the same each time."""
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, embedding.shape[0], (2, 17), generator=generator).to(embedding.device)


@torch.no_grad()
def _untie(model: PreTrainedModel, undo: ExitStack) -> None:
    """Give a tied output head a matrix of its own, and say so in the configuration."""
    if tied_head(model) is None:
        return
    head: Any = model.get_output_embeddings()
    shared = head.weight
    undo.callback(setattr, head, "weight", shared)
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    for section in (model.config, model.config.get_text_config(decoder=True)):
        undo.callback(setattr, section, "tie_word_embeddings", section.tie_word_embeddings)
    untie_config(model.config)


@torch.no_grad()
def _project(
    model: PreTrainedModel, plan: WriterPlan, unit: Tensor, undo: ExitStack
) -> tuple[EditedTensor, ...]:
    """Edit every writer; ``undo`` puts its values back, which are kept on the CPU."""
    parameters = dict(model.named_parameters())
    named = {gain.parameter for writer in plan.writers for gain in writer.gains}
    gains: dict[str, Tensor] = {
        name: parameters[name].detach().cpu() for name in named if name is not None
    }
    writers: dict[tuple[str, int], list[Writer]] = {}
    for writer in plan.writers:
        writers.setdefault((writer.parameter, writer.axis), []).append(writer)
    # All directions before the first edit: a gain may itself be edited.
    bases = {
        key: orthonormal([writer_direction(writer, unit, gains) for writer in of_it])
        for key, of_it in writers.items()
    }
    for name in {name: None for name, _ in writers}:
        undo.callback(_put_back, parameters[name], parameters[name].detach().cpu().clone())
    return tuple(
        EditedTensor(
            name,
            of_it[0].kind,
            of_it[0].layer,
            axis,
            *_project_out(parameters[name], axis, bases[name, axis]),
        )
        for (name, axis), of_it in writers.items()
    )


def _project_out(parameter: Tensor, axis: int, basis: Tensor) -> tuple[float, float]:
    """Remove rows ``basis`` ``[k, d_model]`` along an axis; the share along them before, after."""
    wide = parameter.detach().to(widest(parameter.device), copy=True).movedim(axis, 0)
    rows = basis.to(wide)

    def share(values: Tensor) -> float:
        whole = float(values.norm())
        return float(torch.tensordot(rows, values, dims=1).norm()) / whole if whole else 0.0

    before = share(wide)
    wide = wide - torch.tensordot(rows.T, torch.tensordot(rows, wide, dims=1), dims=1)
    parameter.copy_(wide.movedim(0, axis).to(parameter.dtype))
    return before, share(parameter.detach().to(wide.dtype).movedim(axis, 0))


@torch.no_grad()
def _put_back(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values)
