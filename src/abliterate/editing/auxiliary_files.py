"""The files beside the weights: which are carried over, what they need, and where OUT may lie."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from abliterate.checkpoints.safetensors_header import FileStamp
from abliterate.checkpoints.shards import check_stamps, inside, is_adapter
from abliterate.editing.workspace import partial_of
from abliterate.errors import DiskSpaceError, UsageError
from abliterate.storage.checkpoint_folders import check_outside_checkpoints
from abliterate.storage.file_io import SourceFile, TargetFile, copy_range
from abliterate.storage.locks import is_of_lock
from abliterate.storage.portable_names import check_output_path
from abliterate.storage.system_calls import block_size, free_bytes

# Weights in other formats would still hold the unedited model.
_OTHER_WEIGHTS = {
    *(".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".msgpack", ".h5", ".ot"),
    *(".pkl", ".pickle", ".npz", ".tflite", ".mlmodel", ".safetensors"),
}
# Of version control and of downloads, not of the checkpoint.
_SKIPPED_FOLDERS = {".git", ".cache"}


@dataclass(frozen=True)
class AuxiliaryFiles:
    """Files that come along as they are.

    Attributes:
        files: paths relative to the source, with how each stood.
        left_behind: weights in other files, adapters, and what is no file.
    """

    files: Mapping[Path, FileStamp]
    left_behind: tuple[str, ...]


def check_target(source: Path, out: Path) -> None:
    """Refuse an output that would harm the source, or another checkpoint.

    Raises:
        UsageError: it overlaps the source, lies in a checkpoint, or has a name that cannot be made.
    """
    check_output_path(out)
    real = source.resolve()
    for target in (out.resolve(), partial_of(out).resolve()):
        inside_of_it = any(_is_same(place, real) for place in (target, *target.parents))
        if inside_of_it or any(_is_same(target, place) for place in real.parents):
            raise UsageError(f"--output {out} overlaps the source {source}: choose another folder")
    check_outside_checkpoints(out)


def _is_same(one: Path, other: Path) -> bool:
    """Whether two names are one place: in other case too, where that does not count."""
    if one == other:
        return True
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return False


def find_auxiliary_files(
    source: Path,
    shards: Collection[str],
    replaced: Collection[str],
    weights: Collection[Path] = (),
) -> AuxiliaryFiles:
    """What to carry over from the source.

    Args:
        source: the checkpoint.
        shards: its weights.
        replaced: further files of its top folder that are written anew.
        weights: further files of weights that come along (:mod:`.weights_beside`).

    Raises:
        CheckpointError: a symlink leaves the checkpoint.
    """
    files, left_behind = {}, []
    for path in _walk(source):
        relative = path.relative_to(source)
        if is_of_lock(relative.name):
            continue
        if len(relative.parts) == 1 and relative.name in (*shards, *replaced):
            continue
        status = inside(source, path).stat()
        unedited = path.suffix.lower() in _OTHER_WEIGHTS or is_adapter(path.name)
        unedited = unedited and relative not in weights
        if unedited or not stat.S_ISREG(status.st_mode):
            left_behind.append(str(relative))
        else:
            files[relative] = FileStamp.of(status)
    return AuxiliaryFiles(files, tuple(left_behind))


def _walk(source: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(set(folders) - _SKIPPED_FOLDERS)
        for name in list(folders):
            if Path(folder, name).is_symlink():  # never followed: it may lead in a circle
                folders.remove(name)
                names.append(name)
        yield from (Path(folder, name) for name in sorted(names))


def copy_auxiliary_files(source: Path, carried: AuxiliaryFiles, target: Path) -> None:
    """Copy the files, with their permission bits."""
    for relative in carried.files:
        path = target / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        file = SourceFile(source / relative)
        try:
            copied = TargetFile(path)
            try:
                copy_range(file, 0, copied, 0, carried.files[relative].size)
            finally:
                copied.close()
        finally:
            file.close()
        shutil.copymode(source / relative, path)


def check_unchanged(stamps: Mapping[Path, FileStamp]) -> None:
    """Refuse a source that was written to while it was read.

    Raises:
        CheckpointError: a file's size or time of change is another.
    """
    check_stamps(stamps, "the source")


def check_space(out: Path, sizes: Collection[int], present: int) -> None:
    """Refuse to begin what cannot fit.

    Args:
        out: the folder to be made.
        sizes: of every file it will hold, in bytes.
        present: bytes of them that are there already.

    Raises:
        DiskSpaceError: the filesystem has too little room.
    """
    parent = next(folder for folder in partial_of(out).absolute().parents if folder.exists())
    unit = block_size(parent)
    needed = sum(-(-size // unit) * unit for size in sizes) - present
    free = free_bytes(parent)
    if needed > free:
        raise DiskSpaceError(
            f"{out} needs {needed:,} bytes of disk space, {parent} has {free:,}: free "
            f"{needed - free:,} bytes or choose a folder on another disk"
        )
