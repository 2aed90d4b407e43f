"""Cross-entropy and perplexity on a corpus (paper, appendix on model coherence)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abliterate.errors import InputError
from abliterate.inference.engine import Change
from abliterate.inference.forward import Batch, for_each_batch, last_logits
from abliterate.inference.in_memory import engine_of
from abliterate.metrics.intervals import bootstrap
from abliterate.metrics.spread import spread
from abliterate.models.loading import LoadedModel
from abliterate.precision import widened
from abliterate.prompts.chat_template import ChatFormat, render, tokenize
from abliterate.prompts.corpora import Corpus, Example

# Logits of this many tokens are turned to log-probabilities at once: they are wide.
_TOKENS = 512


@dataclass(frozen=True)
class Loss:
    """Cross-entropy over all measured tokens of a corpus, text by text.

    Attributes:
        sums: summed ``-log p`` of each text, in nats.
        counts: how many tokens of each text were predicted.
    """

    sums: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def loss(self) -> float:
        """Nats per token."""
        return sum(self.sums) / self.n_tokens

    @property
    def n_tokens(self) -> int:
        """How many tokens were predicted."""
        return sum(self.counts)

    @property
    def n_texts(self) -> int:
        """How many texts they stand in."""
        return len(self.sums)

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return _exp(self.loss)

    def summary(self, seed: int = 0) -> dict[str, Any]:
        """As records hold it: the texts are what another draw would change.

        Args:
            seed: of the bootstrap over texts.
        """
        low, high = bootstrap(self.sums, seed, self.counts)
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "n_tokens": self.n_tokens,
            "n_texts": self.n_texts,
            "loss_standard_error": _standard_error(self.sums, self.counts),
            "loss_ci": (low, high),
            "perplexity_ci": (_exp(low), _exp(high)),
            "loss_spread": spread(self.by_text()["loss"]),
        }

    def by_text(self) -> dict[str, list[Any]]:
        """Each text's own loss, in nats per token, and its tokens."""
        means = [total / count for total, count in zip(self.sums, self.counts, strict=True)]
        return {"loss": means, "n_tokens": list(self.counts)}

    def less(self, before: Loss, seed: int = 0) -> dict[str, Any]:
        """What it has changed by, with the interval of that over the same texts.

        Args:
            before: the loss on the same texts. Where their tokens differ (a checkpoint with another
                tokenizer) the difference has no interval.
            seed: of the bootstrap.
        """
        change = {
            "loss": self.loss - before.loss,
            "perplexity": self.perplexity - before.perplexity,
        }
        if self.counts != before.counts:
            return change | {"loss_ci": None, "loss_standard_error": None}
        differences = [one - other for one, other in zip(self.sums, before.sums, strict=True)]
        return change | {
            "loss_ci": bootstrap(differences, seed, self.counts),
            "loss_standard_error": _standard_error(differences, self.counts),
        }


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _standard_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Of the ratio ``sum(sums) / sum(counts)`` over texts (delta method); None of a single one."""
    n, total = len(sums), sum(counts)
    if n < 2:
        return None
    ratio = sum(sums) / total
    left = sum((one - ratio * count) ** 2 for one, count in zip(sums, counts, strict=True))
    return math.sqrt(n / (n - 1) * left) / total


def tokenize_example(
    tokenizer: Any, example: Example, chat: ChatFormat, max_tokens: int
) -> tuple[list[int], int]:
    """Token ids of an example, and how many of them come before what is measured.

    A plain text is cut to ``max_tokens``, its first token predicted by none. An answer follows its
    conversation and is measured whole, from its first token on.
    """
    if example.instruction is None:
        ids = list(tokenizer(example.text, truncation=True, max_length=max_tokens)["input_ids"])
        return ids, 1
    before = render(tokenizer, example.instruction, chat)
    both = tokenize(tokenizer, [before, before + example.text], chat)
    ids = both[1]
    # A token that spans the border belongs to the answer.
    shared = 0
    while shared < min(len(both[0]), len(ids)) and both[0][shared] == ids[shared]:
        shared += 1
    return ids, max(1, shared)


def measure_loss(
    loaded: LoadedModel,
    corpus: Corpus,
    *,
    change: Change = None,
    chat: ChatFormat | None = None,
    max_tokens: int = 256,
    batch_size: int | str = "auto",
    description: str = "loss",
) -> Loss:
    """Mean cross-entropy over the tokens of a corpus, each counted once.

    Args:
        loaded: model and tokenizer; the ranks of its team measure some texts each.
        corpus: the texts.
        change: an intervention.
        chat: how instructions become conversations.
        max_tokens: where plain texts are cut.
        batch_size: texts per forward pass, or ``auto``.
        description: shown beside the progress bar.

    Raises:
        InputError: no text has a token to predict.
        UsageError: the model's weights are not in memory.
    """
    chat = chat or ChatFormat()
    rows = [tokenize_example(loaded.tokenizer, e, chat, max_tokens) for e in corpus.examples]
    rows = [(ids, start) for ids, start in rows if len(ids) > start]
    if not rows:
        raise InputError(f"corpus {corpus.name} ({corpus.source}) has no text of two tokens")
    ranks, engine = loaded.ranks, engine_of(loaded)
    local_rows = ranks.split(rows)
    with ranks.fail_together(), engine.in_memory("--corpus", change) as model:
        sums = _summed_losses(model, local_rows, batch_size, description)
    local_sums = torch.stack(sums).cpu() if sums else torch.empty(0, dtype=torch.float64)
    # In the order of the texts, whichever batch or rank they ran in.
    gathered = ranks.gather_rows(local_sums).tolist()
    return Loss(tuple(gathered), tuple(len(ids) - start for ids, start in rows))


@torch.inference_mode()
def _summed_losses(
    model: PreTrainedModel,
    rows: Sequence[tuple[list[int], int]],
    batch_size: int | str,
    description: str,
) -> list[Tensor]:
    """Of each row, token ids and the first that is measured, the summed ``-log p``, float64."""
    sums: list[Tensor] = [torch.empty(0)] * len(rows)

    def run(batch: Batch) -> None:
        width = batch.input_ids.shape[1]
        logits = last_logits(model, batch, width)
        for index, row in enumerate(batch.rows):
            ids, start = rows[row]
            first = width - len(ids) + start
            sums[row] = _negative_log(logits[index, first - 1 : -1], batch.input_ids[index, first:])

    prompts = [ids for ids, _ in rows]
    for_each_batch(model, prompts, run, batch_size, description, grow=False)
    return sums


def _negative_log(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed ``-log p`` of ``targets [n]`` under ``logits [n, vocabulary]``, float64.

    The sums of some hundred tokens are float32, as the log-probabilities are; those of all tokens
    are float64, on the host where the device has none.
    """
    parts = [
        torch.nn.functional.cross_entropy(
            logits[start : start + _TOKENS].float(),
            targets[start : start + _TOKENS],
            reduction="sum",
        )
        for start in range(0, len(logits), _TOKENS)
    ]
    wide = widened(torch.stack(parts))
    return sum(wide, wide.new_zeros(()))
