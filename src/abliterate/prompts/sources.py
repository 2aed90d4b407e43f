"""Prompt sources: a bundled set, a preset, a file or a Hugging Face dataset, read into prompts.

The grammar of a source is ``NAME``, ``PATH`` or ``org/name[/config][@revision][:split]``, each with
an optional ``[column]`` at the end.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abliterate.errors import InputError, UsageError
from abliterate.resources import data_dir
from abliterate.storage.json_text import parse_json

TEXT_COLUMNS = ("instruction", "prompt", "goal", "text", "question", "behavior")
CATEGORY_COLUMNS = ("category", "semanticcategory", "functionalcategory", "topic", "label")
FILE_TYPES = (".txt", ".json", ".jsonl", ".csv", ".parquet")
SPLITS = ("train", "val", "test")
BUNDLED = ("harmful", "harmless")

# The public sets of the paper (section 2.1 and appendix A), as hub ids. Some are gated: accept
# their terms on the hub and pass a token in HF_TOKEN.
PRESETS = {
    "advbench": "walledai/AdvBench:train[prompt]",
    "jailbreakbench": "JailbreakBench/JBB-Behaviors/behaviors:harmful[Goal]",
    "jailbreakbench-benign": "JailbreakBench/JBB-Behaviors/behaviors:benign[Goal]",
    "harmbench": "walledai/HarmBench/standard:train[prompt]",
    "maliciousinstruct": "walledai/MaliciousInstruct:train[prompt]",
    "strongreject": "walledai/StrongREJECT:train[prompt]",
    "tdc2023": "walledai/TDC23-RedTeaming:train[prompt]",
    "alpaca": "tatsu-lab/alpaca:train[instruction]",
}

_HUB_ID = re.compile(
    r"(?P<id>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w.\[\]%+:-]+?))?"
)
_COLUMN = re.compile(r"(?P<rest>.+)\[(?P<column>[^\[\]]+)\]", re.DOTALL)


@dataclass(frozen=True)
class Prompt:
    """One instruction, with its category where the source has one."""

    text: str
    category: str | None = None


def well_formed(text: str, where: str) -> str:
    """``text`` itself, if it is text: JSON can spell half of a surrogate pair, which is none.

    Raises:
        InputError: it cannot be written as UTF-8, so that no tokenizer takes it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise InputError(
            f"{where}: not valid Unicode text (a lone surrogate, U+{code:04X})"
        ) from None
    return text


def check_prompts(**kinds: Sequence[Prompt]) -> None:
    """Refuse what are no prompts before a model runs on them.

    Args:
        kinds: lists of prompts, by what an error calls them.

    Raises:
        InputError: a list is empty.
        UsageError: something in it is no :class:`Prompt` with a text.
    """
    for kind, prompts in kinds.items():
        if isinstance(prompts, str | Prompt):
            raise UsageError(f"the {kind} prompts must be a list of Prompt, not {prompts!r:.60}")
        if not prompts:
            raise InputError(f"there are no {kind} prompts: give at least one")
        for prompt in prompts:
            if not isinstance(prompt, Prompt) or not isinstance(prompt.text, str):
                raise UsageError(
                    f"the {kind} prompts must be Prompt objects, such as Prompt('text'), "
                    f"not {prompt!r:.60}"
                )


@dataclass(frozen=True)
class PromptSource:
    """What a source held.

    Attributes:
        spec: the source as the user named it.
        origin: ``bundled``, ``file`` or ``hub``.
        splits: prompts by split; a source without splits of its own has the one split ``all``.
    """

    spec: str
    origin: str
    splits: Mapping[str, tuple[Prompt, ...]] = field(repr=False)


def read_source(spec: str) -> PromptSource:
    """Read every prompt of a source, duplicates included.

    Raises:
        InputError: it does not exist, is empty, is damaged, or has no column of prompts.
    """
    expanded = PRESETS.get(spec.lower(), spec)
    if spec in BUNDLED:
        folder = data_dir() / "prompts" / spec
        splits = {name: _read_file(folder / f"{name}.jsonl", None) for name in SPLITS}
        return PromptSource(spec, "bundled", splits)
    column = None
    # A file may itself be called `x[1].txt`: its brackets name no column then.
    if (match := _COLUMN.fullmatch(expanded)) and not Path(expanded).exists():
        expanded, column = match["rest"], match["column"]
    path = Path(expanded)
    if path.suffix.lower() in FILE_TYPES or path.exists():
        return PromptSource(spec, "file", {"all": _read_file(path, column)})
    if (match := _HUB_ID.fullmatch(expanded)) and not expanded.startswith((".", "/", "~")):
        prompts = _read_hub(
            spec, match["id"], match["config"], match["revision"], match["split"] or "train", column
        )
        return PromptSource(spec, "hub", {"all": prompts})
    known = ", ".join((*BUNDLED, *PRESETS))
    raise InputError(
        f"prompt source '{spec}' is neither a set ({known}), an existing file "
        f"({', '.join(FILE_TYPES)}) nor a hub dataset (org/name:split[column])"
    )


