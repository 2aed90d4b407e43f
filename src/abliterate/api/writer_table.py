"""What writes to the residual stream, as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from abliterate.api.language_model import ModelLike, as_model
from abliterate.checkpoints.checkpoint import Checkpoint, find_checkpoint
from abliterate.editing.writer_table import describe_loaded, describe_writers
from abliterate.errors import NeedsWeightsError
from abliterate.result_tables import to_frame, to_html, to_json


@dataclass(frozen=True, repr=False)
class WriterTable:
    """Every parameter that writes to the residual stream.

    Attributes:
        model_type: the architecture.
        d_model: width of the stream.
        exact: an edit of these leaves nothing along a direction.
        reason: why not, else empty.
        leak: what a proof on a shrunken random copy has left, as a share of the stream.
        writers: a row each: parameter, layer, kind, shape, axis, direction and tensors on disk.
        untouched: tensors on disk that are no part of the language model.
    """

    model_type: str
    d_model: int
    exact: bool
    reason: str
    leak: float
    writers: tuple[dict[str, Any], ...]
    untouched: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.writers)

    def to_dict(self) -> dict[str, Any]:
        """All of it."""
        return to_json(asdict(self))

    def to_pandas(self) -> Any:
        """A row for each writer."""
        return to_frame(self.writers)

    def __repr__(self) -> str:
        verdict = "exact" if self.exact else f"not exact: {self.reason}"
        return f"WriterTable({self.model_type}: {len(self)} writers, {verdict})"

    def _repr_html_(self) -> str:
        heads = ("layer", "kind", "parameter", "shape", "axis", "direction")
        return to_html(repr(self), [{key: row[key] for key in heads} for row in self.writers])


def writers(
    model: ModelLike | Checkpoint | str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> WriterTable:
    """What writes to the residual stream, with a proof that nothing is missing.

    Args:
        model: a folder or a hub id, of which configuration and headers alone are read; or a model.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: the architecture's code lies in the checkpoint, and may run.

    Returns:
        The writers and the proof.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        UnsupportedArchitectureError: the writers cannot be found.

    Source:
        Section 2.4: the matrices of equation 5.

    Examples:
        >>> table = ab.writers(M)
        >>> len(table), table.exact
        (17, True)
    """
    if isinstance(model, str | Path):
        checkpoint = find_checkpoint(str(model), revision, need="headers")
        try:
            document = describe_writers(checkpoint, trust_remote_code)
        except NeedsWeightsError:
            whole = find_checkpoint(str(model), revision)
            document = describe_writers(whole, trust_remote_code)
    elif isinstance(model, Checkpoint):
        document = describe_writers(model, trust_remote_code)
    else:
        document = describe_loaded(as_model(model).model)
    return WriterTable(
        document["model_type"],
        document["d_model"],
        document["exact"],
        document["reason"],
        document["leak"],
        tuple(document["writers"]),
        tuple(document["untouched"]),
    )
