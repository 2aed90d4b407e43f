"""Several processes on one edit (``torchrun``, ``accelerate launch``), over a shared filesystem.

Each rank writes every n-th shard; rank 0 begins and finishes the work. Without such a launcher a
process is a team of one, and none of this does anything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from abliterate.errors import TeamError

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes that share an edit.

    Attributes:
        rank: number of this one.
        size: how many there are.
        on_this_machine: how many of them share this machine's cores.
        owned: this package opened the connection, and closes it.
    """

    rank: int = 0
    size: int = 1
    on_this_machine: int = 1
    owned: bool = False

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The items that this process deals with."""
        return list(items[self.rank :: self.size])

    def tell(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        try:
            dist.broadcast_object_list(box, src=0)
        except RuntimeError as error:
            raise self._lost(error) from None
        return box[0]

    def agree(self, failure: BaseException | None) -> None:
        """Wait for all; if any failed, every rank fails.

        Raises:
            TeamError: another rank failed, or is gone.
        """
        if self.size == 1:
            return
        messages: list[str | None] = [None] * self.size
        own = None if failure is None else str(failure) or type(failure).__name__
        try:
            dist.all_gather_object(messages, own)
        except RuntimeError as error:
            raise self._lost(error) from None
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if failed and failure is None:
            raise TeamError(f"rank {failed[0]} failed: {messages[failed[0]]}")

    def leave(self) -> None:
        """Part in good order: gloo's threads abort a process whose peer goes first."""
        if self.owned and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def _lost(self, error: RuntimeError) -> TeamError:
        reason = " ".join(str(error).split())[:120]
        return TeamError(f"another rank is gone ({reason}): run the same command again")


def join_team() -> Team:
    """The team that a launcher started, or a team of one.

    Raises:
        TeamError: the other ranks cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return Team()
    owned = not dist.is_initialized()
    if owned:
        try:
            dist.init_process_group("gloo")
        except (RuntimeError, ValueError) as error:
            raise TeamError(f"the other ranks cannot be reached: {error}") from None
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Team(dist.get_rank(), dist.get_world_size(), local, owned)


def leads() -> bool:
    """Whether this process speaks for its team."""
    return int(os.environ.get("RANK", "0")) == 0
