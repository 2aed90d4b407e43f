"""What is read from logits while candidates are scored: refusal scores, and KL from a baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.metrics.refusal import kl_floor, local_kl, log_odds
from abliterate.precision import to_host, widened, widest

# From logits ``[candidates, prompts, kept tokens, vocabulary]`` and the prompts' rows to float64
# ``[candidates, prompts]``.
LogitMetric = Callable[[Tensor, tuple[int, ...]], Tensor]

# Logits that are scored in float64 at once.
_CHUNK = 1 << 22


def refusal_metric(tokens: Sequence[int]) -> LogitMetric:
    """The refusal score at the last token."""

    def measure(logits: Tensor, rows: tuple[int, ...]) -> Tensor:
        last = logits[:, :, -1]
        flat = last.flatten(0, 1)
        size = max(1, _CHUNK // flat.shape[-1])
        parts = [log_odds(flat[i : i + size], tokens) for i in range(0, len(flat), size)]
        return widened(torch.cat(parts)).view(last.shape[:2])

    return measure


@dataclass(frozen=True)
class BaselineLogits:
    """The unmodified model's next-token distributions after prompts, for the KL of candidates.

    Attributes:
        logits: of each prompt's tokens that count, the last ones, ``[tokens, vocabulary]``.
        floor: the least KL of each prompt, float64 ``[prompts]`` on the CPU.
    """

    logits: Mapping[int, Tensor]
    floor: Tensor

    @classmethod
    def of(
        cls, parts: Iterable[tuple[Tensor, tuple[int, ...]]], counts: Sequence[int]
    ) -> BaselineLogits:
        """From the unmodified model's passes.

        Args:
            parts: logits ``[prompts, kept tokens, vocabulary]`` and which prompts these are.
            counts: how many last tokens of each prompt count.
        """
        logits, floor = {}, torch.zeros(len(counts), dtype=torch.float64)
        for part, rows in parts:
            for row, own in zip(rows, part, strict=True):
                # A copy: what does not count is not kept.
                logits[row] = own[len(own) - counts[row] :].clone()
            least = torch.stack([kl_floor(logits[row]).mean() for row in rows])
            floor[list(rows)] = to_host(least)[0]
        return cls(logits, floor)

    def kl(self, logits: Tensor, rows: tuple[int, ...]) -> Tensor:
        """A ``LogitMetric``: KL of each candidate and prompt, mean over the tokens that count."""
        result = logits.new_empty(logits.shape[:2], dtype=widest(logits.device))
        counts = [len(self.logits[row]) for row in rows]
        size = max(1, _CHUNK // logits.shape[-1] // len(logits) // max(counts))
        for start in range(0, len(rows), size):
            part = range(start, min(start + size, len(rows)))
            alike = len({counts[at] for at in part}) == 1
            for some in [part] if alike else [range(at, at + 1) for at in part]:
                count = counts[some[0]]
                base = torch.stack([self.logits[rows[at]] for at in some])
                kl = local_kl(base, logits[:, some[0] : some[-1] + 1, -count:])
                result[:, some[0] : some[-1] + 1] = kl.mean(-1)
        return widened(result)
