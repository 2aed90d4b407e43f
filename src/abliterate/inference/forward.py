"""Running prompts through a model in batches: last-token logits and ``resid_pre``."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from abliterate.console import progress_bar
from abliterate.distributed.rank_group import ALONE, RankGroup
from abliterate.errors import UnsupportedArchitectureError
from abliterate.inference.rounding import (
    COPIES,
    computes_finely,
    off_by,
    rounding_of_batches,
    same_logits,
)
from abliterate.inference.token_batches import TokenBudget, group_rows, note_budget
from abliterate.models.device_placement import to_device
from abliterate.models.embedding_rows import embedding_rows, require_token
from abliterate.models.model_classes import text_config
from abliterate.writers import decoder_blocks, find_writers, stream_width

_PADDABLE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the left to a common length.

    Attributes:
        rows: index of each row in the caller's list.
        input_ids: ``[batch, tokens]``.
        attention_mask: ``[batch, prefix + tokens]``, 0 on padding; ``prefix`` is how many leading
            tokens a key/value cache holds, 0 without one.
        position_ids: ``[batch, tokens]``, ``prefix`` at each prompt's first own token.
        lengths: how many of ``tokens`` are each prompt's own. Known here, so that whether there is
            padding need not be asked of the device.
    """

    rows: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    lengths: tuple[int, ...]

    @property
    def is_padded(self) -> bool:
        return min(self.lengths) < self.input_ids.shape[1]


def _accepts(model: PreTrainedModel, argument: str) -> bool:
    return argument in _parameters(type(model).forward)


@cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


_paddable: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
_homes: WeakKeyDictionary[PreTrainedModel, torch.device] = WeakKeyDictionary()


def can_pad(model: PreTrainedModel) -> bool:
    """Whether left padding leaves a row's result as it is.

    Only where every layer is attention (recurrent and convolution states run over the padding) and
    positions can be given (learned or ALiBi positions would count it); and then tried, once a
    model, because some architectures take both and still let padding through.
    """
    if model not in _paddable:
        config = text_config(model)
        layers = set(getattr(config, "layer_types", None) or _PADDABLE_LAYERS)
        promised = (
            layers <= _PADDABLE_LAYERS
            and not getattr(model, "_is_stateful", False)
            and _accepts(model, "position_ids")
            and _accepts(model, "attention_mask")
        )
        _paddable[model] = promised and _padding_is_masked(model)
    return _paddable[model]


def stand_in(model: PreTrainedModel, device: torch.device, paddable: bool) -> None:
    """Say of a model whose weights come and go where it computes and whether rows can be padded."""
    _homes[model], _paddable[model] = device, paddable


@torch.inference_mode()
def _padding_is_masked(model: PreTrainedModel) -> bool:
    ids = list(range(3, 43))
    alone = last_logits(model, left_pad(model, [ids[:16]], [0]), 8)[0]
    padded = last_logits(model, left_pad(model, [ids[:16], ids], [0, 1]), 8)[0]
    if same_logits(model, padded, alone):
        return True
    if computes_finely(model):
        return False
    copies = last_logits(model, left_pad(model, [ids[:16]] * COPIES, range(COPIES)), 8)
    apart = [off_by(found, own, False) for found, own in zip(padded, alone, strict=True)]
    return max(apart) <= rounding_of_batches(copies, alone)


def left_pad(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[int],
    prefix: int = 0,
) -> Batch:
    """Left-pad the prompts of ``rows`` and move them to the model's device.

    Args:
        model: the model.
        prompts: token ids.
        rows: which of them.
        prefix: leave out this many leading tokens, which a key/value cache will hold.

    Raises:
        CheckpointError: the embedding has no row for a token.
    """
    lengths = tuple(len(prompts[row]) - prefix for row in rows)
    width = max(lengths)
    fill = padding_token(model, getattr(text_config(model), "pad_token_id", None))
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        own = prompts[row][prefix:]
        ids[index, width - len(own) :] = torch.tensor(own)
        mask[index, width - len(own) :] = 1
    require_token(model, int(ids.max()), "the prompts")
    positions = (mask.cumsum(1) - 1).clamp(min=0) + prefix
    mask = torch.cat([mask.new_ones(len(rows), prefix), mask], dim=1)
    place = input_device(model)
    ids, mask, positions = (to_device(tensor, place) for tensor in (ids, mask, positions))
    return Batch(tuple(rows), ids, mask, positions, lengths)


