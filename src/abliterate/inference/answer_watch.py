"""Which rows of a batch of answers have ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from abliterate.inference.engine import Settled

# A batch goes on without the rows that have ended once they are this share of it: on a CPU a token
# of a row costs as much after its end as before, and a new start some milliseconds. An accelerator
# takes nearly as long for half of the rows, and longer to start anew.
_SHRINK = {"cpu": 1 / 8}
_SHRINK_ACCELERATOR = 1 / 2
# So few rows take it no longer than half of them do: it reads all weights for a token of each.
_FEW_ACCELERATOR = 16
# Once in so many tokens it is asked which rows have ended: an accelerator is waited for each time.
_LOOK = {"cpu": 1}
LOOK_ACCELERATOR = 8
# At every multiple of so many of an answer's tokens it is asked whether they are enough, wherever
# the device looks: which tokens an answer has is the same everywhere.
_SETTLE = 8


class Watch(StoppingCriteria):  # type: ignore[misc]
    """Hands over rows as they end, and stops the batch once few are left.

    Args:
        stops: what ends an answer.
        answers: what each row has said so far; grows with every look.
        ids: ``[batch, tokens]`` at the start.
        keep: gets each row's answer.
        shrink: stop once some of the rows have ended, to go on with the others.
        settled: see :func:`greedy_answers`.
    """

    def __init__(
        self,
        stops: Sequence[int],
        answers: dict[int, list[int]],
        ids: Tensor,
        keep: Callable[[int, list[int]], None],
        shrink: bool,
        settled: Settled | None = None,
    ) -> None:
        self._settled = settled
        self.stops, self.answers, self.keep = set(stops), answers, keep
        share = _SHRINK.get(ids.device.type, _SHRINK_ACCELERATOR)
        gains = ids.device.type in _SHRINK or len(answers) > _FEW_ACCELERATOR
        self._enough_ended = share * len(answers) if shrink and gains else float("inf")
        self.ended: set[int] = set()
        self._seen = ids.shape[1]
        self._every = _LOOK.get(ids.device.type, LOOK_ACCELERATOR)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.shape[1] - self._seen >= self._every:
            self.look(input_ids)
        shape = (len(self.answers),)
        return torch.full(shape, self.is_over, dtype=torch.bool, device=input_ids.device)

    @property
    def is_over(self) -> bool:
        """Whether so many have ended that the batch stops here."""
        return len(self.ended) >= min(self._enough_ended, len(self.answers))

    def look(self, input_ids: Tensor) -> None:
        """Take the tokens since the last look to the host, in one transfer."""
        if input_ids.shape[1] <= self._seen:
            return
        for (row, answer), new in zip(
            self.answers.items(), input_ids[:, self._seen :].tolist(), strict=True
        ):
            if row in self.ended:
                continue
            end = next((at for at, token in enumerate(new) if token in self.stops), None)
            said = len(answer)
            answer += new if end is None else new[: end + 1]
            enough = self._enough(answer, said)
            if enough is not None:
                del answer[enough:]
            if end is not None or enough is not None:
                self.ended.add(row)
                self.keep(row, answer)
        self._seen = input_ids.shape[1]

    def _enough(self, answer: list[int], said: int) -> int | None:
        """How many of an answer's tokens are enough, if any more than ``said`` are."""
        if self._settled is None:
            return None
        counts = range(said - said % _SETTLE + _SETTLE, len(answer) + 1, _SETTLE)
        return next((count for count in counts if self._settled(answer[:count])), None)
