"""A model whose layers are streamed from disk, as the stages ask for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from abliterate.direction_set import DirectionSet
from abliterate.errors import UsageError
from abliterate.inference.candidate_batches import FastPathFlags
from abliterate.inference.engine import (
    ActivationReader,
    BatchActivations,
    CandidateRun,
    Change,
    OnAnswer,
    OnFirstLogits,
    Prompts,
    Settled,
)
from abliterate.models.device_placement import Placement
from abliterate.offload.candidate_passes import candidate_bytes, replay_tricks, run_candidates
from abliterate.offload.layer_streaming import OffloadedModel
from abliterate.offload.streamed_interventions import leak_of, logits_under
from abliterate.offload.weight_passes import look
from abliterate.prompts.chat_template import ChatFormat

# Of activations that may lie in a mapped file, so many prompts at a time.
_ROWS = 16


@dataclass
class OffloadedEngine:
    """Everything in as few readings of the weights as the memory for activations allows.

    Attributes:
        offloaded: what runs the model block by block.
        name: of its checkpoint.
    """

    reads_weights_every_pass: ClassVar[bool] = True
    offloaded: OffloadedModel
    name: str = "the model"

    @property
    def devices(self) -> str:
        return self.offloaded.device.type

    def opened(self, placement: Placement) -> str:
        return f"streaming {self.name} ({self.offloaded.model.dtype}, {self.devices})"

    def summary(self) -> dict[str, int] | None:
        return self.offloaded.summary()

    def close(self) -> None:
        self.offloaded.close()

    def last_logits(
        self,
        prompts: Mapping[str, Prompts],
        changes: Mapping[str, Change],
        batch_size: int | str = "auto",
        description: str = "prompts",
    ) -> dict[str, dict[str, Tensor]]:
        rows, slices = _joined(prompts)
        by_name = logits_under(self.offloaded, rows, changes, batch_size, description)
        return {
            name: {kind: logits[rows_of_kind] for kind, rows_of_kind in slices.items()}
            for name, logits in by_name.items()
        }

    def resid_pre(
        self, prompts: Mapping[str, Prompts], positions: Sequence[int], batch_size: int | str
    ) -> ActivationReader:
        return OffloadedReader(self.offloaded, prompts, positions, batch_size)

    def leak(self, direction: Tensor | DirectionSet, prompts: Prompts) -> float:
        return leak_of(self.offloaded, direction, prompts)

    @cached_property
    def _tricks(self) -> FastPathFlags:
        return replay_tricks(self.offloaded.model)

    def candidates_at_once(self, tokens: int) -> int:
        budget = self.offloaded.activations.budget
        return max(1, int(budget // max(1, self.candidate_bytes(tokens))))

    def candidate_bytes(self, tokens: int) -> int:
        return candidate_bytes(self.offloaded, tokens)

    def run_candidates(
        self, runs: Sequence[CandidateRun], batch_size: int | str, description: str
    ) -> None:
        run_candidates(self.offloaded, runs, self._tricks, batch_size, description)

    def collector(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.offloaded.activations.empty(shape, dtype)

    def in_memory(self, option: str = "", change: Change = None) -> NoReturn:
        if not option:
            self.require_answers()
        refuse_own_passes(option)

    def require_answers(self, option: str = "", instead: str = "") -> NoReturn:
        if option:
            raise UsageError(
                f"{option} needs the model's answers, which --offload cannot generate in few "
                f"readings of it: use {instead}"
            )
        raise UsageError(
            "--offload would read the whole model for every token of an answer, so it does not "
            "generate: use --no-offload on a machine with room for the weights"
        )

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
        self.require_answers()


def refuse_own_passes(option: str) -> NoReturn:
    """Refuse what runs a model in another way than an engine does: its weights are not there.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        f"{option} does not run on a streamed model, of which first tokens alone are scored: "
        "leave it out, or use --no-offload on a machine with room for the weights"
    )


@dataclass
class OffloadedReader:
    """``resid_pre`` of all prompts of all kinds, in one reading of the model."""

    offloaded: OffloadedModel
    prompts: Mapping[str, Prompts]
    positions: Sequence[int]
    batch_size: int | str = "auto"

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.positions), self.offloaded.n_blocks, self.offloaded.width

    @cached_property
    def _everything(self) -> tuple[Tensor, Tensor, dict[str, slice]]:
        rows, slices = _joined(self.prompts)
        return *look(self.offloaded, rows, self.positions, self.batch_size), slices

    def read(
        self,
        kind: str,
        rows: range,
        use: Callable[[BatchActivations], None],
        description: str = "extract",
    ) -> None:
        logits, activations, slices = self._everything
        logits, activations = logits[slices[kind]], activations[slices[kind]]
        for first in range(0, len(rows), _ROWS):
            chunk = rows[first : first + _ROWS]
            part = slice(chunk.start, chunk.stop)
            use(BatchActivations(tuple(chunk), logits[part], activations[part]))


def _joined(prompts: Mapping[str, Prompts]) -> tuple[list[Sequence[int]], dict[str, slice]]:
    """All prompts in one list, and which of it each kind is."""
    rows: list[Sequence[int]] = []
    slices: dict[str, slice] = {}
    for kind, chosen in prompts.items():
        slices[kind] = slice(len(rows), len(rows) + len(chosen))
        rows += chosen
    return rows, slices
