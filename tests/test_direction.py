"""A direction does arithmetic, knows where it came from, and shows itself in a line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from abliterate import Direction, load_direction
from abliterate.errors import InputError, UsageError


def test_arithmetic_keeps_where_it_came_from() -> None:
    d = Direction(torch.tensor([3.0, 4.0]).double(), -1, 5, "abc", model="org/name")
    other = Direction(torch.tensor([4.0, -3.0]).double(), -1, 6, model="org/name")
    assert (-d).vector.tolist() == [-3, -4]
    assert (d * 0.5).vector.tolist() == (0.5 * d).vector.tolist() == (d / 2).vector.tolist()
    assert (d + other).vector.tolist() == [7, 1]
    assert (d - other).vector.tolist() == [-1, 7]
    assert d.norm == 5
    assert d.unit.vector.tolist() == [0.6, 0.8]
    assert (d.cosine(-d), d.cosine(other), d.cosine(np.array([6.0, 8.0]))) == (-1, 0, 1)
    assert ((-d).position, (-d).layer, (-d).model, (-d).sha256) == (-1, 5, "org/name", None)
    assert ((d + other).position, (d + other).layer) == (-1, None)
    with pytest.raises(InputError, match="do not fit"):
        d.cosine(torch.ones(3))
    with pytest.raises(InputError, match="no cosine"):
        d.cosine(torch.zeros(2))
    with pytest.raises(UsageError, match="finite number"):
        d * float("nan")
    with pytest.raises(TypeError):
        d * other  # type: ignore[operator]


def test_reprs_are_short_and_safe() -> None:
    d = Direction(torch.ones(4096), -1, 5, model="<b>\x1b[2J</b>")
    assert repr(d) == "Direction(position -1, layer 5, norm 64, d_model 4096, of '<b>\\x1b[2J</b>')"
    assert "<b>\x1b" not in d._repr_html_()
    assert "&lt;b&gt;" in d._repr_html_()
    assert repr(Direction(None)) == "Direction(NoneType)"  # type: ignore[arg-type]


def test_save_replaces_directions_and_nothing_else(tmp_path: Path) -> None:
    d = Direction(torch.arange(4).double(), -2, 3, model="org/name")
    path = d.save(tmp_path / "d.safetensors")
    (-d).save(path)
    back = load_direction(path)
    assert torch.equal(back.vector, -d.vector)
    assert (back.position, back.layer, back.model) == (-2, 3, "org/name")
    with pytest.raises(UsageError, match="safetensors"):
        d.save(tmp_path / "d.pt")
    path.write_text("mine")
    with pytest.raises(UsageError, match="no earlier output"):
        d.save(path)
    assert path.read_text() == "mine"
