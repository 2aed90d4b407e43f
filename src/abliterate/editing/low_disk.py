"""--low-disk: shards come from the hub one by one, and go as soon as they are edited.

What this run downloads lies in ``OUT.partial`` and is its own to delete; what the hub's cache holds
already is read there and stays. A shard whose header does not change is edited where it was
downloaded to and so needs no more room than its output; the others come first, while the disk still
has the room that the rest of the output will take.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread

from abliterate.checkpoints.safetensors_header import Shard, read_shard
from abliterate.checkpoints.shards import inside
from abliterate.editing.shard_layout import ShardLayout
from abliterate.editing.shard_tasks import EditContext
from abliterate.editing.shard_writer import write_shards
from abliterate.editing.workspace import Workspace
from abliterate.errors import CheckpointError
from abliterate.hub import HubRepo
from abliterate.storage.guarded_files import make_folder, naming


@dataclass(frozen=True)
class Step:
    """A shard to write.

    Attributes:
        layout: what to write.
        fetched: names of the files that it needs and the cache does not hold.
        in_place: it is edited where it was downloaded to.
        dropped: names of the files that no later step needs.
        ahead: the next step's files fit beside this one's.
    """

    layout: ShardLayout
    fetched: frozenset[str]
    in_place: bool
    dropped: frozenset[str]
    ahead: bool


def plan_steps(
    layouts: Sequence[ShardLayout],
    context: EditContext,
    sizes: Mapping[str, int],
    cached: Collection[str],
) -> tuple[list[Step], int]:
    """In which order to fetch and write.

    Args:
        layouts: what to write.
        context: the edits.
        sizes: bytes of each file on the hub.
        cached: names of those that are here already.

    Returns:
        The steps, and the bytes of disk space needed at the worst moment beyond the output's.
    """
    needs = {id(layout): _sources(layout, context) - set(cached) for layout in layouts}
    itself = {id(layout): frozenset({layout.shard.path.name}) for layout in layouts}
    # In place goes what needs nothing but itself; its other users come before.
    alone = {key for key, names in needs.items() if names == itself[key]}
    order = sorted(layouts, key=lambda x: x.header is None and id(x) in alone)
    total = sum(layout.size for layout in order)
    steps, written, peak, held = [], 0, 0, frozenset[str]()
    for index, layout in enumerate(order):
        later = [needs[id(other)] for other in order[index + 1 :]]
        held |= needs[id(layout)]
        dropped = held - frozenset[str]().union(*later)
        in_place = layout.header is None and id(layout) in alone and itself[id(layout)] <= dropped
        now = written + sum(sizes[name] for name in held) + (0 if in_place else layout.size)
        coming = sum(sizes[name] for name in (later[0] if later else frozenset()) - held)
        ahead = now + coming <= total
        peak = max(peak, now + (coming if ahead else 0))
        steps.append(Step(layout, needs[id(layout)], in_place, dropped, ahead))
        written, held = written + layout.size, held - dropped
    return steps, max(0, peak - total)


def _sources(layout: ShardLayout, context: EditContext) -> frozenset[str]:
    """Names of the files whose bytes a shard needs."""
    files = {layout.shard.path}
    for placed in layout.tensors:
        if placed.origin is not None:
            files.add(placed.origin.file)
        stored = context.quantized.get(placed.replaces or placed.name)
        if stored is not None:
            files |= {stored.values.file, stored.scales.file}
    return frozenset(path.name for path in files)


def write_from_hub(
    steps: Sequence[Step],
    context: EditContext,
    workspace: Workspace,
    repo: HubRepo,
    shards: Mapping[str, Shard],
    advance: Callable[[int], object],
) -> None:
    """Carry out the steps; one shard is edited while the next is fetched.

    Args:
        steps: those of :func:`plan_steps`.
        context: the edits.
        workspace: where to.
        repo: where the shards are.
        shards: their headers, by file name.
        advance: called with the number of bytes whenever some are done.

    Raises:
        CheckpointError: a shard is not what its header announced, or cannot be edited.
        FetchError: the hub does not give a shard.
        OSError: a file cannot be read or written.
    """
    folder = workspace.fetched
    make_folder(folder)
    wanted = frozenset[str]().union(*(step.fetched for step in steps))
    for path in folder.iterdir():  # left by a run that was killed
        if path.is_file() and path.name not in wanted:
            path.unlink()
    with _fetcher(repo, folder) as fetch:
        coming: Future[None] | None = None
        for index, step in enumerate(steps):
            (coming or fetch(step.fetched)).result()
            coming = (
                fetch(steps[index + 1].fetched) if step.ahead and index + 1 < len(steps) else None
            )
            _write(step, context, workspace, shards, advance)


def _write(
    step: Step,
    context: EditContext,
    workspace: Workspace,
    shards: Mapping[str, Shard],
    advance: Callable[[int], object],
) -> None:
    folder, name = workspace.fetched, step.layout.shard.path.name
    places = {}
    for file in _sources(step.layout, context):
        nominal = shards[file].path
        places[nominal] = folder / file if file in step.fetched else nominal
        _check(shards[file], places[nominal], file in step.fetched)
    if step.in_place:
        places[step.layout.shard.path] = workspace.current(name)
        with naming(workspace.current(name)):
            os.replace(folder / name, workspace.current(name))
    here = replace(context, places=places, in_place=step.in_place)
    write_shards([step.layout], here, workspace.current, workspace.finish, advance)
    for file in step.dropped:
        (folder / file).unlink(missing_ok=True)


def _check(announced: Shard, path: Path, fetched: bool) -> None:
    actual = read_shard(path if fetched else inside(announced.path.parent, path))
    same = actual.data_start == announced.data_start and actual.stamp.size == announced.stamp.size
    same = same and dict(actual.metadata) == dict(announced.metadata)
    if not same or [(e.name, e.dtype, e.shape, e.start) for e in actual.tensors.values()] != [
        (e.name, e.dtype, e.shape, e.start) for e in announced.tensors.values()
    ]:
        raise CheckpointError(
            f"{path} has another header than the hub announced: the download is damaged, or its "
            "copy in the cache is"
        )


@contextmanager
def _fetcher(repo: HubRepo, folder: Path) -> Iterator[Callable[[Collection[str]], Future[None]]]:
    """Fetches files in a thread of its own; on leaving, a download midway is given up."""
    stop, threads = Event(), list[Thread]()

    def start(names: Collection[str]) -> Future[None]:
        done: Future[None] = Future()

        def run() -> None:
            try:
                for name in sorted(names):
                    if not stop.is_set():
                        repo.fetch(name, folder, stop.is_set)
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)

        # A daemon: a connection that hangs must not keep the program from ending.
        threads.append(Thread(target=run, name="fetch", daemon=True))
        threads[-1].start()
        return done

    try:
        yield start
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
