"""Packages that only an extra of this one installs, each imported where it is needed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from abliterate.errors import UsageError


def import_extra(module: str, needed_by: str, package: str, extra: str, otherwise: str = "") -> Any:
    """A module of an optional package.

    Args:
        module: its full name.
        needed_by: the option or command that needs it.
        package: what to call the package.
        extra: the extra of this package that installs it.
        otherwise: how to do without, as the end of the sentence.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(missing_extra(needed_by, package, extra) + otherwise) from None


def require_extra(module: str, needed_by: str, package: str, extra: str) -> None:
    """Refuse what needs an optional package that is not there, without importing it.

    Raises:
        UsageError: it is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise UsageError(missing_extra(needed_by, package, extra))


def missing_extra(needed_by: str, package: str, extra: str) -> str:
    """What to say where an optional package is missing."""
    return f"{needed_by} needs {package}: pip install 'abliterate[{extra}]'"
