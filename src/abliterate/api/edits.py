"""Editing weights: in memory, and as checkpoints on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, overload

from abliterate.api.inputs import DirectionLike, as_direction, as_vector
from abliterate.api.language_model import LanguageModel, ModelLike, as_model
from abliterate.checkpoints.checkpoint import Checkpoint
from abliterate.direction import Direction
from abliterate.editing import orthogonalize as editing
from abliterate.editing.edited_tensor import EditedTensor
from abliterate.editing.file_names import RECORD
from abliterate.editing.in_memory import InMemoryEdit, orthogonalize_in_memory
from abliterate.editing.options import EditOptions
from abliterate.result_tables import to_frame, to_html, to_json
from abliterate.storage.artifacts import read_record


@dataclass(frozen=True, repr=False)
class OrthogonalizedModel:
    """A model whose weights were edited in memory.

    Within ``with`` the edit holds; at its end it is undone.

    Attributes:
        model: the model, edited.
        direction: what its weights cannot write along.
        tensors: every edited parameter, with its share along the direction before and after.
        leak: largest ``|h . r| / ||h||`` over block boundaries and tokens, after the edit.
        leak_before: the same before it.
        proven: the writers are proven complete on a small random copy of the architecture; else
            ``leak`` alone shows it, on the model itself.
    """

    model: LanguageModel
    direction: Direction
    tensors: tuple[EditedTensor, ...]
    leak: float
    leak_before: float
    proven: bool
    _undo: Callable[[], None]

    def restore(self) -> None:
        """Put every weight back, bit for bit; once they are back nothing happens.

        Raises:
            UsageError: the model was edited again since: that edit is restored first.
        """
        self._undo()

    def to_dict(self) -> dict[str, Any]:
        """All of it but the model."""
        return to_json(
            {
                "direction": self.direction.summary(),
                "leak": self.leak,
                "leak_before": self.leak_before,
                "proven": self.proven,
                "tensors": [asdict(tensor) for tensor in self.tensors],
            }
        )

    def to_pandas(self) -> Any:
        """A row for each edited parameter."""
        return to_frame([asdict(tensor) for tensor in self.tensors])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def __repr__(self) -> str:
        return (
            f"OrthogonalizedModel({len(self.tensors)} parameters, leak {self.leak_before:.2g} -> "
            f"{self.leak:.1e})"
        )

    def _repr_html_(self) -> str:
        caption = f"leak {self.leak_before:.2g} before, {self.leak:.1e} after"
        return to_html(caption, [_tensor_row(tensor) for tensor in self.tensors])


def _tensor_row(tensor: EditedTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "kind": tensor.kind,
        "layer": tensor.layer,
        "share_before": tensor.before,
        "share_after": tensor.after,
    }


def orthogonalize_(
    model: ModelLike, direction: DirectionLike, *, allow_leak: float | None = None
) -> OrthogonalizedModel:
    """Weight orthogonalization in memory: ``W <- W - r r^T W`` for every writer, in place.

    A tied output head keeps the original matrix: it reads the stream. The originals are kept in
    main memory until the result is dropped.

    Args:
        model: a model in memory, in a float dtype.
        direction: a direction or its vector ``[d_model]``.
        allow_leak: accept an architecture that no edit makes exact, if no more than this share of
            the stream remains along the direction.

    Returns:
        What was edited; ``.restore()`` undoes it.

    Raises:
        InputError: the direction does not fit.
        PlanError: more than rounding is left; nothing is changed then.
        UnsupportedArchitectureError: the writers cannot be found or made exact.
        UsageError: the model is streamed or quantised.

    Source:
        Section 2.4, equation 5.

    Examples:
        >>> edited = ab.orthogonalize_(lm, d)
        >>> edited.leak < 1e-5 < edited.leak_before
        True
        >>> edited.restore()
    """
    lm = as_model(model)
    with lm.engine.in_memory("orthogonalize_") as weights:
        edit: InMemoryEdit = orthogonalize_in_memory(weights, as_vector(direction), allow_leak)
    return OrthogonalizedModel(
        lm,
        as_direction(direction),
        edit.tensors,
        edit.leak,
        edit.leak_before,
        edit.proof is not None and edit.proof.exact,
        edit.restore,
    )


@dataclass(frozen=True, repr=False)
class EditedCheckpoint(Sequence[EditedTensor]):
    """A checkpoint that :func:`orthogonalize` wrote; a sequence of its edited tensors.

    Attributes:
        path: its folder.
        tensors: what was edited, in the order of the plan.
    """

    path: Path
    tensors: tuple[EditedTensor, ...]

    @overload
    def __getitem__(self, index: int) -> EditedTensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[EditedTensor]: ...
    def __getitem__(self, index: int | slice) -> EditedTensor | Sequence[EditedTensor]:
        return self.tensors[index]

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[EditedTensor]:
        return iter(self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """The record of the edit, as ``abliterate.json`` holds it."""
        return to_json(read_record(self.path / RECORD, "orthogonalize"))

    def to_pandas(self) -> Any:
        """A row for each edited tensor."""
        return to_frame([asdict(tensor) for tensor in self.tensors])

    def __repr__(self) -> str:
        return f"EditedCheckpoint({str(self.path)!r}, {len(self.tensors)} tensors)"

    def _repr_html_(self) -> str:
        rows = [_tensor_row(tensor) for tensor in self.tensors]
        return to_html(f"{self.path}: {len(rows)} edited tensors", rows)


def orthogonalize(
    model: Checkpoint | str | Path,
    direction: DirectionLike,
    out: str | Path,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    options: EditOptions | None = None,
    allow_leak: float | None = None,
    low_disk: bool = False,
) -> EditedCheckpoint:
    """Write a copy of a checkpoint that cannot write along a direction.

    Works on the files in constant memory. Killed or stopped at any moment, the same call goes on
    where the last one ended.

    Args:
        model: the source, a folder or a hub id.
        direction: a direction, its vector ``[d_model]``, or a file or run folder.
        out: the folder to make; until it is complete it grows in ``<out>.partial``.
        overwrite: replace ``out`` if it exists.
        trust_remote_code: the architecture's code lies in the checkpoint, and may run.
        options: which tensors to edit, how much, and with what; None for the paper's edit.
        allow_leak: accept an architecture that no edit makes exact, if no more than this share of
            the stream remains along the direction.
        low_disk: fetch the shards of a hub id one by one and drop each once it is edited.

    Returns:
        The checkpoint and its edited tensors.

    Raises:
        CheckpointError: the source cannot be edited, or the disk fails or is full.
        InputError: the direction does not fit, or another process is writing ``out``.
        UsageError: ``out`` exists, is not ours to replace or lies inside the source, or the
            options contradict the model.

    Source:
        Section 2.4, equation 5.

    Examples:
        >>> edit = ab.orthogonalize(M, d, tmp / "out")
        >>> max(tensor.after for tensor in edit) < 0.01
        True
    """
    source: Checkpoint | str = model if isinstance(model, Checkpoint) else str(model)
    tensors = editing.orthogonalize(
        source,
        as_direction(direction),
        out,
        overwrite,
        trust_remote_code,
        options,
        allow_leak,
        low_disk,
    )
    return EditedCheckpoint(Path(out), tuple(tensors))
