"""Writing the edited shards: copies by the kernel, edits in threads, flushes beside both.

A shard becomes a list of units of work, each of which reads, computes and writes on its own; a few
more threads than cores keep reading, computing and writing apart. How the work is cut never depends
on the number of threads, so the bytes do not either.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from threading import Event

import torch

from abliterate.editing.matrix_orthogonalization import DirectionEnergy
from abliterate.editing.shard_layout import ShardLayout
from abliterate.editing.shard_tasks import EditContext, Files, ShardTask, tasks_of
from abliterate.storage.file_io import TargetFile, clone_file
from abliterate.storage.write_buffers import RUN_BYTES

_MOST_SHARDS = 4  # in flight: what a kill may cost
_MOST_JOBS = 16  # each thread has a run's memory, and no disk keeps up with more
_BLOCKS_BYTES, _BEGUN_BYTES = 8 << 20, 48 << 20  # of a thread beside its run; of all before it
_MORE_THREADS = 2  # than cores: while some wait for the disk, the others compute


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def edit_memory(jobs: int) -> int:
    """Bytes that :func:`write_shards` takes, about: a run and some blocks for each thread."""
    return (min(jobs, _MOST_JOBS) + _MORE_THREADS) * (RUN_BYTES + _BLOCKS_BYTES) + _BEGUN_BYTES


def write_shards(
    layouts: Sequence[ShardLayout],
    work: EditContext,
    target: Callable[[str], Path],
    finished: Callable[[str, Mapping[int, DirectionEnergy]], None],
    advance: Callable[[int], object],
) -> None:
    """Write shards, a few at a time: through the page cache a file takes one thread's at once.

    Args:
        layouts: what to write.
        work: the edits.
        target: where a shard is to be written, by its name.
        finished: called when a shard's last byte was written, in a thread beside the work but never
            in two at once; with the sums of each edit by its number.
        advance: called with the number of bytes whenever some are done.

    Raises:
        CheckpointError: a tensor cannot be edited.
        OSError: a file cannot be read or written.
    """
    stop, jobs = Event(), min(work.jobs, _MOST_JOBS)
    count = max(1, min(len(layouts), jobs, _MOST_SHARDS))
    threads = -(-(jobs + _MORE_THREADS) // count)
    one_thread = partial(torch.set_num_threads, 1)
    queue = deque(layouts)
    with (
        _one_thread_each(),
        ThreadPoolExecutor(1, "finish") as finisher,
        ThreadPoolExecutor(count, "shard") as lanes,
    ):

        def lane() -> list[Future[None]]:
            finishing = []
            with ThreadPoolExecutor(threads, "edit", one_thread) as pool:
                while queue and not stop.is_set():
                    try:
                        layout = queue.popleft()
                    except IndexError:  # another lane was faster
                        break
                    name = layout.shard.path.name
                    sums = _write_shard(layout, work, target(name), pool, stop, advance)
                    if not stop.is_set():
                        finishing.append(finisher.submit(finished, name, sums))
                    for future in finishing:
                        if future.done():
                            future.result()
            return finishing

        try:
            running = [lanes.submit(lane) for _ in range(count)]
            for one in as_completed(running):
                for future in one.result():
                    future.result()
        finally:
            stop.set()  # whatever went wrong: the others end with their present block


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Parallel units rather than parallel sums, whose order would depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_shard(
    layout: ShardLayout,
    work: EditContext,
    path: Path,
    threads: ThreadPoolExecutor,
    stop: Event,
    advance: Callable[[int], object],
) -> dict[int, DirectionEnergy]:
    sums: dict[int, DirectionEnergy] = {}
    with ExitStack() as stack:
        files = Files(stack, work.places)
        target = TargetFile(path, keep=work.in_place)
        stack.callback(target.close)
        cloned = work.in_place or (
            layout.header is None and clone_file(files.open(layout.shard.path), target)
        )
        target.resize(layout.size)
        for units in tasks_of(layout, work, files, target, cloned):
            for index, part in _run(units, threads, stop, advance):
                sums[index] = sums.get(index, DirectionEnergy()) + part
    return sums


def _run(
    units: Sequence[ShardTask],
    threads: ThreadPoolExecutor,
    stop: Event,
    advance: Callable[[int], object],
) -> list[tuple[int, DirectionEnergy]]:
    """What the units found, in their order; the first failure ends all of them."""

    def run(unit: ShardTask) -> tuple[int, DirectionEnergy] | None:
        found = None if stop.is_set() else unit.run(stop)
        advance(unit.size)
        return found

    futures = [threads.submit(run, unit) for unit in units]
    try:
        done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
    except BaseException:
        _end(futures, stop)
        raise
    if waiting:
        _end(futures, stop)
        raise next(error for future in done if (error := future.exception()) is not None)
    return [found for future in futures if (found := future.result()) is not None]


def _end(futures: Sequence[Future[tuple[int, DirectionEnergy] | None]], stop: Event) -> None:
    """Wait until no thread uses a file any more that is about to be closed."""
    stop.set()
    for future in futures:
        future.cancel()
    wait(futures)
