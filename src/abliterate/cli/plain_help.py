"""Help without types of flags: an option that takes no value has none to tell."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


def _plain(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            # Newer releases of typer ask the one, older ones the other.
            parameter.metavar = ""
            parameter.display_type_rich = lambda ctx: None
    return parameters


class PlainCommand(TyperCommand):
    """A command whose help says of a flag only what it does."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))


class PlainGroup(TyperGroup):
    """The commands, with a help of the same kind."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))
