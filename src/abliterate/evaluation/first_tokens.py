"""First-token logits of an evaluation's rows, in as few passes as the model asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet
from abliterate.evaluation.compare import change_of
from abliterate.evaluation.outcomes import KINDS
from abliterate.inference.engine import Change
from abliterate.inference.in_memory import engine_of
from abliterate.models.loading import LoadedModel


class FirstTokenLogits:
    """Last-token logits of the test prompts, by row.

    Where a pass reads all weights, one is made for all interventions and one for each checkpoint,
    and what they gave is kept; else each row runs when it is asked for.

    Attributes:
        readings: what the passes that read all weights took, by the rows that they were for.
    """

    def __init__(
        self,
        load: Callable[[str], LoadedModel],
        interventions: Sequence[str],
        direction: Direction | DirectionSet | None,
        ids: Mapping[str, Sequence[Sequence[int]]],
        batch_size: int | str,
    ) -> None:
        """
        Args:
            load: gives the model of a row.
            interventions: the rows of the model itself, checked.
            direction: what they ablate or add.
            ids: token ids of the prompts, by kind.
            batch_size: prompts per batch, or ``auto``.
        """
        self.readings: dict[str, dict[str, int]] = {}
        self._load, self._ids, self._batch_size = load, ids, batch_size
        # The baseline is what KL is measured from, wanted as a row or not.
        self._changes = {
            name: change_of(name, direction) for name in dict.fromkeys(["baseline", *interventions])
        }
        self._known: dict[str, dict[str, Tensor]] = {}

    def of(
        self, name: str, kinds: Sequence[str] = KINDS, first: int | None = None
    ) -> dict[str, Tensor]:
        """Logits ``[prompts, vocabulary]`` of a row.

        Args:
            name: of the row.
            kinds: of prompts.
            first: of each kind only so many prompts.
        """
        if name not in self._known:
            engine = engine_of(self._load(name))
            alone: dict[str, Change] = {name: self._changes.get(name)}
            if not engine.reads_weights_every_pass:
                ids = {kind: self._ids[kind][:first] for kind in kinds}
                description = f"evaluate: {name}"
                return engine.last_logits(ids, alone, self._batch_size, description)[name]
            together = self._changes if name in self._changes else alone
            rows = ", ".join(together)
            ids = {kind: self._ids[kind] for kind in KINDS}
            description = f"evaluate: {rows}"
            self._known |= engine.last_logits(ids, together, self._batch_size, description)
            self.readings[rows] = engine.summary() or {}
        return {kind: self._known[name][kind][:first] for kind in kinds}
