"""Data sets in a folder: what ``save_to_disk`` wrote, or a repository downloaded from the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abliterate.errors import InputError, first_line


def read_folder(path: Path) -> dict[str, list[Any]]:
    """The rows of a folder by split, read by ``datasets``.

    Raises:
        InputError: it holds no data set, one that only its own code can read, or a damaged one.
    """
    scripts = sorted(path.glob("*.py"))
    saved = [name for name in ("state.json", "dataset_dict.json") if (path / name).is_file()]
    if scripts and not saved:
        raise InputError(
            f"{path} is read by its own code ({scripts[0].name}), which is not run: name one of "
            "its files"
        )
    import datasets

    try:
        if saved:
            found = datasets.load_from_disk(str(path))
        else:
            with _quiet():
                found = datasets.load_dataset(str(path.resolve()))
    except Exception as error:  # the library's many error types have no narrower common base
        raise InputError(
            f"{path} is a folder that holds no readable data set ({first_line(error)}): name a "
            "file in it"
        ) from None
    if isinstance(found, datasets.DatasetDict):
        return {str(name): list(split) for name, split in found.items()}
    return {"train": list(found)}


@contextmanager
def _quiet() -> Iterator[None]:
    """No bar for what is read from the disk at once."""
    import datasets

    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()
