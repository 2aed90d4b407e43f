"""The frame of a stage: hold the folder, tell whether its record is up to date, write the record.

A record holds the hash of everything that the stage depended on and of the files that it left, so
that ``run`` can tell a finished stage from a stale one. Imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.console import log
from abliterate.storage.artifacts import (
    check_writable,
    hash_file,
    hash_json,
    versions,
    write_json,
)
from abliterate.storage.checkpoint_folders import check_outside_checkpoints, is_checkpoint
from abliterate.storage.json_text import parse_json
from abliterate.storage.locks import hold_folder
from abliterate.storage.ownership import Kind, claim, is_record

if TYPE_CHECKING:
    from abliterate.distributed.rank_group import RankGroup
    from abliterate.run_folder import Session


@dataclass(frozen=True)
class Stage:
    """A command that leaves a record in a folder.

    Attributes:
        command: its name.
        record: the file of its record.
        others: what else it writes beside the record, and by what a file of its own is known.
        sections: the settings that the record holds; none of them leaves ``settings`` out.
        reads_only: all but its record it only reads, so that it need not wait for other stages.
    """

    command: str
    record: str
    others: Mapping[str, Kind] = field(default_factory=dict)
    sections: frozenset[str] = frozenset()
    reads_only: bool = False

    @property
    def files(self) -> dict[str, Kind]:
        """All that it writes into the folder."""
        return {self.record: is_record, **self.others}

    @contextmanager
    def open(self, session: Session, folder: Path | None) -> Iterator[OpenStage]:
        """Hold ``folder`` while the stage runs; None writes nothing. Raises as :func:`writing`."""
        with ExitStack() as held:
            if folder is not None:
                part = self.command if self.reads_only else ""
                ranks = session.placement.ranks
                held.enter_context(writing(ranks, folder, self.command, self.files, part))
            yield OpenStage(self, session, folder)


@dataclass
class OpenStage:
    """A stage that holds its folder.

    Attributes:
        stage: which.
        session: its model and settings.
        folder: where the record goes, or None to write none.
        inputs: the hash of what it depends on, once it is known.
        outputs: the files that it leaves beside its record, by name.
    """

    stage: Stage
    session: Session
    folder: Path | None
    inputs: str | None = None
    outputs: Mapping[str, Path] | None = None

    def __post_init__(self) -> None:
        self.session.begin_stage()
        self.start_clock()

    @property
    def ranks(self) -> RankGroup:
        return self.session.placement.ranks

    def start_clock(self) -> None:
        """Count the record's seconds from here, not from where the folder was taken."""
        self._started = time.perf_counter()

    def depends_on(
        self, inputs: Mapping[str, Any], outputs: Mapping[str, Path] | None = None
    ) -> None:
        """Say what the stage depends on beside the model, and which files it will leave.

        Raises:
            UsageError: the ranks of the job have come to different ones.
        """
        self.inputs, self.outputs = input_hash(self.session, inputs), outputs
        self.ranks.assert_equal(self.inputs, "model, prompt set or package version")

    def finished(self) -> dict[str, Any] | None:
        """The record that is there, if nothing that it depends on has changed since."""
        if self.folder is None or self.inputs is None:
            return None
        path, inputs, outputs = self.folder / self.stage.record, self.inputs, self.outputs or {}
        return self.ranks.run_on_main(lambda: load_if_current(path, inputs, outputs))

    def finish(
        self, body: Mapping[str, Any], write: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        """Write the record, and before it what ``write`` writes; on the main rank.

        Args:
            body: what the stage found.
            write: writes the outputs that are not there yet. One that stays away, as there is
                nothing to put into it, is not listed.

        Returns:
            The record: the model, ``body``, and how it was made.
        """
        seconds = time.perf_counter() - self._started

        def leave() -> dict[str, Any]:
            outputs = (self.outputs or {}).values() if self.folder is not None else ()
            new = [path for path in outputs if not path.exists()]
            try:
                if write is not None:
                    write()
                record = {"model": self.session.identity, **body, **self._made_by(seconds)}
                if self.folder is not None:
                    write_json(self.folder / self.stage.record, record)
            except OSError:  # a full disk: what no record tells of is of no use
                for path in new:
                    path.unlink(missing_ok=True)
                raise
            return record

        return self.ranks.run_on_main(leave)

    def _made_by(self, seconds: float) -> dict[str, Any]:
        settings, sections = self.session.settings, self.stage.sections
        made: dict[str, Any] = {}
        if sections:
            made["settings"] = settings.model_dump(include=set(sections))
        # Stages that prompt the model say what was done about its thoughts, if it has any.
        if {"chat", "extract"} <= sections and (done := self.session.thinking.summary()):
            made["thinking"] = done
        made |= {"seed": settings.model.seed, "versions": versions(), "seconds": seconds}
        computed = self.session.how_computed()
        # Of these a resumed stage has seen a part alone: they decide nothing.
        batches = computed.pop("batches", None)
        made["computed_with"] = computed_with(settings.model.batch_size, self.ranks.size)
        made["computed_with"] |= computed
        if batches is not None:
            made["batches"] = batches
        if self.session.commits:
            made["datasets"] = dict(sorted(self.session.commits.items()))
        if self.inputs is not None:
            made["inputs"] = self.inputs
        if self.outputs is not None:
            left = self.outputs.items() if self.folder is not None else ()
            made["outputs"] = {name: hash_file(path) for name, path in left if path.exists()}
        return made


def computed_with(batch_size: int | str, ranks: int) -> dict[str, Any]:
    """What changes the last bits of a result, and nothing else of it."""
    import torch

    return {
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "ranks": ranks,
    }


def input_hash(session: Session, inputs: Mapping[str, Any]) -> str:
    """The hash of all that a stage depends on: what every stage does, and its own ``inputs``."""
    return hash_json({**session.base_inputs(), **inputs})


@contextmanager
def writing(
    ranks: RankGroup, folder: Path, command: str, files: Mapping[str, Kind], part: str = ""
) -> Iterator[None]:
    """Hold a run folder for a stage that writes to it: one process at a time, over nothing foreign.

    The first rank of a team holds it for all. A chain of stages holds it throughout.

    Args:
        ranks: the ranks of this job.
        folder: the run folder; made if need be, and removed if left empty.
        command: which stage, or chain of them.
        files: what it writes there, and by what a file of its own is known.
        part: held instead of the whole folder, by stages that only read what others write.

    Raises:
        InputError: another process writes there, or one of the files is a link or foreign.
        UsageError: the folder cannot be written to, or would be begun within a checkpoint.
    """
    with ExitStack() as held:

        def take() -> None:
            check_writable(folder)
            if not folder.is_dir() or is_checkpoint(folder) or not any(folder.iterdir()):
                check_outside_checkpoints(folder, itself=True)
            held.enter_context(hold_folder(folder, command, part))
            claim(folder, files)

        ranks.run_on_main(take)
        yield


def load_if_current(
    record: Path, inputs: str, outputs: Mapping[str, Path]
) -> dict[str, Any] | None:
    """The record, if the stage ran on the same inputs and its outputs are still as it left them."""
    try:
        document: dict[str, Any] = parse_json(record.read_text(encoding="utf-8"))
        if document["inputs"] != inputs:
            return None
        if any(document["outputs"][name] != hash_file(path) for name, path in outputs.items()):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    log.info("%s is up to date", record)
    return document
