"""Two checkpoints of one architecture, tensor by tensor: what differs, and what was projected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from abliterate.auditing.checkpoint_pairs import CheckpointPair, Place, open_pair
from abliterate.auditing.edit_form import EditForm, ProjectedMatrix, describe
from abliterate.auditing.narrow_tensors import with_narrow
from abliterate.auditing.projections import (
    TOP,
    changed_columns,
    is_truncation,
    left_vectors,
    own_projection,
    rescaled_alone,
)
from abliterate.auditing.shared_directions import SharedDirections, find_shared
from abliterate.auditing.tensor_diff import TensorDiff, TensorSummary
from abliterate.checkpoints.safetensors_header import DTYPES
from abliterate.console import progress
from abliterate.errors import CheckpointError
from abliterate.models.loading import Checkpoint

_LOW_RANK = 8
_EPS = {"F64": 1e-15, "F32": 1.2e-7, "F16": 9.8e-4, "BF16": 7.8e-3, "F8_E4M3": 0.125}
_KEPT = 4  # left vectors of a tensor that are kept


@dataclass(frozen=True)
class Comparison:
    """All tensors of two checkpoints.

    Attributes:
        tensors: in the order of A.
        missing: names that only A has.
        added: names that only B has.
        form: what the projections have in common, or None if there are none.
        tested: every tensor that differs could be read and tested.
    """

    tensors: tuple[TensorDiff, ...]
    missing: tuple[str, ...]
    added: tuple[str, ...]
    form: EditForm | None = field(default=None, repr=False)
    tested: bool = True

    @property
    def direction(self) -> Tensor | None:
        """Float64 unit ``[d_model]`` that the changed tensors lost, or most of it; or None."""
        return None if self.form is None else self.form.shared

    @property
    def gains(self) -> bool:
        """The direction is the stream's, behind the gains of norms; False: the matrices' own."""
        return self.form is None or self.form.gains

    @property
    def projected(self) -> tuple[TensorDiff, ...]:
        return tuple(t for t in self.tensors if t.projected)

    @property
    def beyond(self) -> tuple[TensorDiff, ...]:
        """What differs otherwise than by the projection."""
        same = ("unchanged", "recast")
        return tuple(t for t in self.tensors if t.state not in same and not t.projected)


def compare(a: Checkpoint, b: Checkpoint) -> Comparison:
    """Compare two checkpoints from their files, in blocks and samples of fixed places.

    Raises:
        CheckpointError: one is damaged or of an unknown format, or they have no tensor in common.
        UnsupportedArchitectureError: the writers of A cannot be found.
    """
    pair = open_pair(a, b)
    if not pair.common:
        raise CheckpointError(f"{a.folder} and {b.folder} have no tensor in common")
    found = {
        name: _summarize(pair, name)
        for name in progress(pair.common, "diff: tensors", total=len(pair.common))
    }
    shared = {side: find_shared(pair, found, side) for side in ("writer", "reader")}
    tensors = [_finish(one, shared) for one in found.values()]
    matrices = [
        _matrix(pair, found[t.name], t, shared[t.side])
        for t in tensors
        if t.projected and t.side in shared
    ]
    form = describe(
        pair, matrices, {side: (one.direction, one.gains) for side, one in shared.items() if one}
    )
    if form is None:
        tensors = [replace(t, cosine=None) for t in tensors]
    else:
        tensors = with_narrow(pair, found, tensors, form, matrices)
    return Comparison(
        tensors=tuple(tensors),
        missing=tuple(sorted(pair.left.tensors.keys() - pair.right.tensors.keys() - pair.hidden)),
        added=tuple(sorted(pair.right.tensors.keys() - pair.left.tensors.keys() - pair.hidden)),
        form=form,
        tested=all(one.readable for one in found.values()),
    )


def _summarize(pair: CheckpointPair, name: str) -> TensorSummary:
    places = pair.places(name)
    found = _summarize_at(pair, places[0])
    for place in places[1:]:  # of a square matrix either side may read the stream
        if found.own is not None or found.vectors is None:
            break
        other = _summarize_at(pair, place)
        found = other if other.own is not None else found
    return found


def _summarize_at(pair: CheckpointPair, place: Place) -> TensorSummary:
    name = place.edit.name
    one, two = pair.left.tensors[name], pair.right.tensors[name]
    unchanged = TensorDiff(name, "unchanged", place.kind, place.layer, place.side, place.component)
    if pair.same_bytes(name):
        return TensorSummary(unchanged, place)
    if one.shape != two.shape:
        return TensorSummary(replace(unchanged, state="reshaped"), place, readable=False)
    dense = replace(unchanged, state="dense")
    readable = all(
        e.dtype in DTYPES or name in q for e, q in ((one, pair.quantized), (two, pair.other))
    )
    if not readable or not one.shape or 0 in one.shape:
        return TensorSummary(dense, place, readable=readable)
    before, delta = pair.sample(place.edit)
    energy, whole = float(delta.square().sum()), float(before.square().sum())
    if energy == 0:
        # The sample is the same; where bytes of one dtype differ, what differs lies outside it.
        return TensorSummary(
            replace(dense, state="recast") if one.dtype != two.dtype else dense, place
        )
    change = (energy / whole) ** 0.5 if whole > 0 else float("inf")
    vectors, shares = left_vectors(delta, TOP)
    rounding = 4 * whole * max(_EPS.get(e.dtype, 0.5) for e in (one, two)) ** 2 / 12
    allowed = 0.01 * energy + rounding
    rest = (1 - shares.cumsum(0)) * energy
    state = "dense"
    if float(rest[0]) <= allowed and energy > 2 * rounding:
        state = "rank 1"
    elif float(rest[min(_LOW_RANK, len(rest)) - 1]) <= allowed and energy > 2 * rounding:
        state = "low rank"
    diff = replace(dense, state=state, change=change, first=float(shares[0]))
    if place.side not in ("writer", "reader"):
        # Vectors are rank 1 whatever was done to them, and say nothing on their own.
        return TensorSummary(diff, place)
    if rescaled_alone(before, delta, diff.first):
        return TensorSummary(diff, place)
    if is_truncation(before, delta, shares):
        return TensorSummary(replace(diff, state="truncated"), place)
    own = own_projection(before, delta, vectors, shares, rounding) if whole > 0 else None
    kept = vectors[:, :_KEPT].float()
    columns = changed_columns(delta)
    return TensorSummary(diff, place, kept, shares[: kept.shape[1]], own, columns=columns)


def _finish(one: TensorSummary, shared: Mapping[str, SharedDirections | None]) -> TensorDiff:
    of_side = shared.get(one.place.side)
    measured = None if of_side is None else of_side.measured.get(one.diff.name)
    diff, own = one.diff, one.own
    if of_side is not None and measured is not None:
        diff = replace(
            diff,
            cosine=measured.cosine,
            scale=measured.scale,
            fit=measured.fit,
            projected=measured.lost,
            directions=of_side.count if measured.lost else 0,
        )
    if own is not None and (own.whole or not diff.projected):
        count = own.basis.shape[1]
        diff = replace(diff, scale=own.scale, fit=own.fit, projected=True, directions=count)
        diff = replace(diff, rescaled=own.rescaled)
    return diff


def _matrix(
    pair: CheckpointPair, one: TensorSummary, diff: TensorDiff, shared: SharedDirections | None
) -> ProjectedMatrix:
    """A projected matrix, with the directions that it lost as they are there."""
    assert diff.scale is not None
    measured = None if shared is None else shared.measured.get(diff.name)
    own, whole = one.own, one.own is not None and one.own.whole
    if shared is not None and measured is not None and measured.lost and not whole:
        direction = shared.at_layer(one.place.layer)
        basis = pair.at(one.place, direction.unsqueeze(1), shared.gains)
    else:
        assert own is not None
        basis = own.basis
    return ProjectedMatrix(
        one.place, basis / basis.norm(dim=0), diff.scale, diff.directions, whole, diff.rescaled
    )
