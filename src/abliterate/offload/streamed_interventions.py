"""Streamed passes under interventions: one reading of the model for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from abliterate.direction_set import DirectionSet
from abliterate.inference.engine import Change
from abliterate.inference.forward import Batch, last_logits, left_pad
from abliterate.inference.interventions import (
    Units,
    ablate_at,
    ablation_units,
    check_direction,
    per_row,
    unit_direction,
)
from abliterate.inference.layer_directions import LayerUnits, layer_units, watching_shares
from abliterate.offload.layer_streaming import BatchRun, OffloadedModel
from abliterate.offload.weight_passes import Rows, batches, flow, retry, streaming_budget
from abliterate.precision import widest
from abliterate.writers import find_writers
from abliterate.writers.op_trace import elements_of
from abliterate.writers.residual_stream import largest, ratio

_VERIFY = "verify: prompts"


@dataclass(frozen=True)
class Intervention:
    """What is done to the model while some rows of prompts run.

    Attributes:
        vectors: ``[candidates, d_model]``: unit vectors to ablate, or vectors to add.
        layer: None to ablate, else the block at whose input they are added.
    """

    vectors: Tensor
    layer: int | None = None

    def __len__(self) -> int:
        return len(self.vectors)


def changed_job(
    stream: OffloadedModel,
    batch: Batch,
    change: Intervention | LayerUnits | None,
    use: Callable[[Tensor], None],
    entering: Callable[[], Tensor] | None = None,
) -> BatchRun:
    """A job that runs a batch of prompts under each direction of a change.

    Args:
        stream: the model.
        batch: the prompts.
        change: None for the model as it is.
        use: takes logits ``[candidates, prompts, vocabulary]``.
        entering: gives the unmodified stream that enters the block where vectors are added; the
            blocks before it are then left out.
    """
    n = len(change) if isinstance(change, Intervention) else 1
    several = Batch(
        batch.rows * n,
        batch.input_ids.repeat(n, 1),
        batch.attention_mask.repeat(n, 1),
        batch.position_ids.repeat(n, 1),
        batch.lengths * n,
    )
    rows, tokens = several.input_ids.shape
    job = BatchRun(
        partial(last_logits, stream.model, several),
        lambda logits: use(logits.view(n, len(batch.rows), -1)),
        (rows, tokens),
    )
    if change is None:
        return job
    if isinstance(change, LayerUnits):
        job.units = change
        return job
    layer = change.layer
    one_each = change.vectors.repeat_interleave(len(batch.rows), 0) if n > 1 else change.vectors[0]
    one_each = one_each.to(stream.device, stream.model.dtype)
    if layer is None:
        job.units = one_each
        return job

    def add(at: int, hidden: Tensor) -> Tensor:
        if at != layer:
            return hidden
        if entering is not None:
            base = entering()
            hidden = base.repeat(n, *([1] * (base.ndim - 1)))
        return hidden + per_row(one_each.to(hidden.device, hidden.dtype), hidden)

    job.change = add
    if entering is not None:
        job.start = layer
    return job


def logits_under(
    stream: OffloadedModel,
    prompts: Sequence[Sequence[int]],
    changes: Mapping[str, Change],
    batch_size: int | str = "auto",
    description: str = "stream",
) -> dict[str, Tensor]:
    """Last-token logits under several interventions, in one reading of the model.

    Args:
        stream: the model.
        prompts: token ids.
        changes: by name, None for the model as it is, or a direction ``[d_model]`` with the layer
            at which it is added (as it is) or None to ablate it; a set is ablated.
        batch_size: prompts per batch, or ``auto``.
        description: shown beside the progress bar.

    Returns:
        By name, logits ``[prompts, vocabulary]`` on the CPU.

    Raises:
        InputError: a direction does not fit the model.
    """
    found: dict[str, Tensor] = {}
    ready: dict[str, Intervention | LayerUnits | None] = {}
    for name, given in changes.items():
        if given is None:
            ready[name] = None
            continue
        vector, layer = given
        if isinstance(vector, DirectionSet):
            units = ablation_units(stream.model, vector)
            assert isinstance(units, LayerUnits)
            ready[name] = LayerUnits(units.rows.to(stream.device), units.blocks)
            continue
        check = unit_direction if layer is None else check_direction
        ready[name] = Intervention(check(vector, stream.width)[None], layer)
    budget = streaming_budget(stream, batch_size)

    def jobs() -> list[BatchRun]:
        made = []
        for rows in batches(stream, prompts, budget):
            batch = left_pad(stream.model, prompts, rows)
            for name, change in ready.items():

                def use(logits: Tensor, name: str = name, rows: Rows = rows) -> None:
                    if name not in found:
                        shape = (len(prompts), logits.shape[-1])
                        found[name] = stream.activations.empty(shape, logits.dtype)
                    found[name][list(rows)] = logits[0].cpu()

                made.append(changed_job(stream, batch, change, use))
        return made

    with ablating(stream):
        retry(stream, budget, jobs, description)
    return found


def ablating(stream: OffloadedModel) -> AbstractContextManager[None]:
    """Within the context, each job's ``units`` are projected out of what its pass writes."""

    def units() -> Units | None:
        return None if stream.current is None else stream.current.units

    return ablate_at(stream.model, units, find_writers(stream.model).sites)


def leak_of(
    stream: OffloadedModel,
    direction: Tensor | DirectionSet,
    prompts: Sequence[Sequence[int]],
    batch_size: int | str = "auto",
) -> float:
    """Largest ``|h[l, t] . r| / ||h[l, t]||`` over block boundaries, prompts and tokens.

    Of a set, as :meth:`abliterate.inference.engine.Engine.leak` says.

    Args:
        stream: the model.
        direction: ``[d_model]``, or a set.
        prompts: token ids.
        batch_size: prompts per batch, or ``auto``; those of one length share one.
    """
    if isinstance(direction, DirectionSet):
        units = layer_units(stream.model, find_writers(stream.model), direction)
        with watching_shares(stream.model, units) as shares:
            flow(stream, prompts, _passing(stream, prompts), batch_size, _VERIFY, mix=False)
        return largest(shares) if shares else 0.0
    unit = unit_direction(direction, stream.width).to(stream.device, widest(stream.device))
    seen: list[Tensor] = []

    def see(layer: int, hidden: Tensor, output: object) -> None:
        after = [t for t in elements_of(output) if t is not None and t.shape == hidden.shape]
        seen.extend(ratio(tensor, unit) for tensor in (hidden, *after[:1]))

    flow(stream, prompts, _passing(stream, prompts, see), batch_size, _VERIFY, mix=False)
    return largest(seen) if seen else 0.0


def _passing(
    stream: OffloadedModel,
    prompts: Sequence[Sequence[int]],
    see: Callable[[int, Tensor, object], None] | None = None,
) -> Callable[[Rows], BatchRun]:
    """Jobs that run prompts for what is seen on the way."""

    def job(rows: Rows) -> BatchRun:
        batch = left_pad(stream.model, prompts, rows)
        shape = (len(rows), batch.input_ids.shape[1])
        return BatchRun(partial(last_logits, stream.model, batch), lambda _: None, shape, see=see)

    return job
