"""Data sets in a folder: what ``save_to_disk`` wrote, or a repository downloaded from the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abliterate.errors import InputError, first_line
from abliterate.prompts.row_files import delimiter_of
from abliterate.storage.json_text import parse_json

_CARD = "README.md"
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_MOST = 1 << 20  # bytes of a file that describes a data set


def read_folder(path: Path, config: str | None = None) -> dict[str, list[Any]]:
    """The rows of a folder by split, read by ``datasets``.

    Args:
        path: the folder.
        config: which of the configurations that its card names.

    Raises:
        InputError: it holds no data set, several, one that only its own code can read, or a damaged
            one.
    """
    scripts = sorted(path.glob("*.py"))
    saved = [name for name in (_STATE, _SPLITS) if (path / name).is_file()]
    if scripts and not saved:
        raise InputError(
            f"{path} is read by its own code ({scripts[0].name}), which is not run: name one of "
            "its files"
        )
    _check_saved(path)
    configs = [] if saved else configurations(path)
    if config is None and len(configs) > 1 and not _has_default(path):
        raise InputError(
            f"{path} has configurations ({', '.join(configs)}): name one as {path / configs[0]}"
        )
    import datasets

    try:
        if saved:
            found = datasets.load_from_disk(str(path))
        else:
            with _quiet():
                found = datasets.load_dataset(str(path.resolve()), config, **_separator(path))
    except Exception as error:  # the library's many error types have no narrower common base
        raise InputError(
            f"{path} is a folder that holds no readable data set ({first_line(error)}): name a "
            "file in it"
        ) from None
    if isinstance(found, datasets.DatasetDict):
        return {str(name): list(split) for name, split in found.items()}
    return {"train": list(found)}


def configurations(path: Path) -> list[str]:
    """The configurations that a folder's card names, if it has one that does."""
    return [str(one["config_name"]) for one in _listed(path)]


def _has_default(path: Path) -> bool:
    return any(one.get("default") or one["config_name"] == "default" for one in _listed(path))


def _listed(path: Path) -> list[Mapping[str, Any]]:
    card = path / _CARD
    try:
        if not card.is_file() or card.stat().st_size > _MOST:
            return []
        if "config_name" not in (text := card.read_text(encoding="utf-8")):
            return []
        from huggingface_hub import RepoCard

        data: Any = RepoCard(text, ignore_metadata_errors=True).data
        found = data.to_dict().get("configs")
    except Exception:  # of YAML, in which anything may stand
        return []
    held = found if isinstance(found, list) else []
    return [one for one in held if isinstance(one, Mapping) and "config_name" in one]


def _check_saved(path: Path) -> None:
    """Refuse what ``save_to_disk`` would not have written: names of files elsewhere.

    Raises:
        InputError: there is one.
    """
    named = [(path / _SPLITS, name) for name in _names(path / _SPLITS, "splits")]
    for state in (path / _STATE, *sorted(path.glob(f"*/{_STATE}"))):
        named += [
            (state, entry.get("filename") if isinstance(entry, Mapping) else entry)
            for entry in _names(state, "_data_files")
        ]
    for file, name in named:
        if not (isinstance(name, str) and Path(name).name == name):
            raise InputError(f"{file} names {name!r:.80}, which is no file of the folder's own")


def _names(file: Path, key: str) -> list[Any]:
    try:
        if not file.is_file() or file.stat().st_size > _MOST:
            return []
        document = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return []
    found = document.get(key) if isinstance(document, dict) else None
    return found if isinstance(found, list) else []


def _separator(path: Path) -> dict[str, str]:
    """What the library has to be told of CSV files with another delimiter than a comma."""
    tables = [file for file in sorted(path.rglob("*.csv")) if file.is_file()]
    if not tables:
        return {}
    with tables[0].open("rb") as file:
        head = file.read(1 << 16).decode("utf-8-sig", errors="replace")
    found = delimiter_of(head)
    return {} if found == "," else {"sep": found}


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
