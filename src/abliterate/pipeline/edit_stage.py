"""orthogonalize as a stage of a run folder, and an edit repeated from its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abliterate.console import log
from abliterate.direction import (
    Direction,
)
from abliterate.direction_set import DirectionSet
from abliterate.editing.file_names import RECORD
from abliterate.editing.options import EditOptions, edit_options
from abliterate.editing.orthogonalize import orthogonalize
from abliterate.editing.replay import (
    check_source,
    read_recorded_edit,
    replayed_options,
    warn_of_other_bits,
)
from abliterate.run_folder import (
    Session,
)
from abliterate.storage.artifacts import (
    read_record,
    versions,
)


def orthogonalize_stage(
    session: Session, direction: Direction | DirectionSet, out: Path, reuse: bool = False
) -> dict[str, Any]:
    """Write the edited checkpoint; returns its record ``abliterate.json``."""
    settings = session.settings
    options = edit_options(settings.orthogonalize)
    if reuse and (out / RECORD).is_file():
        record = read_record(out / RECORD, "orthogonalize")
        same = record.get("source") == session.identity and record.get("versions") == versions()
        same = same and record.get("options") == options.summary()
        if same and record.get("direction") == direction.summary():
            log.info("%s is up to date", out)
            return record
    return _edit(session, direction, options, out, reuse)


def replay_stage(session: Session, record: Path, out: Path) -> dict[str, Any]:
    """Repeat the edit that ``record`` (an ``abliterate.json``) tells of; returns the new record.

    Raises:
        CheckpointError: the session's checkpoint is not the recorded source.
        InputError: it is no record of an edit.
        UsageError: the settings ask for another edit.
    """
    recorded = read_recorded_edit(record)
    options = replayed_options(recorded, session.settings.orthogonalize)
    check_source(recorded, session.checkpoint)
    warn_of_other_bits(recorded, options)
    return _edit(session, recorded.direction, options, out, repeated=True)


def _edit(
    session: Session,
    direction: Direction | DirectionSet,
    options: EditOptions,
    out: Path,
    overwrite: bool = False,
    repeated: bool = False,
) -> dict[str, Any]:
    settings = session.settings
    orthogonalize(
        session.checkpoint,
        direction,
        out,
        overwrite=overwrite or settings.orthogonalize.overwrite,
        trust_remote_code=settings.model.trust_remote_code,
        allow_leak=settings.orthogonalize.allow_leak,
        options=options,
        repeated=repeated,
    )
    return read_record(out / RECORD, "orthogonalize")
