"""What an evaluation measures of a streamed model: first-token logits, in few readings of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from abliterate.direction import Direction
from abliterate.evaluation.compare import KINDS
from abliterate.models.loading import LoadedModel
from abliterate.offload.streamed_interventions import logits_under


class StreamedLogits:
    """Last-token logits of the test prompts: one reading for all interventions, one a checkpoint.

    Attributes:
        readings: what each reading of a model took, by the rows that it was for.
    """

    def __init__(
        self,
        load: Callable[[str], LoadedModel],
        interventions: Sequence[str],
        direction: Direction | None,
        ids: Mapping[str, Sequence[Sequence[int]]],
        batch_size: int | str,
    ) -> None:
        """
        Args:
            load: gives the streamed model of a row.
            interventions: the rows of the model itself, checked.
            direction: what they ablate or add.
            ids: token ids of the prompts, by kind.
            batch_size: prompts per batch, or ``auto``.
        """
        self.readings: dict[str, dict[str, int]] = {}
        self._load, self._ids, self._batch_size = load, ids, batch_size
        # The baseline is what KL is measured from, wanted as a row or not.
        self._changes = {
            name: _change(name, direction) for name in dict.fromkeys(["baseline", *interventions])
        }
        self._known: dict[str, dict[str, Tensor]] = {}

    def of(self, name: str) -> dict[str, Tensor]:
        """Logits ``[prompts, vocabulary]`` of a row, by kind."""
        if name not in self._known:
            own = name in self._changes
            self._read(name, self._changes if own else {name: None})
        return self._known[name]

    def _read(self, name: str, changes: Mapping[str, tuple[Tensor, int | None] | None]) -> None:
        stream = self._load(name).stream
        everything = [ids for kind in KINDS for ids in self._ids[kind]]
        rows = ", ".join(changes)
        found = logits_under(stream, everything, changes, self._batch_size, f"evaluate: {rows}")
        first = len(self._ids[KINDS[0]])
        for each, logits in found.items():
            self._known[each] = dict(zip(KINDS, (logits[:first], logits[first:]), strict=True))
        summary: dict[str, Any] = stream.summary()
        self.readings[rows] = summary


def _change(name: str, direction: Direction | None) -> tuple[Tensor, int | None] | None:
    if direction is None or name == "baseline":
        return None
    if name == "ablate":
        return direction.vector, None
    return (direction.vector if name == "add" else -direction.vector), direction.layer
