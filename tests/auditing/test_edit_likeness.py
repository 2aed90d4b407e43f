"""diff of several variants, and the pages that audit and diff draw."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_edits import (
    DEPTH,
    drifting,
    edit_matrices,
    make_checkpoint,
    projected,
    random_direction,
)
from browser import CAN_BROWSE, check_small_page

Cli = Callable[..., Any]


def _figures(page: Path) -> Any:
    data = re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert data is not None
    return json.loads(data[1])["figures"]


def test_who_edited_alike_is_told(cli: Cli, fails: Callable[..., str], tmp_path: Path) -> None:
    """Two along one direction, one amplified along it, one along another, one by layer."""
    matrices = make_checkpoint("llama", tmp_path / "base")
    rows = drifting(0.8)
    one, other = random_direction(1), random_direction(2)
    mixed = (one + other) / (one + other).norm()
    edits: dict[str, tuple[Callable[..., torch.Tensor | None], float]] = {
        "whole": (lambda _: one, 1.0),
        "half": (lambda m: one if m.layer in (2, 3) else None, 0.5),
        "more": (lambda _: one, -1.0),
        "mixed": (lambda _: mixed, 1.0),
        "layers": (lambda m: None if m.layer is None else rows[m.layer], 1.0),
    }
    names = [str(tmp_path / name) for name in edits]
    for name, (directions, scale) in edits.items():
        edit_matrices(tmp_path / "base", tmp_path / name, matrices, directions, projected(scale))
    page = tmp_path / "diff.html"
    result = cli("diff", tmp_path / "base", *names, "--json", "-o", page)
    assert result.code == 0, result.err
    found = result.json
    assert found["alike"] == [[names[0], names[1]]]
    cosines = torch.tensor(found["cosines"])
    assert cosines[0, 1] > 0.999
    assert cosines[0, 2] > 0.999
    assert float(cosines[0, 3]) == pytest.approx(abs(float(one @ mixed)), abs=1e-4)
    by_layer = torch.stack(rows).matmul(one).abs().mean()
    assert float(cosines[0, 4]) == pytest.approx(float(by_layer), abs=1e-3)
    # A subspace of many directions holds more of one than the one holds of it.
    assert found["shared"][0][4] > 2 * found["shared"][4][0]
    scales = found["variants"][1]["form"]["layer_scales"]
    assert [s is not None for s in scales] == [layer in (2, 3) for layer in range(DEPTH)]
    assert scales[2] == pytest.approx(0.5, abs=1e-3)
    figures = _figures(page)
    (heat,) = figures["cosines"]["data"]
    assert heat["z"] == found["cosines"]
    lines = figures["shares"]["data"]
    assert [line["name"] for line in lines] == ["1", "2", "3", "4", "5"]
    assert lines[1]["y"] == scales
    for name in names:
        assert name in page.read_text()
    shown = cli("diff", tmp_path / "base", *names[:2])
    assert shown.out.splitlines()[-1] == f"edited alike: {names[0]}, {names[1]}"
    # The strip of one of them: two layers of two components, blank elsewhere.
    strip = tmp_path / "audit.html"
    result = cli("audit", names[1], "--base", tmp_path / "base", "-o", strip)
    assert result.code == 7
    assert "scale 0.50" in strip.read_text()
    (heat,) = _figures(strip)["edited"]["data"]
    assert heat["x"] == ["outside", *map(str, range(DEPTH))]
    values = dict(zip(heat["y"], heat["z"], strict=True))
    for component in ("attention", "mlp"):
        expected = [None, 0, 0, 0.5, 0.5, 0, 0]
        assert values[component] == pytest.approx(expected, abs=1e-3)
    assert values["embedding"][0] == 0
    if CAN_BROWSE:
        check_small_page(page)
        check_small_page(strip)
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    for command in (("audit", names[1]), ("diff", tmp_path / "base", names[1])):
        assert "no earlier output" in fails(*command, "-o", tmp_path / "mine.html", code=2)
    assert "diff.html" in fails("diff", *names[:2], "-o", tmp_path / "x.png", code=2)
