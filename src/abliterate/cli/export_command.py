"""The command export: a direction as a file of another program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from abliterate.cli import options as opt
from abliterate.cli.stale_parts import say_stale
from abliterate.console import print_json, print_line


@opt.command()
def export(
    direction: Annotated[
        str,
        typer.Argument(
            help="Run folder of select, or anything else that --direction takes.",
            show_default=False,
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="gguf (control vector of llama.cpp and repeng), steering-vectors or npz.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File to write. Default: direction and the format's suffix, in the run folder.",
            show_default=False,
        ),
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Write the direction as a file of another program; --direction reads it back."""
    from abliterate.direction_export import export_direction

    path, found = export_direction(direction, to, output)
    if Path(direction).is_dir():
        say_stale(Path(direction), "selection")
    document = {
        "file": str(path),
        "format": to,
        "layer": found.layer,
        "position": found.position,
        "norm": float(found.vector.double().norm()),
    }
    if as_json:
        return print_json(document)
    where = "" if found.layer is None else f" (enters block {found.layer})"
    return print_line(f"{path}: the direction{where} for {to}")
