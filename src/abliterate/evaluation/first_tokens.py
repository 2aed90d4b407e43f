"""First-token logits of an evaluation's rows, in as few passes as the model asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet
from abliterate.evaluation.changes import change_of
from abliterate.evaluation.prompt_kinds import KINDS
from abliterate.inference.engine import Change, OnFirstLogits
from abliterate.inference.generation import RowLogits
from abliterate.inference.in_memory import engine_of
from abliterate.inference.thoughts import AnswerLimits
from abliterate.models.loading import LoadedModel
from abliterate.prompts.chat_template import ChatFormat


@dataclass(frozen=True)
class Answering:
    """How answers to the prompts are made, which decides what shares a batch.

    Attributes:
        chat: how the prompts were formatted.
        max_new_tokens: longest answer.
        begun: the prompts end within a thought; None if the model's own template says so.
    """

    chat: ChatFormat
    max_new_tokens: int
    begun: bool | None = None


class FirstTokenLogits:
    """Last-token logits of the test prompts, by row.

    They are those that answers start from, taken as the answers are made (:meth:`taking`). Where
    these are known already the same batches run once more, for one token each, so that what was
    interrupted ends with the same figures. Where a pass reads all weights, one is made for all
    interventions and one for each checkpoint, and what they gave is kept.

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
        answering: Answering | None = None,
    ) -> None:
        """
        Args:
            load: gives the model of a row.
            interventions: the rows of the model itself, checked.
            direction: what they ablate or add.
            ids: token ids of the prompts, by kind.
            batch_size: prompts per batch, or ``auto``.
            answering: how they are answered; None where answers do not start from ``ids``.
        """
        self.readings: dict[str, dict[str, int]] = {}
        self._load, self._ids, self._batch_size = load, ids, batch_size
        self._answering = answering
        # The baseline is what KL is measured from, wanted as a row or not.
        self._changes = {
            name: change_of(name, direction) for name in dict.fromkeys(["baseline", *interventions])
        }
        self._known: dict[str, dict[str, Tensor]] = {}
        self._taken: dict[tuple[str, str], RowLogits] = {}

    def taking(self, name: str, kind: str) -> OnFirstLogits | None:
        """What takes the logits of a row as its answers are made; None if they are others'."""
        if self._answering is None or kind not in KINDS:
            return None
        taken = self._taken[name, kind] = RowLogits(len(self._ids[kind]))
        return taken.put

    def forget(self, name: str) -> None:
        """Let go of what was taken of a row."""
        for kind in KINDS:
            self._taken.pop((name, kind), None)

    def of(
        self, name: str, kinds: Sequence[str] = KINDS, first: int | None = None
    ) -> dict[str, Tensor]:
        """Logits ``[prompts, vocabulary]`` of a row.

        Args:
            name: of the row.
            kinds: of prompts.
            first: of each kind only so many prompts, which no answers are started for.
        """
        if name in self._known:
            return {kind: self._known[name][kind][:first] for kind in kinds}
        if all(self._has(name, kind) for kind in kinds):
            return {kind: self._taken[name, kind].rows[:first] for kind in kinds}
        engine = engine_of(self._load(name))
        alone: dict[str, Change] = {name: self._changes.get(name)}
        if engine.reads_weights_every_pass:
            together = self._changes if name in self._changes else alone
            rows = ", ".join(together)
            ids = {kind: self._ids[kind] for kind in KINDS}
            description = f"evaluate: {rows}"
            self._known |= engine.last_logits(ids, together, self._batch_size, description)
            self.readings[rows] = engine.summary() or {}
            return {kind: self._known[name][kind][:first] for kind in kinds}
        if first is not None or self._answering is None:
            ids = {kind: self._ids[kind][:first] for kind in kinds}
            description = f"evaluate: {name}"
            return engine.last_logits(ids, alone, self._batch_size, description)[name]
        for kind in kinds:
            if not self._has(name, kind):
                self._start_answers(name, kind, self._answering)
        return {kind: self._taken[name, kind].rows for kind in kinds}

    def _has(self, name: str, kind: str) -> bool:
        return (name, kind) in self._taken and self._taken[name, kind].is_whole

    def _start_answers(self, name: str, kind: str, answering: Answering) -> None:
        """Run the batches in which the prompts are answered, as far as their first tokens."""
        loaded, ids, chat = self._load(name), self._ids[kind], answering.chat
        engine = engine_of(loaded)
        limits = AnswerLimits.of(loaded, chat, ids, answering.max_new_tokens, answering.begun)
        with engine.in_memory(change=self._changes.get(name)):
            engine.answers(
                ids, limits.longest, self._batch_size, f"evaluate: {name}", done=range(len(ids)),
                chat=chat, on_first=self.taking(name, kind),
            )  # fmt: skip
