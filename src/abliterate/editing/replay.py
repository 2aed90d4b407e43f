"""An edit again, from the record of one: the same direction and options, on the same source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from abliterate.checkpoints.checkpoint import Checkpoint
from abliterate.console import log
from abliterate.direction import Direction, recorded_direction
from abliterate.direction_set import DirectionSet, recorded_set
from abliterate.editing.options import EditOptions, edit_options
from abliterate.editing.recorded_options import recorded_options
from abliterate.errors import CheckpointError, UsageError
from abliterate.models.loading import pick_device
from abliterate.settings import OrthogonalizeSettings
from abliterate.storage.artifacts import read_record, versions

# What each part of the options is called on the command line.
_FLAGS = {
    "layers": "--layers",
    "components": "--components",
    "scale": "--scale",
    "layer_scale": "--layer-scale",
    "norm_preserve": "--norm-preserve",
    "tied_embeddings": "--tied-embeddings",
    "quantized": "--requantize and --dequantize",
    "add": "--add",
    "as_lora": "--as-lora",
    "leave_behind": "--leave-behind",
}


@dataclass(frozen=True)
class RecordedEdit:
    """What a record says of an edit.

    Attributes:
        path: of the record.
        direction: as it was given to the edit.
        options: of the edit.
        source: what it was made from, as :meth:`Checkpoint.identity` has it.
        device: where it was computed.
        versions: by what.
    """

    path: Path
    direction: Direction | DirectionSet
    options: EditOptions
    source: Mapping[str, Any]
    device: str
    versions: Mapping[str, Any]


def read_recorded_edit(path: Path) -> RecordedEdit:
    """Read ``abliterate.json``.

    Raises:
        InputError: it is no record of an edit.
    """
    record = read_record(path, "orthogonalize")
    direction = recorded_set(record, path) or recorded_direction(record, path)
    options = recorded_options(record, path)
    source, made_by = record.get("source"), record.get("versions")
    return RecordedEdit(
        path,
        direction,
        options,
        source if isinstance(source, Mapping) else {},
        str(record["options"].get("device", "cpu")),
        made_by if isinstance(made_by, Mapping) else {},
    )


def replayed_options(recorded: RecordedEdit, settings: OrthogonalizeSettings) -> EditOptions:
    """The options of the recorded edit; where and on how many cores to compute is for today.

    Args:
        recorded: the edit.
        settings: of the command line and its configuration file.

    Raises:
        UsageError: they ask for another edit than the recorded one.
    """
    today = edit_options(settings)
    given = settings.model_fields_set
    for name, flag in _FLAGS.items():
        asked = {"requantize", "dequantize"} if name == "quantized" else {name}
        mine, theirs = (_value(options, name) for options in (today, recorded.options))
        if asked & given and mine != theirs:
            raise UsageError(
                f"{flag} is not what {recorded.path} records ({theirs!r}), whose edit is repeated "
                "as it was: leave the option out, or give a run folder as --direction"
            )
    return replace(recorded.options, device=today.device, jobs=today.jobs)


def _value(options: EditOptions, name: str) -> Any:
    return options.keep_norms if name == "norm_preserve" else getattr(options, name)


def check_source(recorded: RecordedEdit, source: Checkpoint) -> None:
    """Refuse a source that is not the one of the recorded edit, and warn of other bits.

    A folder is compared file by file with the recorded hashes, a hub id by its commit.

    Raises:
        CheckpointError: it is another, or cannot be told.
    """
    files, revision = recorded.source.get("files"), recorded.source.get("revision")
    name = recorded.source.get("id")
    if isinstance(revision, str):
        if source.revision != revision:
            found = "a folder" if source.revision is None else f"commit {source.revision}"
            raise CheckpointError(
                f"{source.name} is {found}; {recorded.path} records an edit of {name} at commit "
                f"{revision}: give {name}@{revision}"
            )
    elif isinstance(files, Mapping):
        if source.remote is not None:
            raise CheckpointError(
                f"{source.name} is still on the hub, and {recorded.path} records the hashes of "
                "files: leave out --low-disk"
            )
        mine = replace(source, revision=None).identity()["files"]
        for file in sorted({*map(str, files), *mine}):
            if mine.get(file) != files.get(file):
                how = "is missing" if file not in mine else "is not the one"
                raise CheckpointError(
                    f"{source.folder / file} {how} that {recorded.path} records of {name}: give "
                    "the source as it was, or a run folder as --direction for an edit of this one"
                )
    else:
        raise CheckpointError(
            f"{recorded.path} does not say what it was made from: give a run folder as --direction"
        )


def warn_of_other_bits(recorded: RecordedEdit, options: EditOptions) -> None:
    """Say it where the same weights are not promised to the last bit."""
    now = versions()
    differing = [
        f"{name} {recorded.versions.get(name)} then, {version} now"
        for name, version in now.items()
        if recorded.versions.get(name) != version
    ]
    device = str(pick_device(options.device))
    if device != recorded.device:
        differing.append(f"computed on {recorded.device} then, on {device} now")
    if differing:
        log.warning("the last bits may differ from %s: %s", recorded.path, "; ".join(differing))
