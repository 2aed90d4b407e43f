"""The report's figures as PNG files, for papers; drawn by kaleido in a headless Chrome."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from abliterate.console import debugging
from abliterate.errors import UsageError, one_line
from abliterate.extras import import_extra
from abliterate.storage.artifacts import check_writable, write_atomically
from abliterate.storage.ownership import claim, is_picture, mark_picture

# Wide enough for a column at 300 dpi.
_WIDTH, _SCALE = 900, 2


def write_pngs(figures: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write every figure as ``folder/NAME.png``.

    Raises:
        InputError: one of the names is taken by a link, or by another's picture.
        UsageError: kaleido or a Chrome that it can start is missing.
    """
    kaleido = import_extra("kaleido", "--png", "kaleido", "report")
    check_writable(folder)
    claim(folder, {f"{name}.png": is_picture for name in figures})
    # Drawn elsewhere first: what draws would write through a link.
    with TemporaryDirectory(prefix="abliterate-") as drawn:
        files = [f"{name}.png" for name in figures]
        jobs = [
            {
                "fig": made.to_dict(),
                "path": str(Path(drawn, file)),
                "opts": {"format": "png", "width": _WIDTH, "scale": _SCALE},
            }
            for file, made in zip(files, figures.values(), strict=True)
        ]
        _draw(kaleido, jobs)  # kaleido 1.0 takes the jobs apart
        for file in files:
            write_atomically(folder / file, mark_picture(Path(drawn, file).read_bytes()))
    return [folder / file for file in files]


def _draw(kaleido: Any, jobs: Sequence[Mapping[str, Any]]) -> None:
    heard = io.StringIO()
    try:
        # Its own progress and the browser's complaints are not ours to show.
        with redirect_stdout(heard), redirect_stderr(heard):
            kaleido.write_fig_from_object_sync(jobs, kopts={"mathjax": False})
    except Exception as error:  # its own, the browser's, and asyncio's have no common base
        if debugging():
            raise
        short = one_line(error)[:200] or type(error).__name__
        raise UsageError(
            f"--png needs Chrome or Chromium, and kaleido could not use one ({short}): install "
            "Chromium, or name it in BROWSER_PATH"
        ) from None
