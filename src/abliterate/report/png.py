"""The report's figures as PNG files, for papers; drawn by kaleido in a headless Chrome."""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from abliterate.console import debugging
from abliterate.errors import UsageError
from abliterate.storage.artifacts import check_writable

# Wide enough for a column at 300 dpi.
_WIDTH, _SCALE = 900, 2


def write_pngs(figures: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write every figure as ``folder/NAME.png``.

    Raises:
        UsageError: kaleido or a Chrome that it can start is missing.
    """
    try:
        kaleido = importlib.import_module("kaleido")
    except ImportError:
        raise UsageError("--png needs kaleido: pip install 'abliterate[report]'") from None
    check_writable(folder)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        {
            "fig": made.to_dict(),
            "path": str(folder / f"{name}.png"),
            "opts": {"format": "png", "width": _WIDTH, "scale": _SCALE},
        }
        for name, made in figures.items()
    ]
    heard = io.StringIO()
    try:
        # Its own progress and the browser's complaints are not ours to show.
        with redirect_stdout(heard), redirect_stderr(heard):
            kaleido.write_fig_from_object_sync(jobs, kopts={"mathjax": False})
    except Exception as error:  # its own, the browser's, and asyncio's have no common base
        if new and not any(folder.iterdir()):
            folder.rmdir()
        if debugging():
            raise
        short = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(
            f"--png needs Chrome or Chromium, and kaleido could not use one ({short}): install "
            "Chromium, or name it in BROWSER_PATH"
        ) from None
    return [Path(job["path"]) for job in jobs]
