"""Help without types of flags and without escape codes where none are wanted, and whole where it is
narrow."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from typing import Any

from typer.core import TyperCommand, TyperGroup

from abliterate.console import is_plain

# What rich puts in the place of what it cuts off; no help text of ours has it.
_CUT = "…"
# Where the lines of an option's text begin, below its name.
_INDENT = 6


def _plain(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            # Newer releases of typer ask the one, older ones the other.
            parameter.metavar = ""
            parameter.display_type_rich = lambda ctx: None
    return parameters


def _without_styles() -> None:
    """With NO_COLOR typer's help would still be bold and dim."""
    if is_plain():
        from typer import rich_utils

        rich_utils.COLOR_SYSTEM = None


def _show(command: Any, show: Callable[[], None], formatter: Any) -> None:
    """Help in panels, or as a list of names with their texts below where panels cut any off."""
    _without_styles()
    with redirect_stdout(StringIO()) as panels:
        show()
    if _CUT not in panels.getvalue():
        show()
        return
    formatter.width = max(shutil.get_terminal_size().columns, 2 * _INDENT)
    formatter.write_dl = partial(formatter.write_dl, col_max=_INDENT - 2)
    for one in getattr(command, "commands", {}).values():  # else cut to a few words
        one.short_help = one.short_help or (one.help or "").partition("\n\n")[0]
    mode, command.rich_markup_mode = command.rich_markup_mode, None
    try:
        show()
    finally:
        command.rich_markup_mode = mode
    # The texts are markup, in which brackets are escaped.
    formatter.buffer = [part.replace("\\[", "[") for part in formatter.buffer]


class PlainCommand(TyperCommand):
    """A command whose help says of a flag only what it does."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _show(self, partial(super().format_help, ctx, formatter), formatter)


class PlainGroup(TyperGroup):
    """The commands, with a help of the same kind."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _show(self, partial(super().format_help, ctx, formatter), formatter)
