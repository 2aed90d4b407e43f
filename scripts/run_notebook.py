#!/usr/bin/env python3
"""Run examples/quickstart.ipynb and write its outputs into it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nbclient
import nbformat

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # As data alone: the library that draws it would be megabytes in the file.
    os.environ["PLOTLY_RENDERER"] = "plotly_mimetype"
    with tempfile.TemporaryDirectory() as folder:
        place = {"metadata": {"path": folder}}
        nbclient.NotebookClient(notebook, timeout=600, resources=place).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
        outputs = cell.get("outputs", [])
        cell["outputs"] = [out for out in outputs if out.get("name") != "stderr"]
        if cell.cell_type != "code":
            del cell["outputs"]
    notebook.metadata["language_info"] = {"name": "python"}
    NOTEBOOK.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
