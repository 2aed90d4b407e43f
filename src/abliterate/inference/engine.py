"""What the stages ask of a model, wherever its weights lie while it computes.

A model in memory answers through :mod:`abliterate.inference.in_memory`, one whose layers come from
disk through ``abliterate.offload``; which of them is decided once, by the :class:`Opener` of a
session.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abliterate.checkpoints.checkpoint import Checkpoint
from abliterate.direction_set import DirectionSet
from abliterate.models.device_placement import Placement
from abliterate.models.loading import LoadedModel
from abliterate.prompts.chat_template import ChatFormat

Prompts = Sequence[Sequence[int]]
# None is the model as it is, else a direction ``[d_model]`` with the block at whose input it is
# added (as it is), or None to ablate it; a set is ablated.
Change = tuple[Tensor, int | None] | tuple[DirectionSet, None] | None
# Called with row and token ids of an answer; gives what is shown beside the bar.
OnAnswer = Callable[[int, list[int]], str | None]
# Whether what has been said of an answer is enough.
Settled = Callable[[list[int]], bool]
# Called with rows and the logits ``[rows, vocabulary]`` at the last tokens of their prompts.
OnFirstLogits = Callable[[Sequence[int], Tensor], None]


@dataclass(frozen=True)
class BatchActivations:
    """One batch's last-token logits and activations.

    Attributes:
        rows: which prompts they are of.
        logits: ``[batch, vocabulary]``.
        activations: ``[batch, n_positions, n_layers, d_model]``.
    """

    rows: tuple[int, ...]
    logits: Tensor
    activations: Tensor


class ActivationReader(Protocol):
    """``resid_pre`` of several kinds of prompts, read as far as it is asked for."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """``n_positions, n_layers, d_model``."""

    def read(
        self,
        kind: str,
        rows: range,
        use: Callable[[BatchActivations], None],
        description: str = "extract",
    ) -> None:
        """Call ``use`` on batches that cover ``rows`` of a kind once, in any order."""


@dataclass(frozen=True)
class CandidateRun:
    """Prompts and the directions that they run under, as a part of one pass.

    Attributes:
        prompts: token ids.
        rows: which of them run.
        vectors: ``[candidates, d_model]``, unit vectors to ablate or vectors to add.
        layers: None to ablate everywhere, else the block at whose input each is added.
        use: takes logits ``[candidates, prompts, vocabulary]``, which candidates and which rows
            they are of. It is called again for the same ones where memory ran out in between.
        baseline: takes logits ``[prompts, vocabulary]`` of the unmodified model and their rows.
    """

    prompts: Prompts
    rows: Sequence[int]
    vectors: Tensor | None = None
    layers: Sequence[int] | None = None
    use: Callable[[Tensor, Sequence[int], Sequence[int]], None] | None = None
    baseline: Callable[[Tensor, Sequence[int]], None] | None = None


class Engine(Protocol):
    """How a model is run.

    ``prompts`` are token ids by kind, ``batch_size`` is prompts per batch or ``auto``, and results
    are on the CPU.
    """

    @property
    def reads_weights_every_pass(self) -> bool:
        """Whether a pass costs so much that all that is wanted belongs into as few as possible."""

    @property
    def devices(self) -> str:
        """What kinds of devices it computes on."""

    def opened(self, placement: Placement) -> str:
        """How the model was opened, and where, for the log."""

    def summary(self) -> dict[str, int] | None:
        """What artifacts record of the passes so far; None if there is nothing to say."""

    def close(self) -> None:
        """Give files back; the model cannot be run any more."""

    def last_logits(
        self,
        prompts: Mapping[str, Prompts],
        changes: Mapping[str, Change],
        batch_size: int | str = "auto",
        description: str = "prompts",
    ) -> dict[str, dict[str, Tensor]]:
        """Last-token logits ``[prompts, vocabulary]``, by name of the change and kind.

        Raises:
            InputError: a direction does not fit the model.
        """

    def resid_pre(
        self, prompts: Mapping[str, Prompts], positions: Sequence[int], batch_size: int | str
    ) -> ActivationReader:
        """What gives ``resid_pre`` at ``positions``, with last-token logits."""

    def leak(self, direction: Tensor | DirectionSet, prompts: Prompts) -> float:
        """Largest ``|h[l, t] . r| / ||h[l, t]||`` over block boundaries, prompts and tokens.

        Of a set: the largest share of a term that is added to the stream along its own layer's
        direction (:func:`abliterate.inference.layer_directions.watching_shares`).

        Raises:
            CheckpointError: the embedding has no row for a token.
        """

    def candidates_at_once(self, tokens: int) -> int:
        """How many candidates can share a pass over so many tokens of prompts."""

    def candidate_bytes(self, tokens: int) -> int:
        """Memory that one candidate's activations take in such a pass."""

    def run_candidates(
        self, runs: Sequence[CandidateRun], batch_size: int | str, description: str
    ) -> None:
        """Everything that ``runs`` ask for, in one pass.

        Raises:
            UsageError: a single prompt does not fit into memory.
        """

    def collector(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An empty tensor on the CPU to collect results of passes in."""

    def in_memory(
        self, option: str = "", change: Change = None
    ) -> AbstractContextManager[PreTrainedModel]:
        """The model itself under a change, for passes that are not named here.

        Args:
            option: who asks (losses, lm-eval, head views, ...), for the error; empty for answers.
            change: the intervention that holds within the context.

        Raises:
            InputError: a direction does not fit the model.
            UsageError: the weights are not in memory.
        """

    def require_answers(self, option: str = "", instead: str = "") -> None:
        """Refuse an option that needs answers where the model does not generate.

        Raises:
            UsageError: it does not.
        """

    def answers(
        self,
        prompts: Prompts,
        max_new_tokens: int,
        batch_size: int | str = "auto",
        description: str = "complete",
        on_answer: OnAnswer | None = None,
        done: Collection[int] = (),
        chat: ChatFormat | None = None,
        ends: Collection[int] = (),
        settled: Settled | None = None,
        on_first: OnFirstLogits | None = None,
    ) -> list[list[int]]:
        """Greedy answers; see :func:`abliterate.inference.generation.greedy_answers`.

        Raises:
            UsageError: the model does not generate, or as that function does.
        """


class Opener(Protocol):
    """How checkpoints are opened, chosen before the first of them is.

    One for a session: a checkpoint that is compared with the model has its size, and figures of two
    engines differ in their last digits.
    """

    @property
    def generates(self) -> bool:
        """Whether the models give answers, not first tokens alone."""

    @property
    def reads_weights_every_pass(self) -> bool:
        """As :attr:`Engine.reads_weights_every_pass` of what is opened."""

    @property
    def limits(self) -> str | None:
        """What an evaluation of the models leaves out, for the log; None if nothing."""

    def require_in_memory(self, option: str) -> None:
        """Refuse an option that needs :meth:`Engine.in_memory`.

        Raises:
            UsageError: the weights will not be in memory.
        """

    def open(self, checkpoint: Checkpoint) -> LoadedModel:
        """A checkpoint, ready to run.

        Raises:
            CheckpointError: files are missing, damaged or in another format.
            UnsupportedArchitectureError: the architecture is not known, or cannot run this way.
            UsageError: device, dtype or placement cannot be used.
        """
