"""How many tokens go through the model at once, and which rows share a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from abliterate.errors import UsageError
from abliterate.inference.device_memory import MemoryMeter, find_meter

# Tokens of "auto" on a CPU, for every two threads: from 1024 to 4096 a token costs the same within
# 3%, and the activations of more leave the caches. Never by the clock: which prompts share a batch
# decides on the last bits, and the same command is to give the same ones.
_CPU, _LARGEST_CPU = 1024, 16384
# Where "auto" starts on an accelerator; it doubles from there while that is faster.
_START_ACCELERATOR = 32768
_LARGEST_ACCELERATOR = 1 << 20
# A batch costs as much as this many more tokens: launches on an accelerator, and on a CPU reading
# the weights once more. Below that, padding a row is cheaper than giving it a batch of its own.
_OVERHEAD = {"cpu": 32}
_OVERHEAD_ACCELERATOR = 1024
# Where an accelerator's memory can be measured, the first batch has so many tokens, and shows what
# the following ones may have: of what is free, this share is taken.
_MEASURED_FIRST = 4096
_SHARE_OF_FREE = 0.7
# Doubling must raise the rate by this much to be worth the memory.
_FASTER = 1.05


class TokenBudget:
    """Padded tokens per forward pass, found while running.

    On a CPU it follows from the number of threads. On an accelerator that counts its memory the
    first batch is measured, and the budget is what the free memory has room for, as a power of two.
    On one that does not, a batch that nearly fills the budget doubles it, unless the last doubling
    did not raise the token rate: that one is taken back. A batch that runs out of memory halves it
    for good.

    Ranks that hold parts of one model run in step: what each would learn from its own clock and
    memory must not make their batches differ, so there the budget stays as it is.

    Args:
        device: where batches run.
        batch_size: rows per batch, or ``auto``.
        grow: whether the budget may pass its start by the clock.
        in_step: other ranks run the same batches.
        measure: set it by the memory, where the device counts that.

    Attributes:
        tokens: the budget, ignored where ``rows`` is given.
        largest: tokens of the largest batch that ran.
        largest_rows: rows of the batch with the most of them.
        rows: rows per forward pass if the user fixed them, else None.
        overhead: what a batch costs beyond its tokens, in tokens.
    """

    def __init__(
        self,
        device: torch.device,
        batch_size: int | str = "auto",
        grow: bool = True,
        in_step: bool = False,
        measure: bool = False,
    ) -> None:
        self.device = device
        self.rows = parse_batch_size(batch_size)
        self.largest = self.largest_rows = 0
        on_cpu = device.type == "cpu"
        self.tokens = _cpu_tokens() if on_cpu else _START_ACCELERATOR
        self.overhead = _OVERHEAD.get(device.type, _OVERHEAD_ACCELERATOR)
        self._largest = _LARGEST_CPU if on_cpu else _LARGEST_ACCELERATOR
        self._rate = 0.0
        self._growing = grow and self.rows is None and not in_step and not on_cpu
        self._in_step = in_step
        self._meter: MemoryMeter | None = None
        self._each, self._room = 0.0, 0
        if measure and self.rows is None and not in_step:
            self._meter = find_meter(device)
        if self._meter is not None:
            self.tokens, self._growing = _MEASURED_FIRST, False

    @property
    def measures(self) -> bool:
        """Whether the budget comes from the device's memory."""
        return self._meter is not None

    def fits(self, rows: int, width: int) -> bool:
        """Whether a batch of ``rows`` rows, ``width`` tokens each, is within the budget."""
        return rows <= self.rows if self.rows is not None else rows * width <= self.tokens

    def share(self, rows: int, width: int) -> int:
        """How many copies of a batch fit at once, at least one."""
        if self.rows is not None:
            return max(1, self.rows // rows)
        return max(1, self.tokens // (rows * width))

    def ran(self, tokens: int, seconds: float) -> None:
        """Learn from a batch that worked."""
        if not self._growing or tokens < 0.7 * self.tokens:
            return
        rate = tokens / max(seconds, 1e-9)
        if rate < _FASTER * self._rate:  # the last doubling was for nothing
            self._growing = False
            self.tokens //= 2
        elif self.tokens < self._largest:
            self._rate = rate
            self.tokens *= 2
        else:
            self._growing = False

    def failed(self, rows: int, tokens: int) -> None:
        """Learn from a batch that ran out of memory.

        Raises:
            UsageError: other ranks are in the middle of the same batch.
        """
        if self._in_step:
            raise UsageError(
                f"a batch of {tokens} tokens does not fit into the memory of {self.device.type}, "
                "and ranks that share a model cannot shrink it alone: pass a --batch-size below "
                f"{rows}, or start more ranks"
            )
        self._growing = False
        self._meter = None  # it has promised too much
        self.tokens = max(1, min(self.tokens, tokens) // 2)
        if self.rows is not None:
            self.rows = max(1, rows // 2)

    def try_batch(
        self, run: Callable[[], None], rows: int, tokens: int, alone: Callable[[], str]
    ) -> bool:
        """Run a batch; where memory runs out, halve the budget for smaller ones.

        The one way in which batches shrink: whoever gets False makes its batches again.

        Args:
            run: runs the batch.
            rows: its rows.
            tokens: its padded tokens.
            alone: what to say where a single row does not fit.

        Returns:
            Whether it ran.

        Raises:
            UsageError: a single row does not fit, or ranks in step cannot shrink their batches.
        """
        meter = self._meter
        if meter is not None:
            meter.start()
            self._room = self._room or meter.free()
        if attempt(run):
            self.largest = max(self.largest, tokens)
            self.largest_rows = max(self.largest_rows, rows)
            if meter is not None:
                self._learn(meter.stop() / tokens)
            return True
        if rows == 1:
            raise UsageError(alone())
        self.failed(rows, tokens)
        return False

    def _learn(self, each: float) -> None:
        """Take what the memory has room for, once it is known what a token takes at most."""
        if each <= self._each:
            return
        self._each = each
        fitting = int(_SHARE_OF_FREE * self._room / each)
        self.tokens = min(self._largest, 1 << max(0, fitting.bit_length() - 1))


def _cpu_tokens() -> int:
    return min(_LARGEST_CPU, _CPU * max(1, torch.get_num_threads() // 2))


_largest: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()
_ran: WeakKeyDictionary[PreTrainedModel, dict[str, int]] = WeakKeyDictionary()


def note_budget(model: PreTrainedModel, budget: TokenBudget) -> None:
    """Remember the largest batches that a model ran, for records."""
    held = _ran.setdefault(model, {"rows": 0, "tokens": 0})
    held["rows"] = max(held["rows"], budget.largest_rows)
    held["tokens"] = max(held["tokens"], budget.largest)
    if budget.rows is None and budget.device.type != "cpu":
        _largest[model] = max(_largest.get(model, 0), budget.largest)


def note_answers(model: PreTrainedModel, budget: TokenBudget) -> None:
    """The same of batches of answers, whose budget is another one."""
    held = _ran.setdefault(model, {"rows": 0, "tokens": 0})
    held["answer_rows"] = max(held.get("answer_rows", 0), budget.largest_rows)


def budget_record(model: PreTrainedModel) -> dict[str, int]:
    """What records say of batches on an accelerator, whose memory decides on them."""
    return {"batch_tokens": _largest[model]} if _largest.get(model) else {}


def batches_record(model: PreTrainedModel) -> dict[str, int] | None:
    """The most rows and the most padded tokens that shared a batch since :func:`forget_batches`;
    None if no batch was counted."""
    return dict(_ran[model]) if model in _ran else None


def forget_batches(model: PreTrainedModel) -> None:
    """Count anew: another stage begins."""
    _ran.pop(model, None)


def parse_batch_size(batch_size: int | str) -> int | None:
    """None for ``auto``, else the positive number of rows."""
    if batch_size == "auto":
        return None
    try:
        size = int(batch_size)
    except ValueError:
        size = 0
    if size < 1:
        raise UsageError(f"--batch-size must be auto or a positive number, not '{batch_size}'")
    return size


def group_rows(
    lengths: Sequence[int],
    budget: TokenBudget,
    mix: bool = True,
    max_rows: int | None = None,
    overhead: int | None = None,
) -> list[tuple[int, ...]]:
    """Split rows into batches at the least total cost, shortest rows first.

    The cost of a batch is its padded tokens and a fixed overhead; an optimal split keeps rows in
    the order of their lengths, so it is a shortest path over the sorted list.

    Args:
        lengths: tokens of each row.
        budget: how large a batch may be; a row that is too long is a batch of its own.
        mix: rows of different lengths may share a batch.
        max_rows: no batch has more rows than this.
        overhead: replaces the budget's own overhead.
    """
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    extra = budget.overhead if overhead is None else overhead
    best = [0.0] + [float("inf")] * len(order)
    start = [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        width = lengths[order[end - 1]]
        for first in range(end - 1, -1, -1):
            rows = end - first
            too_large = rows > (max_rows or rows) or not budget.fits(rows, width)
            if rows > 1 and (too_large or not (mix or lengths[order[first]] == width)):
                break
            # A fixed number of rows per batch is taken literally.
            cost = best[first] + extra + (rows * width if budget.rows is None else 0)
            if cost < best[end]:
                best[end], start[end] = cost, first
    groups = []
    end = len(order)
    while end:
        groups.append(tuple(order[start[end] : end]))
        end = start[end]
    return groups[::-1]


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of whatever device, ran out."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, torch.OutOfMemoryError):  # accelerate 1.1 knows CUDA's by its words alone
        return True
    return isinstance(error, Exception) and bool(should_reduce_batch_size(error))


def attempt(run: Callable[[], None]) -> bool:
    """Call ``run``; False if it ran out of memory.

    The exception is gone when this returns, and with it the tensors that its frames hold.
    """
    try:
        run()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return False
    return True
