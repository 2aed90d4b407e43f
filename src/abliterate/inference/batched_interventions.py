"""Running the same prompts under many interventions, at little more than the cost of what changes.

Some things are not done again and again, each only where it leaves the result as it is (checked
once per model against plain full passes): several candidates share a batch, one direction per row;
the opening tokens that all prompts share run once per candidate, and their keys and values are
reused; ``add`` at layer ``l`` starts from the unmodified model's ``resid_pre`` at ``l``, so that
candidates of several layers join a batch one after the other; and only the last tokens' logits are
computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from abliterate.inference.candidate_batches import (
    Cache,
    Candidates,
    FastPathFlags,
    PromptBatch,
    expanded,
    shared_prefix,
)
from abliterate.inference.forward import (
    Batch,
    can_pad,
    does_not_fit,
    input_device,
    is_tensor_parallel,
    last_logits,
    left_pad,
)
from abliterate.inference.interventions import AblationSites, add_vectors, shifted
from abliterate.inference.partial_forward import last_token_only, recorded, rows_join_at_layer
from abliterate.inference.token_batches import TokenBudget, attempt, note_budget
from abliterate.metrics.logit_metrics import LogitMetric
from abliterate.models.device_placement import to_device
from abliterate.writers import WriterPlan, decoder_blocks, find_writers

_CACHE_BYTES = 1 << 30
# Further logits of a row, with their scores, take the memory of about this many tokens.
_TOKENS_PER_LOGITS = 16


class InterventionRunner:
    """A model, and what its prompts have in common.

    Attributes:
        model: the model.
        prefix: how many opening tokens all prompts share and a cache holds.
        budget: tokens per forward pass.
        tricks: what is saved.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        batch_size: int | str = "auto",
        tricks: FastPathFlags | None = None,
    ) -> None:
        self.model = model
        self.tricks = tricks or FastPathFlags()
        self._batch_size = batch_size
        self.start_budget()
        self.prefix = shared_prefix(prompts) if self.tricks.prefix and can_pad(model) else 0
        self._opening = list(prompts[0][: self.prefix])
        self._blocks = decoder_blocks(model)
        plan = find_writers(model)
        self._ablation = AblationSites(model, plan.sites)
        self._final = self._last_writers(plan)
        self._as_tuple = False
        self._base: Cache | None = None
        self._base_streams: tuple[Tensor, ...] = ()
        if self.prefix:
            cache = DynamicCache()
            with recorded(self._blocks) as recording:
                self._run(self._opening_batch(1), cache)
            self._base_streams = tuple(recording.streams)
            self._as_tuple = recording.as_tuple
            self._base = tuple((layer.keys, layer.values) for layer in cache.layers)

    def start_budget(self) -> None:
        """Find out anew how many tokens a batch may have."""
        device, in_step = input_device(self.model), is_tensor_parallel(self.model)
        self.budget = TokenBudget(device, self._batch_size, in_step=in_step, measure=True)

    def piece(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[int], keep: int = 1
    ) -> PromptBatch:
        """A batch of the prompts ``rows``."""
        return PromptBatch(left_pad(self.model, prompts, rows, self.prefix), keep)

    def baseline(self, piece: PromptBatch) -> tuple[PromptBatch, Tensor]:
        """Run the unmodified model.

        Returns:
            ``piece`` with the ``resid_pre`` from which ``add`` can start, and the logits
            ``[prompts, kept tokens, vocabulary]``.
        """
        cache = self._base and expanded(self._base, len(piece.batch.rows))
        with recorded(self._blocks) as recording:
            logits = self._run(piece.batch, cache, piece.keep)
        if not self.tricks.resume:
            return piece, logits
        self._as_tuple = recording.as_tuple
        return replace(piece, streams=tuple(recording.streams)), logits

    def baselines(self, piece: PromptBatch) -> list[tuple[PromptBatch, Tensor]]:
        """The same in one batch, or in several where memory needs it."""
        runs: list[tuple[PromptBatch, Tensor]] = []
        if not self._fits(lambda: runs.append(self.baseline(piece)), *piece.batch.input_ids.shape):
            return [run for half in piece.halves() for run in self.baselines(half)]
        return runs

    def prefill(self, vectors: Tensor, layers: Sequence[int] | None = None) -> Candidates:
        """Candidates ``[candidates, d_model]`` with their opening tokens run, if they are shared.

        Args:
            vectors: unit vectors to ablate, or vectors to add.
            layers: None to ablate, else where to add each, ascending.
        """
        where = None if layers is None else tuple(layers)
        candidates = Candidates(vectors, where, resumed=self.tricks.resume)
        if self._base is None:
            return candidates
        parts: list[tuple[Candidates, Cache]] = []
        done = 0
        while done < len(vectors):
            limit = self.budget.share(1, self.prefix) if self.tricks.rows else 1
            some = candidates.pick(slice(done, done + limit))
            batch = self._opening_batch(len(some))
            cache = DynamicCache()

            def run(some: Candidates = some, batch: Batch = batch, cache: Any = cache) -> None:
                with self._changed(some, 1, self._base_streams):
                    self._run(batch, cache)

            if not self._fits(run, len(some), self.prefix):
                continue
            found = {
                index: (layer.keys, layer.values)
                for index, layer in enumerate(cache.layers)
                if some.active(index)
            }
            base = enumerate(self._base)
            parts.append((some, tuple(found.get(index, same) for index, same in base)))
            done += len(some)
        return replace(candidates, cache=self._joined(parts))

    @staticmethod
    def _joined(parts: Sequence[tuple[Candidates, Cache]]) -> Cache:
        """The caches of candidates one after the other."""
        if len(parts) == 1:
            return parts[0][1]
        joined = []
        for index in range(len(parts[0][1])):
            own = [cache[index] for some, cache in parts if some.active(index)]
            keys, values = zip(*(own or [parts[0][1][index]]), strict=True)
            joined.append((torch.cat(keys), torch.cat(values)))
        return tuple(joined)

    def most_cached(self) -> int:
        """How many candidates' caches fit into a memory that is small beside a model's."""
        if self._base is None:
            return 1 << 20
        each = sum(t.numel() * t.element_size() for layer in self._base for t in layer)
        return max(1, _CACHE_BYTES // each)

    def measure(self, candidates: Candidates, piece: PromptBatch, measure: LogitMetric) -> Tensor:
        """``measure`` of every candidate on every prompt of ``piece``.

        Returns:
            float64 ``[candidates, prompts]`` on the CPU.
        """
        n_prompts, width = piece.batch.input_ids.shape
        width += (piece.keep - 1) * _TOKENS_PER_LOGITS
        found: list[Tensor] = []
        done = 0
        while done < len(candidates):
            some = candidates.pick(
                slice(done, done + self._at_once(candidates, done, piece, width))
            )
            result: list[Tensor] = []

            def run(some: Candidates = some, result: list[Tensor] = result) -> None:
                logits = self.logits(some, piece)
                result.append(measure(logits, piece.batch.rows).cpu())

            rows = len(some) * n_prompts
            started = time.perf_counter()
            if len(some) == 1 and n_prompts > 1:  # what is left to make smaller is the prompts
                ran = attempt(run)
                if not ran:
                    halves = [self.measure(some, half, measure) for half in piece.halves()]
                    result = [torch.cat(halves, dim=1)]
            elif not (ran := self._fits(run, rows, width)):
                continue
            if ran:
                self.budget.ran(rows * width, time.perf_counter() - started)
            found += result
            done += len(some)
        return torch.cat(found)

    def _at_once(self, candidates: Candidates, first: int, piece: PromptBatch, width: int) -> int:
        """How many candidates, from ``first``, share a batch.

        Those that join it late do not run on all blocks: on a CPU, where batches are sized by what
        they cost, they count by what they run on, up to twice as many.
        """
        if not self.tricks.rows:
            return 1
        rows = len(piece.batch.rows)
        limit = self.budget.share(rows, width)
        joined = candidates.layers is not None and candidates.resumed and bool(piece.streams)
        if not joined or self.budget.rows is not None or self.budget.device.type != "cpu":
            return limit
        assert candidates.layers is not None
        blocks = len(self._blocks)
        # In blocks that a candidate runs on: shrinks to one where memory has run out.
        budget, count, taken = self.budget.tokens * blocks // (rows * width), 0, 0
        for layer in candidates.layers[first : first + 2 * limit]:
            taken += blocks - layer
            if taken > budget and count:
                break
            count += 1
        return max(limit, count)

    def _last_writers(self, plan: WriterPlan) -> list[nn.Module]:
        """Modules of the last block whose output is added to the stream, token by token.

        Attention has to see all tokens up to its own last projection; an MLP, with or without
        experts, is a child of the block and sees each token alone.
        """
        names = {id(module): name for name, module in self.model.named_modules()}
        inside = names[id(self._blocks[-1])] + "."
        found = {}
        for writer in plan.writers:
            owner = writer.parameter.rpartition(".")[0]
            if writer.bias or not owner.startswith(inside):
                continue
            if writer.kind in ("mlp", "expert"):
                owner = inside + owner.removeprefix(inside).split(".")[0]
            elif writer.kind != "attention":
                continue
            found[owner] = self.model.get_submodule(owner)
        return list(found.values())

    def _fits(self, run: Callable[[], None], rows: int, width: int) -> bool:
        """Run a batch; False, and a smaller budget, where memory ran out."""
        tokens = self.prefix + width
        ran = self.budget.try_batch(
            run, rows, rows * width, partial(does_not_fit, tokens, self.budget.device)
        )
        note_budget(self.model, self.budget)
        return ran

    def logits(self, candidates: Candidates, piece: PromptBatch) -> Tensor:
        """Logits ``[candidates, prompts, kept tokens, vocabulary]`` in one forward pass."""
        n, k = len(candidates), len(piece.batch.rows)
        b = piece.batch
        batch = Batch(
            b.rows * n,
            b.input_ids.repeat(n, 1),
            b.attention_mask.repeat(n, 1),
            b.position_ids.repeat(n, 1),
            b.lengths * n,
        )
        cache = candidates.cache and expanded(candidates.cache, k)
        with ExitStack() as stack:
            stack.enter_context(self._changed(candidates, k, piece.streams))
            if self.tricks.last and piece.keep == 1:
                stack.enter_context(last_token_only(self._final))
            logits = self._run(batch, cache, piece.keep)
        return logits.view(n, k, *logits.shape[1:])

    def _run(self, batch: Batch, cache: DynamicCache | None, keep: int = 1) -> Tensor:
        with torch.inference_mode():
            logits = last_logits(self.model, batch, keep, cache)
        return logits.unsqueeze(1) if keep == 1 else logits

    def _opening_batch(self, rows: int) -> Batch:
        return left_pad(self.model, [self._opening] * rows, range(rows))

    @contextmanager
    def _changed(
        self, candidates: Candidates, prompts: int, streams: Sequence[Tensor]
    ) -> Iterator[None]:
        """The model under ``candidates``, each of them for ``prompts`` rows in a row."""
        n, layers = len(candidates), candidates.layers
        vectors = candidates.vectors.repeat_interleave(prompts, 0) if n > 1 else candidates.vectors
        vectors = vectors if n > 1 else vectors[0]
        change: AbstractContextManager[None]
        if layers is None:
            change = self._ablation.under(vectors)
        elif self.tricks.resume and streams:
            starts = {}
            first_start = streams[layers[0]]  # they go to the device once, not with every layer
            vectors = to_device(vectors.to(first_start.dtype), first_start.device)
            for layer in set(layers):
                first, count = layers.index(layer), layers.count(layer)
                start = streams[layer].repeat(count, *([1] * (streams[layer].ndim - 1)))
                own = vectors[first * prompts : (first + count) * prompts] if n > 1 else vectors
                starts[layer] = shifted(start, own)
            counts = [prompts * candidates.active(index) for index in range(len(self._blocks))]
            change = rows_join_at_layer(self._blocks, counts, starts, self._as_tuple)
        else:
            assert len(set(layers)) == 1
            change = add_vectors(self._blocks[layers[0]], vectors)
        with change:
            yield