def padding_token(model: PreTrainedModel, *wanted: Any) -> int:
    """The first of some ids that the embedding has a row for, else 0.

    Any valid id does: the mask keeps padding out of attention.
    """
    rows = embedding_rows(model)
    known = (id for id in wanted if isinstance(id, int) and id >= 0 and (not rows or id < rows))
    return next(known, 0)


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go."""
    if model in _homes:
        return _homes[model]
    embedding: Any = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    if device.type == "meta":  # accelerate fetches the weight where it runs
        return torch.device(getattr(embedding._hf_hook, "execution_device", "cpu"))
    return device


def is_tensor_parallel(model: PreTrainedModel) -> bool:
    """Whether other ranks hold parts of the model, and run every pass along with this one."""
    return (getattr(model, "_tp_size", None) or 1) > 1


def for_each_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    run: Callable[[Batch], None],
    batch_size: int | str = "auto",
    description: str = "prompts",
    grow: bool = True,
) -> None:
    """Call ``run`` on batches that cover every prompt once.

    Rows are grouped by length within a token budget, which adapts; a batch that runs out of memory
    is split and tried again, down to a single row.

    Args:
        model: the model.
        prompts: token ids.
        run: called with each batch.
        batch_size: prompts per forward pass, or ``auto``.
        description: shown beside the progress bar.
        grow: ``auto`` may pass its starting budget (not where answers grow beyond the prompts).

    Raises:
        UsageError: ``batch_size`` is neither ``auto`` nor a positive number, or a single prompt
            does not fit into memory.
    """
    device = input_device(model)
    budget = TokenBudget(device, batch_size, grow, is_tensor_parallel(model), measure=grow)
    mix = can_pad(model)
    left = list(range(len(prompts)))
    planned: list[tuple[int, ...]] = []
    size = budget.tokens
    with progress_bar(description, len(prompts)) as bar:
        while left:
            if not planned or budget.tokens != size:
                lengths = [len(prompts[row]) for row in left]
                groups = group_rows(lengths, budget, mix)
                # Longest last in the list, first out: what does not fit shows at once.
                planned = [tuple(left[index] for index in group) for group in groups]
                size = budget.tokens
            batch = left_pad(model, prompts, planned.pop())
            rows, width = batch.input_ids.shape
            started = time.perf_counter()
            too_long = partial(does_not_fit, len(prompts[batch.rows[0]]), device)
            if not budget.try_batch(partial(run, batch), rows, rows * width, too_long):
                planned = []
                continue
            budget.ran(rows * width, time.perf_counter() - started)
            note_budget(model, budget)
            done = set(batch.rows)
            left = [row for row in left if row not in done]
            bar.update(len(batch.rows))


def does_not_fit(tokens: int, device: torch.device) -> str:
    """What to say where a single prompt runs out of memory."""
    return (
        f"a single prompt of {tokens} tokens does not fit into the memory of {device.type}: use a "
        "smaller --dtype or another --device"
    )


def logits_needed(model: PreTrainedModel, positions: Sequence[int]) -> int:
    """How many last tokens' logits to ask for, so that every block sees ``positions``.

    One, but where layers share keys and values (Gemma 3n, Gemma 4): those that read them run on no
    more tokens than logits are wanted of.
    """
    shares = getattr(text_config(model), "num_kv_shared_layers", None)
    return -min(positions) if shares else 1


def last_logits(model: PreTrainedModel, batch: Batch, keep: int = 1, past: Any = None) -> Tensor:
    """Logits ``[batch, vocabulary]`` at the last prompt token, in the model's dtype.

    The vocabulary projection runs for that token alone where the architecture allows it.

    Args:
        model: the model.
        batch: its inputs.
        keep: return ``[batch, keep, vocabulary]`` of the last tokens if more than one.
        past: keys and values of the leading tokens that ``batch`` leaves out.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    padded = batch.is_padded
    if padded:
        inputs["attention_mask"] = batch.attention_mask
    if (padded or past is not None) and _accepts(model, "position_ids"):
        inputs["position_ids"] = batch.position_ids
    if _accepts(model, "logits_to_keep"):
        inputs["logits_to_keep"] = keep
    if past is not None:
        name = "cache" if _accepts(model, "cache") else "past_key_values"
        inputs |= {name: past, "use_cache": True}
    elif _accepts(model, "use_cache"):
        inputs["use_cache"] = False
    logits: Tensor = model(**inputs).logits[:, -keep:]
    return logits[:, -1] if keep == 1 else logits


