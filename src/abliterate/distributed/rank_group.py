"""Several processes on one job (``torchrun``, ``accelerate launch``), on one machine or more.

Every rank runs the same program. Where work splits, each does its share of the items and then all
exchange what they found, so that all go on with the same; rank 0 alone writes and prints. Without
such a launcher a process is a group of one, and none of this does anything.

What is exchanged is small and lies in host memory (float64 sums, scores, answers), so it always
goes over gloo, whatever backend the model's own tensors use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from abliterate.distributed.launcher import launched
from abliterate.errors import RankError, UsageError, one_line

T = TypeVar("T")

TIMEOUT = "ABLITERATE_TIMEOUT"
_DEFAULT_TIMEOUT = 1800.0
# Ranks start at different times: a short timeout is for work, not for this.
_LEAST_START = 600.0
# Between two exchanges a rank that dies takes the others' work since the last one along.
_ROUNDS = 4


@dataclass(frozen=True)
class RankGroup:
    """The processes that share a job.

    Attributes:
        rank: number of this one.
        size: how many there are.
        on_this_machine: how many of them share this machine's cores.
        owned: this package opened the connection, and closes it.
        splits: each rank does its share. False where all hold parts of one model (tensor
            parallel): they compute the same, in step.
        group: the gloo group that they talk over.
    """

    rank: int = 0
    size: int = 1
    on_this_machine: int = 1
    owned: bool = False
    splits: bool = True
    group: Any = field(default=None, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_unsplit(self) -> bool:
        """Whether there is nobody to split the work with."""
        return self.size == 1 or not self.splits

    def together(self) -> RankGroup:
        """The same ranks, each of which holds a part of the model."""
        return replace(self, splits=False)

    def split(self, items: Sequence[T]) -> list[T]:
        """The items that this process deals with."""
        return list(items) if self.is_unsplit else list(items[self.rank :: self.size])

    def chunks(self, items: Sequence[T]) -> list[list[T]]:
        """``items`` in turns, after each of which results are to be exchanged."""
        if self.is_unsplit:
            return [list(items)]
        chunk_size = max(1, -(-len(items) // (_ROUNDS * self.size))) * self.size
        return [
            list(items[first : first + chunk_size]) for first in range(0, len(items), chunk_size)
        ]

    def gather(self, local_results: Sequence[T]) -> list[T]:
        """All ranks' results, in the order of the items that :meth:`split` dealt out."""
        if self.is_unsplit:
            return list(local_results)
        parts = self.all_gather(list(local_results))
        result: list[Any] = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            result[rank :: self.size] = part
        return result

    def gather_rows(self, local_rows: Tensor) -> Tensor:
        """:meth:`gather` of a tensor's rows (its first axis), on the CPU; of no rows, any shape."""
        if self.is_unsplit:
            return local_rows.cpu()
        parts = self.all_gather(local_rows.cpu().contiguous())
        whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
        for rank, part in enumerate(parts):
            if len(part):
                whole[rank :: self.size] = part
        return whole

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks that do their share, by rank."""
        if self.is_unsplit:
            return [value]
        values: list[Any] = [None] * self.size
        self._talk(lambda: dist.all_gather_object(values, value, group=self.group))
        return values

    def all_reduce_sum(self, part: Tensor) -> Tensor:
        """The ranks' sums, added up in float64 by an all-reduce, on the CPU."""
        result = part.detach().to("cpu", torch.float64, copy=True).contiguous()
        if not self.is_unsplit:
            self._talk(lambda: dist.all_reduce(result, group=self.group))
        return result

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        self._talk(lambda: dist.broadcast_object_list(box, src=0, group=self.group))
        return box[0]

    def run_on_main(self, work: Callable[[], T]) -> T:
        """What rank 0 alone does, and every rank learns the result of.

        Raises:
            RankError: rank 0 failed; on rank 0, whatever ``work`` raises.
        """
        if self.size == 1:
            return work()
        result: Any = None
        with self._agreeing():
            if self.is_main:
                result = work()
        return self.broadcast(result)  # type: ignore[no-any-return]

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """This rank's share of the work: if one rank fails in it, every rank fails after it.

        Ranks that hold parts of one model cannot agree: when one leaves a forward pass, the others
        wait in it, until they find its connection closed.
        """
        if self.is_unsplit:
            yield
            return
        with self._agreeing():
            yield

    def assert_equal(self, value: str, what: str) -> None:
        """Refuse to go on if ranks have come to different values.

        Raises:
            UsageError: they have; the message names ``what``.
        """
        if self.size == 1:
            return
        if self.broadcast(value) != value:
            raise UsageError(
                f"rank {self.rank} sees another {what} than rank 0: give all machines the same "
                "files, packages and options"
            )

    def raise_if_any_failed(self, failure: BaseException | None) -> None:
        """Wait for all; if any failed, every rank fails.

        Raises:
            RankError: another rank failed, or is gone.
        """
        if self.size == 1:
            return
        messages: list[str | None] = [None] * self.size
        local_message = None if failure is None else str(failure) or type(failure).__name__
        self._talk(lambda: dist.all_gather_object(messages, local_message, group=self.group))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if failed:  # none goes before all have heard
            with suppress(RuntimeError):
                dist.barrier(group=self.group)
        if failed and failure is None:
            raise RankError(f"rank {failed[0]} failed: {messages[failed[0]]}")

    @contextmanager
    def _agreeing(self) -> Iterator[None]:
        try:
            yield
        except RankError:  # the others know, or are gone
            raise
        except BaseException as error:
            with suppress(RankError):  # what went wrong here says more
                self.raise_if_any_failed(error)
            raise
        self.raise_if_any_failed(None)

    def leave(self) -> None:
        """Part in good order: gloo's threads abort a process whose peer goes first."""
        if self.owned and dist.is_initialized():
            dist.barrier(group=self.group)
            dist.destroy_process_group()

    def _talk(self, exchange: Callable[[], Any]) -> None:
        """Exchange something once all are there; whoever does not come is named."""
        try:
            dist.monitored_barrier(self.group, timedelta(seconds=timeout()), wait_all_ranks=True)
            exchange()
        except RuntimeError as error:
            raise _lost(error) from None


