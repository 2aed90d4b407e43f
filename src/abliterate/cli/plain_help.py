"""Help without types of flags, and without escape codes where none are wanted."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from abliterate.console import is_plain


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


class PlainCommand(TyperCommand):
    """A command whose help says of a flag only what it does."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _without_styles()
        super().format_help(ctx, formatter)


class PlainGroup(TyperGroup):
    """The commands, with a help of the same kind."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _without_styles()
        super().format_help(ctx, formatter)
