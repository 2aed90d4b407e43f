"""examples/quickstart.ipynb runs as it stands, and its committed outputs are those it gives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def _shown(notebook: Any) -> list[list[str]]:
    """What each cell printed, and the kinds of what it showed."""
    cells = []
    for cell in notebook.cells:
        outputs = cell.get("outputs", ())
        printed = "".join(out["text"] for out in outputs if out.get("name") == "stdout")
        cells.append([printed, *(kind for out in outputs for kind in sorted(out.get("data", ())))])
    return cells


def test_quickstart_runs_and_its_outputs_are_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    committed = _shown(notebook)
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1] / "src"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=place).execute()
    assert _shown(notebook) == committed
    kinds = {kind for cell in committed for kind in cell}
    assert {"text/html", "application/vnd.plotly.v1+json"} <= kinds
    assert (tmp_path / "out" / "abliterate.json").is_file()
    assert os.fspath(NOTEBOOK.parents[1]) not in NOTEBOOK.read_text(encoding="utf-8")
