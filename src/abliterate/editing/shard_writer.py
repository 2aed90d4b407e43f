"""Writing the edited shards: copies by the kernel, edits in threads, flushes beside both.

A shard becomes a list of tasks, each of which reads, computes and writes on its own; a few more
threads than cores keep reading, computing and writing apart. How the work is cut never depends
on the number of threads, so the bytes do not either.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event

import torch

from abliterate.editing.matrix_orthogonalization import DirectionEnergy
from abliterate.editing.shard_layout import ShardLayout
from abliterate.editing.shard_tasks import EditContext, Files, ShardTask, tasks_of
from abliterate.storage.file_io import TargetFile, clone_file
from abliterate.storage.write_buffers import RUN_BYTES

_MAX_SHARDS = 4  # in flight: what a kill may cost
_MAX_CORES = 16  # each thread has a run's memory, and no disk keeps up with more
_BLOCKS_BYTES, _BEGUN_BYTES = 8 << 20, 48 << 20  # of a thread beside its run; of all before it
_EXTRA_THREADS = 2  # than cores: while some wait for the disk, the others compute


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def edit_memory(num_cores: int) -> int:
    """Bytes that :func:`write_shards` takes, about: a run and some blocks for each thread."""
    return (min(num_cores, _MAX_CORES) + _EXTRA_THREADS) * (
        RUN_BYTES + _BLOCKS_BYTES
    ) + _BEGUN_BYTES


def write_shards(
    layouts: Sequence[ShardLayout],
    context: EditContext,
    target: Callable[[str], Path],
    finished: Callable[[str, Mapping[int, DirectionEnergy]], None],
    advance: Callable[[int], object],
) -> None:
    """Write shards, a few at a time: through the page cache a file takes one thread's at once.

    Args:
        layouts: what to write.
        context: the edits.
        target: where a shard is to be written, by its name.
        finished: called when a shard's last byte was written, in a thread beside the work but never
            in two at once; with what each edit measured by its number.
        advance: called with the number of bytes whenever some are done.

    Raises:
        CheckpointError: a tensor cannot be edited.
        OSError: a file cannot be read or written.
    """
    num_cores = min(context.num_cores, _MAX_CORES)
    num_workers = max(1, min(len(layouts), num_cores, _MAX_SHARDS))
    with (
        _one_thread_each(),
        ThreadPoolExecutor(1, "finish") as committer,
        ThreadPoolExecutor(num_workers, "shard") as workers,
    ):
        writer = _ShardWriter(
            context=context,
            target=target,
            advance=advance,
            commit=lambda name, energies: committer.submit(finished, name, energies),
            queue=deque(layouts),
            threads_per_shard=-(-(num_cores + _EXTRA_THREADS) // num_workers),
        )
        try:
            running = [workers.submit(writer.shard_worker) for _ in range(num_workers)]
            for worker in as_completed(running):
                for pending_commit in worker.result():
                    pending_commit.result()
        finally:
            writer.stop.set()  # whatever went wrong: the others end with their present block


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Parallel tasks rather than parallel sums, whose order would depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, kw_only=True)
class _ShardWriter:
    """What the workers share, each of which writes one shard at a time.

    Attributes:
        context: the edits.
        target: where a shard is to be written, by its name.
        advance: called with the number of bytes whenever some are done.
        commit: hands over a shard that is written, and what its edits measured.
        queue: the shards that nobody has begun.
        threads_per_shard: how many threads work on one.
        stop: set when something failed.
    """

    context: EditContext
    target: Callable[[str], Path]
    advance: Callable[[int], object]
    commit: Callable[[str, Mapping[int, DirectionEnergy]], Future[None]]
    queue: deque[ShardLayout]
    threads_per_shard: int
    stop: Event = field(default_factory=Event)

    def shard_worker(self) -> list[Future[None]]:
        """Write shards until none is left; returns the commits, some of which may be under way."""
        pending_commits: list[Future[None]] = []
        one_thread = partial(torch.set_num_threads, 1)
        with ThreadPoolExecutor(self.threads_per_shard, "edit", one_thread) as threads:
            while (layout := self._next_shard()) is not None:
                energies = self._write_shard(layout, threads)
                if not self.stop.is_set():
                    pending_commits.append(self.commit(layout.shard.path.name, energies))
                for commit in pending_commits:
                    if commit.done():
                        commit.result()  # raises what went wrong
        return pending_commits

    def _next_shard(self) -> ShardLayout | None:
        with suppress(IndexError):  # none is left
            if not self.stop.is_set():
                return self.queue.popleft()
        return None

    def _write_shard(
        self, layout: ShardLayout, threads: ThreadPoolExecutor
    ) -> dict[int, DirectionEnergy]:
        energies: dict[int, DirectionEnergy] = {}
        with ExitStack() as stack:
            files = Files(stack, self.context.places)
            in_place = self.context.in_place
            target = TargetFile(self.target(layout.shard.path.name), keep=in_place)
            stack.callback(target.close)
            cloned = in_place or (
                layout.header is None and clone_file(files.open(layout.shard.path), target)
            )
            target.resize(layout.size)
            for tasks in tasks_of(layout, self.context, files, target, cloned):
                for index, part in self._run(tasks, threads):
                    energies[index] = energies.get(index, DirectionEnergy()) + part
        return energies

    def _run(
        self, tasks: Sequence[ShardTask], threads: ThreadPoolExecutor
    ) -> list[tuple[int, DirectionEnergy]]:
        """What the tasks measured, in their order; the first failure ends all of them."""

        def run(task: ShardTask) -> tuple[int, DirectionEnergy] | None:
            measured = None if self.stop.is_set() else task.run(self.stop)
            self.advance(task.size)
            return measured

        futures = [threads.submit(run, task) for task in tasks]
        try:
            done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            self._end(futures)
            raise
        if waiting:
            self._end(futures)
            raise next(error for future in done if (error := future.exception()) is not None)
        return [measured for future in futures if (measured := future.result()) is not None]

    def _end(self, futures: Sequence[Future[tuple[int, DirectionEnergy] | None]]) -> None:
        """Wait until no thread uses a file any more that is about to be closed."""
        self.stop.set()
        for future in futures:
            future.cancel()
        wait(futures)
