"""Greedy decoding of one left-padded batch; ended rows leave it, passes are recorded on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from abliterate.console import log
from abliterate.errors import one_line
from abliterate.inference.answer_watch import LOOK_ACCELERATOR, Watch
from abliterate.inference.decoding import decoding_config, plain_decoding
from abliterate.inference.engine import OnFirstLogits, Settled
from abliterate.inference.forward import Batch, padding_token
from abliterate.inference.prompt_pass import PromptPass, agrees, can_join
from abliterate.inference.recorded_steps import (
    WORTH,
    NotRecordedError,
    RecordedSteps,
    Recorder,
    recorder,
    room,
)
from abliterate.inference.roomy_cache import can_cut, cut_start, is_plain, roomy_cache
from abliterate.inference.token_batches import out_of_memory
from abliterate.models.device_placement import to_device
from abliterate.models.library_versions import cache_name
from abliterate.models.loading import LoadedModel
from abliterate.models.model_classes import text_config

# So many tokens of answers are worth trying out, once a model, whether room for keys and values
# changes nothing.
_ROOM_WORTH = 4096


class BatchDecoder:
    """Greedy decoding of one batch after another."""

    def __init__(
        self,
        loaded: LoadedModel,
        max_new_tokens: int,
        mix: bool,
        stops: list[int],
        settled: Settled | None = None,
        on_first: OnFirstLogits | None = None,
    ) -> None:
        self.model: Any = loaded.model
        self.max_new_tokens = max_new_tokens
        self.stops = stops
        self.mix = mix
        self.settled = settled
        self.on_first = on_first
        self._may_record = True

    def run(
        self,
        batch: Batch,
        keep: Callable[[int, list[int]], None],
        reading: PromptPass | None = None,
        longest: int | None = None,
    ) -> None:
        """Answer ``batch``; ``keep`` gets each row as soon as it ends.

        With ``reading``, the prompts' keys and values come from there; ``longest`` is another
        longest answer.
        """
        longest = longest or self.max_new_tokens
        ids, mask, rows = batch.input_ids, batch.attention_mask, list(batch.rows)
        width, cache = ids.shape[1], reading.cache(rows) if reading else None
        worth = self.mix and len(rows) * longest >= _ROOM_WORTH
        has_read = cache is not None
        if cache is None and worth and can_join(self.model) and agrees(self.model):
            cache = roomy_cache(text_config(self.model))
        lengths = dict(zip(rows, batch.lengths, strict=True))
        answers: dict[int, list[int]] = {row: [] for row in rows}
        wanted = self.mix and self._may_record and longest > WORTH
        record = recorder(self.model, ids.device, width + longest) if wanted else None
        while rows:
            grown = ids.shape[1] - width
            left = longest - grown
            watch = Watch(self.stops, {row: answers[row][:grown] for row in rows}, ids, keep,
                           shrink=self.mix, settled=self.settled)  # fmt: skip
            recorded = room(self.model, ids.shape[1], left) if record is not None else 0
            if record is None or recorded < WORTH:
                ids, cache = self._generated(ids, mask, cache, left, watch, rows)
            elif not has_read or (self.on_first is not None and not grown):
                ids, cache = self._generated(ids, mask, cache, 1, watch, rows)
                has_read, record = True, record if is_plain(cache) else None
            else:
                try:
                    ids, cache = self._replayed(ids, mask, cache, recorded, watch, record)
                except NotRecordedError as error:
                    log.info("tokens are not replayed from recorded kernels: %s", error)
                    ids, cache, record = error.ids, error.cache, None
                    self._may_record = False
                except Exception as error:
                    if len(rows) > 1 or not out_of_memory(error):
                        raise  # fewer rows may fit
                    # What recording takes beside the answer is too much: its tokens are read again.
                    log.info("an answer is not recorded: %s", one_line(error))
                    cache, record = None, None
                    self._may_record = False
                    continue
            answers = watch.answers
            watch.look(ids)
            going = [index for index, row in enumerate(rows) if row not in watch.ended]
            if not going or ids.shape[1] - width >= longest:
                for index in going:
                    # Some devices run a token too far before they learn that it is the end.
                    keep(rows[index], answers[rows[index]][: ids.shape[1] - width])
                return
            # Go on with the others alone, and without the padding that none of them needs.
            rows = [rows[index] for index in going]
            padding = width - max(lengths[row] for row in rows) if self.mix else 0
            padding = padding if can_cut(cache) else 0
            chosen = to_device(torch.tensor(going), ids.device)
            grown = ids.shape[1] - mask.shape[1]
            mask = torch.cat([mask, mask.new_ones(len(ids), grown)], dim=1)
            if watch.ended or padding:
                cache = _select(cache, chosen, padding)
                ids, mask = ids[chosen, padding:], mask[chosen, padding:]
            width -= padding

    def _generated(
        self, ids: Tensor, mask: Tensor, cache: Any, count: int, watch: Watch, rows: Sequence[int]
    ) -> tuple[Tensor, Any]:
        """Up to ``count`` more tokens by the library; all tokens, and the cache if there is one."""
        said = sum(map(len, watch.answers.values()))
        with plain_decoding(self.model), self._noting_first(rows, said):
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                **{cache_name(): cache},
                generation_config=decoding_config(
                    self.stops,
                    count,
                    pad_token_id=padding_token(self.model, *self.stops),
                    return_dict_in_generate=True,
                ),
                stopping_criteria=StoppingCriteriaList([watch]),
            )
        return output.sequences, getattr(output, cache_name(), None)

    def _replayed(
        self, ids: Tensor, mask: Tensor, cache: Any, count: int, watch: Watch, record: Recorder
    ) -> tuple[Tensor, Any]:
        """The same from recorded kernels."""
        steps = RecordedSteps(self.model, cache, ids, mask, count, record)
        while count and not watch.is_over:
            turn = min(count, LOOK_ACCELERATOR)
            watch.look(ids := steps.say(turn))
            count -= turn
        return ids, steps.cache

    @contextmanager
    def _noting_first(self, rows: Sequence[int], said: int) -> Iterator[None]:
        """Hand over what the first pass inside gives, if nothing has been ``said`` before it."""
        on_first = self.on_first
        if on_first is None or said:
            yield
            return

        def note(module: Any, args: Any, output: Any) -> None:
            handle.remove()
            on_first(rows, output.logits[:, -1].cpu())

        handle = self.model.register_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()


def _select(cache: Any, rows: Tensor, padding: int = 0) -> Any:
    """The cache of some rows without their first tokens, or None where rows cannot be chosen: the
    tokens are then read again."""
    if not is_plain(cache):
        return None
    if padding:
        cut_start(cache, padding)
    cache.batch_select_indices(rows)
    return cache