def _read_file(path: Path, column: str | None) -> tuple[Prompt, ...]:
    prompts = _to_prompts(read_rows(path), str(path), column)
    if not prompts:
        raise InputError(f"prompt file {path} holds no prompts")
    return prompts


def read_rows(path: Path, what: str = "prompt file") -> list[Any]:
    """The lines (``.txt``), entries or rows of a file, as they are.

    Args:
        path: a file of one of ``FILE_TYPES``.
        what: what the file is, for error messages.

    Raises:
        InputError: it is missing, unreadable, empty, damaged or of another type.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file ({', '.join(FILE_TYPES)}) inside it")
    kind = path.suffix.lower()
    if path.exists() and kind not in FILE_TYPES:
        raise InputError(f"{path}: unknown file type '{kind}', use one of {', '.join(FILE_TYPES)}")
    if path.exists() and not path.is_file():  # a device or pipe, which may never end
        raise InputError(f"{what} {path} is no regular file")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{what} {path} does not exist") from None
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}") from None
    if not raw.strip():
        raise InputError(f"{what} {path} is empty")
    if kind == ".parquet":
        return _parquet_rows(path, raw)
    return _text_rows(path, kind, _decode(path, raw))


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8: save the file as "
            "UTF-8"
        ) from None


def _parquet_rows(path: Path, raw: bytes) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_table(io.BytesIO(raw)).to_pylist())
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is not a readable parquet file: {reason}") from None


def _text_rows(path: Path, kind: str, text: str) -> list[Any]:
    if kind == ".txt":
        return text.splitlines()
    if kind == ".csv":
        try:
            return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        except csv.Error as error:
            raise InputError(f"{path} is not a readable CSV file: {error}") from None
    if kind == ".jsonl":
        return [
            _parse_json(line, f"{path}, line {number}")
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    document = _parse_json(text, str(path))
    if isinstance(document, dict):  # {"prompts": [...]} and the like: its one list
        lists = [value for value in document.values() if isinstance(value, list)]
        document = lists[0] if len(lists) == 1 else document
    if not isinstance(document, list):
        raise InputError(f"{path}: expected a JSON list of strings or of objects")
    return document


def _parse_json(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None


def _read_hub(
    spec: str, name: str, config: str | None, revision: str | None, split: str, column: str | None
) -> tuple[Prompt, ...]:
    import datasets

    try:
        rows = list(datasets.load_dataset(name, config, split=split, revision=revision))
    except Exception as error:  # the hub client's many error types have no narrower common base
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"hub dataset '{spec}' cannot be loaded ({reason}): check the id, split and network, "
            "set HF_TOKEN if it is gated, or pass a local file"
        ) from None
    # Alpaca-style rows whose instruction needs a separate input are no prompts of their own (paper,
    # appendix A: "instructions without inputs").
    rows = [row for row in rows if not (isinstance(row.get("input"), str) and row["input"].strip())]
    prompts = _to_prompts(rows, f"hub dataset '{spec}'", column)
    if not prompts:
        raise InputError(f"hub dataset '{spec}' holds no prompts")
    return prompts


def _to_prompts(rows: list[Any], where: str, column: str | None) -> tuple[Prompt, ...]:
    prompts = []
    text: Any
    columns: tuple[str, str | None] | None = None
    for number, row in enumerate(rows, 1):
        if isinstance(row, str):
            if column is not None:
                raise InputError(f"{where} has no columns: drop [{column}]")
            text, category = row, None
        elif isinstance(row, Mapping):
            if columns is None:
                names = [name for name in row if isinstance(name, str)]
                columns = _find_columns(names, where, column)
            text = row.get(columns[0])
            category = row.get(columns[1]) if columns[1] else None
        else:
            raise InputError(f"{where}, entry {number}: expected a string or an object of columns")
        if text is None:
            text = ""
        if not isinstance(text, str):
            raise InputError(
                f"{where}, entry {number}: the prompt is no text but {type(text).__name__}"
            )
        if text.strip():
            entry = f"{where}, entry {number}"
            named = None if category is None else well_formed(str(category), entry)
            prompts.append(Prompt(well_formed(text, entry).strip(), named))
    return tuple(prompts)


def _find_columns(names: list[str], where: str, column: str | None) -> tuple[str, str | None]:
    by_lower = {name.strip().lower(): name for name in names}
    category = next((by_lower[name] for name in CATEGORY_COLUMNS if name in by_lower), None)
    if column is not None:
        if column in names or column.lower() in by_lower:
            return (column if column in names else by_lower[column.lower()]), category
        raise InputError(f"{where} has no column '{column}' (it has: {', '.join(names)})")
    text = next((by_lower[name] for name in TEXT_COLUMNS if name in by_lower), None)
    if text is None:
        raise InputError(
            f"{where} has none of the columns {', '.join(TEXT_COLUMNS)} (it has: "
            f"{', '.join(names) or 'none'}): name one as SOURCE[column]"
        )
    return text, category
