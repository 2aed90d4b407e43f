"""A model whose weights lie in memory, as the stages ask for it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from abliterate.console import progress
from abliterate.direction_set import DirectionSet
from abliterate.inference.engine import (
    ActivationReader,
    BatchActivations,
    CandidateRun,
    Change,
    Engine,
    OnAnswer,
    OnFirstLogits,
    Prompts,
    Settled,
)
from abliterate.inference.forward import (
    Batch,
    all_last_logits,
    capture_resid_pre,
    for_each_batch,
    last_logits,
    logits_needed,
)
from abliterate.inference.generation import greedy_answers
from abliterate.inference.interventions import ablate, add
from abliterate.inference.layer_directions import layer_units, leak_by_layer
from abliterate.models.device_placement import Placement, devices
from abliterate.models.embedding_rows import require_token
from abliterate.models.loading import LoadedModel
from abliterate.models.quantized_loading import quantization
from abliterate.prompts.chat_template import ChatFormat
from abliterate.writers import decoder_blocks, find_writers, stream_width
from abliterate.writers.residual_stream import leak


def engine_of(loaded: LoadedModel) -> Engine:
    """What runs a model: the engine that it was opened with, else it is simply in memory."""
    engine: Engine = loaded.engine or InMemoryEngine(loaded)
    return engine


@dataclass(frozen=True)
class InMemoryEngine:
    """Passes of a model in memory; the ranks of its group run some prompts each."""

    reads_weights_every_pass: ClassVar[bool] = False
    loaded: LoadedModel

    @property
    def devices(self) -> str:
        return ", ".join(devices(self.loaded.model))

    def opened(self, placement: Placement) -> str:
        model = self.loaded.model
        name = self.loaded.checkpoint.name
        kind = str(model.dtype)
        if (small := quantization(model)) is not None:
            kind += f", {small['method']}" + (f" {small['bits']}bit" if small["bits"] else "")
        return f"loaded {name} ({kind}, {placement.describe(model)})"

    def summary(self) -> dict[str, int] | None:
        return None

    def close(self) -> None:
        pass

    def last_logits(
        self,
        prompts: Mapping[str, Prompts],
        changes: Mapping[str, Change],
        batch_size: int | str = "auto",
        description: str = "prompts",
    ) -> dict[str, dict[str, Tensor]]:
        model, ranks = self.loaded.model, self.loaded.ranks
        return {
            name: {
                kind: all_last_logits(
                    model, rows, batch_size, under(model, change), description, ranks
                )
                for kind, rows in prompts.items()
            }
            for name, change in changes.items()
        }

    def resid_pre(
        self, prompts: Mapping[str, Prompts], positions: Sequence[int], batch_size: int | str
    ) -> ActivationReader:
        return InMemoryReader(self.loaded.model, prompts, positions, batch_size)

    def leak(self, direction: Tensor | DirectionSet, prompts: Prompts) -> float:
        model = self.loaded.model
        plan = find_writers(model)
        units = None
        if isinstance(direction, DirectionSet):
            units = layer_units(model, plan, direction)
        for ids in prompts:
            require_token(model, max(ids, default=0), "the prompts")
        device = model.get_input_embeddings().weight.device

        def leak_on(ids: Sequence[int]) -> float:
            batch = torch.tensor([ids], device=device)
            if isinstance(direction, DirectionSet):
                assert units is not None
                return leak_by_layer(model, units, batch)
            return leak(model, direction, batch, plan.blocks)

        return max(leak_on(ids) for ids in progress(prompts, "verify: prompts", total=len(prompts)))

    def candidates_at_once(self, tokens: int) -> int:
        return 1 << 20  # they run one after the other

    def candidate_bytes(self, tokens: int) -> int:
        return 0

    def run_candidates(
        self, runs: Sequence[CandidateRun], batch_size: int | str, description: str
    ) -> None:
        for run in runs:
            self._run_candidates(run, batch_size, description)

    def _run_candidates(self, run: CandidateRun, batch_size: int | str, description: str) -> None:
        """One candidate after the other on each batch: what faster ways have to agree with."""
        model = self.loaded.model
        vectors: Sequence[Tensor] = () if run.vectors is None else list(run.vectors)
        layers = [None] * len(vectors) if run.layers is None else run.layers

        def on_batch(batch: Batch) -> None:
            rows = [run.rows[index] for index in batch.rows]
            if run.baseline is not None:
                run.baseline(last_logits(model, batch), rows)
            for index, change in enumerate(zip(vectors, layers, strict=True)):
                with under(model, change):
                    logits = last_logits(model, batch)
                if run.use is not None:
                    run.use(logits[None], [index], rows)

        with torch.inference_mode():
            prompts = [run.prompts[row] for row in run.rows]
            for_each_batch(model, prompts, on_batch, batch_size, description)

    def collector(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    @contextmanager
    def in_memory(self, option: str = "", change: Change = None) -> Iterator[PreTrainedModel]:
        with under(self.loaded.model, change):
            yield self.loaded.model

    def require_answers(self, option: str = "", instead: str = "") -> None:
        pass

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
        return greedy_answers(
            self.loaded,
            prompts,
            max_new_tokens,
            batch_size,
            description,
            on_answer,
            done,
            chat,
            ends,
            settled,
            on_first,
        )


@dataclass(frozen=True)
class InMemoryReader:
    """Runs the prompts that are asked for, each time that they are."""

    model: PreTrainedModel
    prompts: Mapping[str, Prompts]
    positions: Sequence[int]
    batch_size: int | str = "auto"

    @property
    def shape(self) -> tuple[int, int, int]:
        width = stream_width(self.model, find_writers(self.model))
        return len(self.positions), len(decoder_blocks(self.model)), width

    def read(
        self,
        kind: str,
        rows: range,
        use: Callable[[BatchActivations], None],
        description: str = "extract",
    ) -> None:
        def shifted(batch: BatchActivations) -> None:
            given_rows = tuple(rows[index] for index in batch.rows)
            use(BatchActivations(given_rows, batch.logits, batch.activations))

        chosen = [self.prompts[kind][row] for row in rows]
        collect_activations(
            self.model, chosen, self.positions, shifted, self.batch_size, description
        )


def collect_activations(
    model: PreTrainedModel,
    prompts: Prompts,
    positions: Sequence[int],
    use: Callable[[BatchActivations], None],
    batch_size: int | str = "auto",
    description: str = "extract",
) -> None:
    """Run ``prompts`` once and call ``use`` on what each batch shows."""
    needed = logits_needed(model, positions)
    with torch.inference_mode(), capture_resid_pre(model, positions) as captured:

        def run(batch: Batch) -> None:
            logits = last_logits(model, batch, needed)
            last = logits if needed == 1 else logits[:, -1]
            use(BatchActivations(batch.rows, last, captured()))

        for_each_batch(model, prompts, run, batch_size, description)


def under(model: PreTrainedModel, change: Change) -> AbstractContextManager[None]:
    """The intervention that a change is."""
    if change is None:
        return nullcontext()
    vector, layer = change
    if isinstance(vector, DirectionSet) or layer is None:
        return ablate(model, vector)
    return add(model, vector, layer)
