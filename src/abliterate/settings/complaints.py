"""What pydantic finds wrong with a value, in the words of this tool's other messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_INTEGER, _NUMBER, _SWITCH = "must be an integer", "must be a number", "must be true or false"
_BY_TYPE = {
    "literal_error": "must be {expected}",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "int_type": _INTEGER,
    "int_parsing": _INTEGER,
    "int_from_float": _INTEGER,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "finite_number": "must be a finite number",
    "bool_type": _SWITCH,
    "bool_parsing": _SWITCH,
    "string_type": "must be text",
    "dict_type": "must be a table",
}


def complaint(error: ErrorDetails) -> str:
    """What a value must be: ``must be at least 1``; or what our own check of it said."""
    template = _BY_TYPE.get(error["type"])
    if template is None:
        message = error["msg"].removeprefix("Value error, ")
        return message.replace("Input should be ", "must be ", 1)
    bounds = {
        name: f"{value:g}" if isinstance(value, float) else value
        for name, value in error.get("ctx", {}).items()
    }
    return template.format_map(bounds).replace("'", "")