ALONE = RankGroup()


def _lost(error: RuntimeError) -> RankError:
    text = one_line(error)
    late = re.search(r"Ranks? ([\d, ]+) failed to pass monitoredBarrier in (\d+) ms", text)
    if late:
        reason = (
            f"rank {late[1].strip()} is dead, or was not there within {int(late[2]) / 1000:g} "
            f"seconds ({TIMEOUT} sets how long to wait)"
        )
    else:
        reason = f"another rank is gone ({text[:120]})"
    return RankError(f"{reason}: run the same command again to go on")


def timeout() -> float:
    """Seconds that ranks wait for each other, ``ABLITERATE_TIMEOUT`` or half an hour.

    Raises:
        UsageError: it is no positive number.
    """
    given = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(given or _DEFAULT_TIMEOUT)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        raise UsageError(f"{TIMEOUT} must be a positive number of seconds, not '{given}'")
    return seconds


_joined: dict[int, RankGroup] = {}


def join_ranks() -> RankGroup:
    """The ranks that a launcher started, or a group of one.

    Only the first call's group ``owned`` the connection and may close it.

    Raises:
        RankError: the other ranks cannot be reached.
        UsageError: the timeout is no number, or the launcher names no port.
    """
    if not launched():
        return RankGroup()
    if dist.is_initialized() and os.getpid() in _joined:
        return replace(_joined[os.getpid()], owned=False)
    wait = timedelta(seconds=timeout())
    start = max(wait, timedelta(seconds=_LEAST_START))
    owned = not dist.is_initialized()
    # Older releases of accelerate hand port 0 on as it is: nobody is there, and torch would wait.
    if owned and os.environ.get("MASTER_PORT") == "0":
        raise UsageError(
            "the launcher gave the ranks port 0 to meet at (MASTER_PORT): name a free one, as in "
            "accelerate launch --main_process_port 29500"
        )
    try:
        if owned:
            # Tensor parallel models on GPUs exchange activations over nccl.
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=start)
        group = dist.new_group(backend="gloo", timeout=start)
        _set_pg_timeout(wait, group)
        if owned:
            _set_pg_timeout(wait)
    except (RuntimeError, ValueError) as error:
        reason = one_line(error)[:200]
        raise RankError(f"the other ranks cannot be reached: {reason}") from None
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    ranks = RankGroup(dist.get_rank(), dist.get_world_size(), local, owned, group=group)
    _joined.clear()
    _joined[os.getpid()] = ranks
    return ranks


def leave_ranks() -> None:
    """Part from the others, if this process has joined them."""
    if os.getpid() in _joined:
        _joined.pop(os.getpid()).leave()


def lost_connection(error: BaseException) -> RankError | None:
    """What to say of an error that a model's own collectives raise when a rank is gone."""
    text = one_line(error)
    of_network = isinstance(error, dist.DistError) or "gloo/transport" in text
    return _lost(RuntimeError(text)) if isinstance(error, RuntimeError) and of_network else None