def all_last_logits(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    batch_size: int | str = "auto",
    intervention: AbstractContextManager[None] | None = None,
    description: str = "prompts",
    ranks: RankGroup | None = None,
) -> Tensor:
    """Last-token logits ``[n, vocabulary]`` on the CPU, under an intervention if one is given.

    The ranks of a ``team`` run some of the prompts each, and all get all logits.
    """
    ranks = ranks or ALONE
    own = ranks.split(prompts)
    out: list[Tensor | None] = [None] * len(own)

    def run(batch: Batch) -> None:
        for row, logits in zip(batch.rows, last_logits(model, batch).cpu(), strict=True):
            out[row] = logits

    with ranks.fail_together(), torch.inference_mode(), intervention or nullcontext():
        for_each_batch(model, own, run, batch_size, description)
    rows = [logits for logits in out if logits is not None]
    return ranks.gather_rows(torch.stack(rows) if rows else torch.empty(0, 0))


@contextmanager
def capture_resid_pre(
    model: PreTrainedModel, positions: Sequence[int]
) -> Iterator[Callable[[], Tensor]]:
    """Record ``resid_pre`` of every block at ``positions`` during the forward passes inside.

    Yields:
        A function that returns the last pass's ``[batch, n_positions, n_layers, d_model]``; the
        mean over streams, where an architecture has several.
    """
    can_pad(model)  # tried out before the hooks are in place
    plan = find_writers(model)
    blocks, width = decoder_blocks(model), stream_width(model, plan)
    seen: dict[int, Tensor] = {}
    where, shape = torch.tensor(positions), torch.Size()
    # On the device once: as a list they would travel there at every block.
    moved: dict[torch.device, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal shape
        shape = (args[0] if args else kwargs["input_ids"]).shape

    def hook(layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = block_input(args, kwargs)
            if hidden.device not in moved:
                moved[hidden.device] = to_device(where, hidden.device)
            streams = token_streams(hidden, shape, width)[:, moved[hidden.device]]
            seen[layer] = streams.mean(2) if streams.shape[2] > 1 else streams[:, :, 0]

        return record

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(note, with_kwargs=True).remove)
        for layer, block in enumerate(blocks):
            handle = block.register_forward_pre_hook(hook(layer), with_kwargs=True)
            stack.callback(handle.remove)

        def result() -> Tensor:
            layers = [seen[layer] for layer in range(len(blocks))]
            return torch.stack([layer.to(layers[0].device) for layer in layers], dim=2)

        yield result


def token_streams(hidden: Tensor, shape: Sequence[int], width: int) -> Tensor:
    """The residual stream as ``[batch, tokens, streams, d_model]``.

    Most architectures have one stream; hyper-connections and AltUp have several, side by side in
    the last axis or on an axis of their own.

    Raises:
        UnsupportedArchitectureError: the blocks see other positions than the prompt's tokens (byte
            patches, padding of the model's own).
    """
    batch, tokens = shape
    if hidden.ndim == 4 and hidden.shape[:2] != (batch, tokens) and hidden.shape[1] == batch:
        hidden = hidden.movedim(0, 2)
    if hidden.shape[0] != batch or hidden.shape[1] > tokens:
        raise UnsupportedArchitectureError(
            f"the decoder blocks see {list(hidden.shape[:-1])} positions for {list(shape)} tokens: "
            "there is no resid_pre of a token to extract"
        )
    return hidden.reshape(batch, hidden.shape[1], -1, width)


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream among a block's arguments."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden
