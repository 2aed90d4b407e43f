"""Tokens of answers from recorded kernels, on CUDA.

A token of some rows takes a GPU less time than Python takes to launch its kernels: 10 ms of 102 for
32 rows of a model of 7B shape on an H200. So the pass that says one token is recorded once, as a
CUDA graph, and replayed for every further token. What it reads and writes keeps its place: keys and
values lie in tensors that have room for the whole answer, and a mask says which tokens of them are
there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from abliterate.console import log
from abliterate.inference.forward import is_tensor_parallel, left_pad
from abliterate.inference.replayable_hooks import all_replayable
from abliterate.inference.roomy_cache import is_plain, roomy_cache, take
from abliterate.inference.rounding import same_logits
from abliterate.inference.token_batches import out_of_memory
from abliterate.inference.trials import FAILURES, first_tokens
from abliterate.models.library_versions import cache_name
from abliterate.models.model_classes import text_config
from abliterate.models.quantized_loading import is_quantized

# Records what a function launches on a device; what it returns launches that again.
Recorder = Callable[[Callable[[], None], torch.device], Callable[[], None]]

# Fewer tokens than this are said sooner than recorded.
WORTH = 16
# Masks are as wide as a multiple of this, which attention's kernels take without another copy.
_ALIGNED = 16
# Attention that takes a mask of every row, query and key.
_MASKED = ("sdpa", "eager")
_KINDS = {"full_attention", "sliding_attention"}
# Tokens of the two prompts that the way is tried out on.
_TRIAL = 7, 14
# What a configuration may call the length of its table of positions.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")

# How a model computed when it was tried, and with room for how many tokens; 0 where it failed.
_tried: WeakKeyDictionary[PreTrainedModel, tuple[Any, int]] = WeakKeyDictionary()


def cuda_graph(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record a CUDA graph; ``step`` has run before, which makes what is made once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):  # of several, it is the current one that records
        own, stream = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                step()
        finally:
            torch.cuda.set_stream(own)  # a recording that fails does not give it back

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay


RECORDERS: dict[str, Recorder] = {"cuda": cuda_graph}


class NotRecordedError(Exception):
    """A pass cannot be recorded, or not under its hooks.

    Attributes:
        ids: all tokens so far, ``[rows, tokens]``.
        cache: keys and values of all but the last.
    """

    def __init__(self, why: object, ids: Tensor, cache: DynamicCache) -> None:
        super().__init__(str(why))
        self.ids, self.cache = ids, cache


class RecordedSteps:
    """The next tokens of some answers.

    Args:
        model: the model, under the hooks that it will keep until the last token.
        cache: keys and values of all tokens but the last; its layers are emptied.
        ids: ``[rows, tokens]``, padded on the left.
        mask: of the first of these, ``[rows, up to tokens]``; what follows is there.
        room: how many tokens may be said.
        record: how a pass is recorded.

    Attributes:
        logits: ``[rows, vocabulary]`` that the newest tokens come from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: DynamicCache,
        ids: Tensor,
        mask: Tensor,
        room: int,
        record: Recorder,
    ) -> None:
        self._model: Any = model
        self._record = record
        self._replay: Callable[[], None] | None = None
        rows, known = ids.shape
        self._known, self._total = known, known + room
        total = -(-self._total // _ALIGNED) * _ALIGNED
        self._tokens = ids.new_zeros(rows, total)
        self._tokens[:, :known] = ids
        told = torch.cat([mask, mask.new_ones(rows, known - mask.shape[1])], dim=1)
        # Where the token that is read next stands, in its tensors and in its text.
        self._at = torch.tensor([known - 1], device=ids.device)
        self._positions = told.sum(1, keepdim=True) - 1
        self._seen = told.new_zeros(rows, 1, 1, total, dtype=torch.bool)
        self._seen[:, 0, 0, :known] = told.bool()
        self._columns = torch.arange(total, device=ids.device)
        self._windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
        self._cache = DynamicCache(config=text_config(model))
        self._cache.layers = [
            _FixedLayer(layer, total, self._at, known - 1) for layer in cache.layers
        ]
        self.logits: Tensor | None = None

    def say(self, count: int) -> Tensor:
        """Say ``count`` more tokens; all tokens there are now, ``[rows, tokens]``.

        Raises:
            NotRecordedError: recording failed; what has been said until then holds.
        """
        for _ in range(count):
            if self._known >= self._total:
                raise ValueError("there is no room for another token")
            try:
                self._next()
            except FAILURES as error:
                if out_of_memory(error):
                    raise
                raise NotRecordedError(error, self.tokens, self.cache) from error
            self._known += 1
        return self.tokens

    @property
    def tokens(self) -> Tensor:
        """All tokens so far, ``[rows, tokens]``."""
        return self._tokens[:, : self._known]

    def _next(self) -> None:
        if self.logits is None:  # what is made once, hooks' copies of directions, is made here
            self._step()
            return
        if self._replay is None:
            self._replay = self._record(self._step, self._tokens.device)
        self._replay()

    def put(self, tokens: Tensor) -> None:
        """Go on from other tokens ``[rows]`` than those said last."""
        self._tokens[:, self._known - 1] = tokens

    @property
    def cache(self) -> DynamicCache:
        """Keys and values of all tokens but the last, as they lie here."""
        held, end = roomy_cache(text_config(self._model)), self._known - 1
        for layer, own, window in zip(held.layers, self._cache.layers, self._windows, strict=True):
            layer.lazy_initialization(own.keys, own.values)
            start = 0 if window is None else max(0, end - (window - 1))
            layer.keys, layer.values = own.keys[:, :, start:end], own.values[:, :, start:end]
            if window is not None:
                layer.cumulative_length = end
        return held

    def _step(self) -> None:
        """Read one token and say the next; nothing here depends on what tensors hold."""
        self._seen.index_fill_(3, self._at, True)
        logits = self._model(
            input_ids=self._tokens.index_select(1, self._at),
            attention_mask=self._masks(),
            position_ids=self._positions,
            use_cache=True,
            **{cache_name(): self._cache},
        ).logits[:, -1]
        self._at.add_(1)
        self._positions.add_(1)
        self._tokens.index_copy_(1, self._at, logits.argmax(-1, keepdim=True))
        self.logits = logits

    def _masks(self) -> Tensor | dict[str, Tensor]:
        """What attention takes: one mask, or one for each kind of layers."""
        found = {}
        for window in dict.fromkeys(self._windows):
            seen = self._seen
            if window is not None:
                seen = seen & (self._columns > self._at - window)
            found["full_attention" if window is None else "sliding_attention"] = self._taken(seen)
        return found if len(found) > 1 else found.popitem()[1]

    def _taken(self, seen: Tensor) -> Tensor:
        """A mask as ``sdpa`` takes it; ``eager`` attention adds it to its scores."""
        if text_config(self._model)._attn_implementation == "sdpa":
            return seen
        dtype = self._model.dtype
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


class _FixedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in tensors that keep their place, with room for all that will come.

    Args:
        layer: those there are, which are moved here.
        total: how many tokens there is room for.
        at: where the next token's go.
        end: the same as a number. A layer with a window holds the last tokens before it.
    """

    def __init__(self, layer: DynamicLayer, total: int, at: Tensor, end: int) -> None:
        super().__init__()
        self._at = at
        self.lazy_initialization(layer.keys, layer.values)
        keys, values = take(layer)
        self.keys = _with_room(keys, total, end)
        del keys
        self.values = _with_room(values, total, end)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put one token's keys and values in their place; all there is room for."""
        self.keys.index_copy_(2, self._at, key_states)
        self.values.index_copy_(2, self._at, value_states)
        return self.keys, self.values


def _with_room(held: Tensor, total: int, end: int) -> Tensor:
    """``held`` among zeros, up to ``end``: what a mask hides must be a number all the same."""
    whole = held.new_zeros(*held.shape[:2], total, held.shape[3])
    whole[:, :, end - held.shape[2] : end] = held
    return whole


def recorder(model: PreTrainedModel, device: torch.device, total: int) -> Recorder | None:
    """What records passes of ``model`` as it is now, with its hooks; None where that is not done.

    A replay launches kernels and runs no Python: hooks of others, which may do more than compute,
    keep a model from being recorded. Whether it says what it says otherwise is tried once a model,
    and again for more tokens.

    Args:
        model: the model.
        device: where it computes.
        total: tokens of a prompt and its answer.
    """
    record = RECORDERS.get(device.type)
    if record is None or text_config(model)._attn_implementation not in _MASKED:
        return None
    if is_tensor_parallel(model) or is_quantized(model):  # other libraries' kernels
        return None
    if not all_replayable(model):
        return None
    way = text_config(model)._attn_implementation, model.dtype
    known_way, known = _tried.get(model, (None, 0))
    if way != known_way or 0 < known < total:
        try:
            agrees = _try_out(model, record, total)
        except (*FAILURES, NotRecordedError) as error:
            log.debug("tokens are not recorded: %s", error)
            if out_of_memory(error):  # for two rows of so many tokens; a batch may be one
                return None
            agrees = False
        _tried[model] = way, total if agrees else 0
    return record if _tried[model][1] else None


def room(model: PreTrainedModel, known: int, wanted: int) -> int:
    """How many of ``wanted`` tokens may be said after ``known`` ones: a table of positions ends.

    Beyond its end a GPU's whole process would be lost, and some passes are replayed in vain.
    """
    for name in _POSITIONS:
        longest = getattr(text_config(model), name, None)
        if isinstance(longest, int):
            return min(wanted, longest - known)
    return wanted


def _has_known_masks(config: Any) -> bool:
    """Whether every layer sees all tokens before, or those within one window."""
    cache = DynamicCache(config=config)
    windows = {getattr(layer, "sliding_window", None) for layer in cache.layers} - {None}
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds and getattr(config, "attention_chunk_size", None) is not None:
        return False  # the library keeps chunks in layers with windows
    return is_plain(cache) and len(windows) < 2 and kinds <= _KINDS


def _try_out(model: Any, record: Recorder, total: int) -> bool:
    """Whether tokens that are replayed have the logits that ``generate`` gives them.

    With as much room behind them as will be: attention that counts from the end of its keys would
    miss the prompt. The first token runs, the second may as well while it is recorded; the third is
    a replay and nothing else.
    """
    if not _has_known_masks(text_config(model)):
        return False
    short, long = _TRIAL
    prompts = [list(range(3, 3 + short)), list(range(20, 20 + long))]
    batch = left_pad(model, prompts, [0, 1])
    with torch.inference_mode():
        said = first_tokens(model, batch, 4)
        begun = first_tokens(model, batch, 1)
        steps = RecordedSteps(
            model,
            begun[cache_name()],
            begun.sequences,
            batch.attention_mask,
            max(3, total - long - 1),
            record,
        )
        for token in (1, 2, 3):
            steps.put(said.sequences[:, long + token - 1])
            steps.say(1)
            assert steps.logits is not None
            if not same_logits(model, steps.logits, said.logits[token]):
                return False
    return True
