"""From rows to texts: which column holds the prompt, and what in it the user said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from abliterate.errors import InputError

TEXT_COLUMNS = ("instruction", "prompt", "goal", "text", "question", "behavior")
CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
CATEGORY_COLUMNS = ("category", "semanticcategory", "functionalcategory", "topic", "type", "label")
# Who speaks: in the chat format of transformers and the OpenAI API, and in ShareGPT's.
_ROLES, _CONTENTS, _USERS = ("role", "from"), ("content", "value"), ("user", "human")


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


def texts_of(
    rows: Sequence[Any], where: str, column: str | None
) -> Iterator[tuple[str, str | None]]:
    """The prompt and the category (where there is one) of each row that has a prompt.

    Args:
        rows: strings, or objects of columns. A cell may be a conversation (its last turn of the
            user counts) or a list of parts (its texts count).
        where: what they are, for error messages.
        column: which column holds the prompts; None: the first that is called like one.

    Raises:
        InputError: there is no such column, or something else in it.
    """
    columns: tuple[str, str | None] | None = None
    for number, row in enumerate(rows, 1):
        entry = f"{where}, entry {number}"
        cell: Any
        if isinstance(row, str):
            if column is not None:
                raise InputError(f"{where} has no columns: drop [{column}]")
            cell, category = row, None
        elif isinstance(row, Mapping):
            if columns is None:
                names = [name for name in row if isinstance(name, str)]
                columns = _find_columns(names, where, column)
            cell = row.get(columns[0])
            category = row.get(columns[1]) if columns[1] else None
        else:
            raise InputError(f"{entry}: expected a string or an object of columns")
        text = _text_of(cell, entry)
        if text.strip():
            named = None if category is None else well_formed(str(category), entry)
            yield well_formed(text, entry).strip(), named


def _text_of(cell: Any, where: str) -> str:
    """A cell's text: of a conversation the last turn of the user, of parts those that are text."""
    if cell is None:
        return ""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, list) and cell and all(isinstance(part, dict) for part in cell):
        if any(_first(part, _ROLES) for part in cell):
            said = [part for part in cell if _first(part, _ROLES) in _USERS]
            if not said:
                raise InputError(f"{where}: the conversation has no turn of the user")
            return _text_of(_first(said[-1], _CONTENTS), where)
        texts = [part.get("text") for part in cell if part.get("type", "text") == "text"]
        if texts and all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise InputError(f"{where}: the prompt is no text but {type(cell).__name__}")


def _first(turn: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((turn[name] for name in names if name in turn), None)


def _find_columns(names: list[str], where: str, column: str | None) -> tuple[str, str | None]:
    by_lower = {name.strip().lower(): name for name in names}
    category = next((by_lower[name] for name in CATEGORY_COLUMNS if name in by_lower), None)
    if column is not None:
        if column in names or column.lower() in by_lower:
            return (column if column in names else by_lower[column.lower()]), category
        raise InputError(f"{where} has no column '{column}' (it has: {', '.join(names)})")
    known = (*TEXT_COLUMNS, *CONVERSATION_COLUMNS)
    text = next((by_lower[name] for name in known if name in by_lower), None)
    if text is None:
        raise InputError(
            f"{where} has none of the columns {', '.join(known)} (it has: "
            f"{', '.join(names) or 'none'}): name one as SOURCE[column]"
        )
    return text, category
