"""Reading and writing artifacts: JSON and safetensors, hashed, replaced atomically."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from abliterate.errors import InputError, UsageError
from abliterate.storage.guarded_files import naming, replacing
from abliterate.storage.json_text import parse_json
from abliterate.storage.portable_names import check_output_path, is_portable, is_windows

# Files past this size are hashed by sampling: a 140 GB checkpoint must not cost minutes of hashing.
_WHOLE_FILE_LIMIT = 256 << 20
_SAMPLES, _SAMPLE_BYTES = 256, 64 << 10
# Records of the largest models have some tens of megabytes.
_JSON_LIMIT = 512 << 20


def versions() -> dict[str, str]:
    """Versions that an artifact records: Python, this package and what computes for it."""
    packages = ("abliterate", "torch", "transformers", "safetensors")
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


_version = cache(version)


def is_plain_name(name: object) -> bool:
    """Whether ``name``, out of a record or an option, can be part of a file's name: no path, no
    character that does not print (on Windows, none of those that no file's name holds there), no
    longer than file names are."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and name.strip(". ") != ""
        and len(name.encode()) <= 200
        and not set(name) & {"/", "\\"}
        and (is_portable(f"{name}-") or not is_windows())
    )


def check_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be made or written to, before any work is done for it.

    Raises:
        UsageError: it is a file, its name cannot be made, or it (if it is not there, the nearest
            folder above it) cannot be written to.
    """
    check_output_path(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output {folder} is a file: choose a folder")
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        raise UsageError(f"output {folder} cannot be made: {above} is no folder")
    if os.access(above, os.W_OK | os.X_OK):
        return
    if folder.exists():
        raise UsageError(
            f"output {folder} exists and cannot be written to: change its permissions, or choose "
            "another folder"
        )
    raise UsageError(
        f"output {folder} cannot be made: {above} cannot be written to: choose another folder"
    )


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` so that a reader sees the old file or the whole new one.

    Raises:
        InputError: ``path`` is a link, or no regular file.
        OSError: it cannot be written; named so.
    """
    with replacing(path) as file, naming(path):
        file.write(content)


def write_json(path: Path, document: Any) -> None:
    """Write ``document`` as indented JSON, atomically. NaN and infinities become null."""
    text = json.dumps(finite(document), indent=2, ensure_ascii=False, allow_nan=False)
    # Half of a surrogate pair, which UTF-8 lacks, becomes the escape that JSON has for it.
    write_atomically(path, (text + "\n").encode("utf-8", "backslashreplace"))


def finite(value: Any) -> Any:
    """``value`` with every non-finite float replaced by None, so that it is valid JSON."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def read_json(path: Path, made_by: str) -> Any:
    """The JSON document at ``path``.

    Args:
        path: the file.
        made_by: the command that writes it, for the error message.

    Raises:
        InputError: it is missing, no JSON, or larger than anything that we write.
    """
    if path.exists() and not path.is_file():  # reading a FIFO would wait for ever
        raise InputError(f"{path} is no file: remove it")
    try:
        size = path.stat().st_size
        if size > _JSON_LIMIT:
            raise InputError(f"{path} is no record: it has {size} bytes")
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: run `abliterate {made_by}` first") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: encoding, JSON, digits
        raise InputError(
            f"{path} cannot be read as JSON ({error}): make it again with `abliterate {made_by}`"
        ) from None


#: What Python raises where a document holds other things than those it is read for.
OTHER_THINGS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


@contextmanager
def believing(path: Path, made_by: str) -> Iterator[None]:
    """For what only uses a record, as it was read: one that holds other things is named.

    Raises:
        InputError: within the context the record turns out not to be what ``made_by`` writes.
    """
    try:
        yield
    except OTHER_THINGS as error:
        raise InputError(
            f"{path} does not hold what `abliterate {made_by}` writes ({type(error).__name__}: "
            f"{str(error)[:200]}): remove it and make it again"
        ) from error


def read_record(path: Path, made_by: str) -> dict[str, Any]:
    """The JSON object at ``path``, as :func:`read_json`.

    Raises:
        InputError: also if it is no regular file or no object.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file: make it again with `abliterate {made_by}`")
    document = read_json(path, made_by)
    if not isinstance(document, dict):
        raise InputError(f"{path} is no record: make it again with `abliterate {made_by}`")
    return document


def read_tensors(path: Path, *names: str) -> dict[str, Any]:
    """The tensors ``names`` (all, if none are given) of a safetensors file.

    Raises:
        InputError: the file is missing or damaged, or lacks one of the names.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            present = set(file.keys())
            missing = [name for name in names if name not in present]
            if missing:
                raise InputError(
                    f"{path} has no tensor '{missing[0]}' (it has: "
                    f"{', '.join(sorted(present)[:8])})"
                )
            return {name: file.get_tensor(name) for name in (names or sorted(present))}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from None


def tensor_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        OSError: it cannot be read.
        SafetensorError: it is damaged.
    """
    from safetensors import safe_open

    with safe_open(path, "np") as file:  # no tensor is read, so torch is not needed
        return file.metadata() or {}


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Write tensors and their metadata as safetensors, atomically, always to the same bytes."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    raw = save(contiguous, metadata=dict(metadata))
    # The library writes the metadata's keys in random order: sort them, in the same space.
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    write_atomically(path, raw[:8] + ordered.ljust(length) + raw[8 + length :])


def hash_text(*parts: str) -> str:
    """SHA-256 over strings, each closed by a NUL so that their boundaries count."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def hash_json(document: Any) -> str:
    """SHA-256 of a JSON-able document, independent of key order."""
    return hash_text(json.dumps(finite(document), sort_keys=True, default=str))


def hash_file(path: Path) -> str:
    """SHA-256 of a file: whole up to 256 MiB, else of its size, start, end and 256 samples."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= _WHOLE_FILE_LIMIT:
            while block := file.read(1 << 20):
                digest.update(block)
            return "sha256:" + digest.hexdigest()
        digest.update(str(size).encode())
        for index in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return "sha256-sampled:" + digest.hexdigest()
