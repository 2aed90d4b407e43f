"""Where an edit lies: a heat strip of what was removed, layers against components."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from abliterate.report.style import colour_bar, coloured, figure, finite, plain, plotly

Document = Mapping[str, Any]
_OUTSIDE = "outside"
#: Component, decoder block (None outside of the blocks), share removed (None: it cannot be told).
Cell = tuple[str, int | None, float | None]


def record_strip(edit: Document) -> Any | None:
    """The strip of an edit's record; None where a tensor does not say its layer.

    The share of a tensor along the direction is relative to its norm before the edit, so that what
    is left of it tells what was removed.
    """
    cells = []
    for tensor in edit["tensors"]:
        before, after = finite(tensor["before"]), finite(tensor["after"])
        if before and after is not None:
            cells.append((str(tensor["kind"]), tensor.get("layer"), 1 - after / before))
    return strip("Share of the direction removed", cells)


def audit_strip(document: Document) -> Any | None:
    """The strip of an audit as ``--json`` gives it; None if nothing was edited."""
    base = document["base"]
    if base is not None:
        sides = {t["side"] for t in base["tensors"] if t["projected"]}
        cells = [
            (t["component"], t["layer"], t["scale"] if t["projected"] else 0.0)
            for t in base["tensors"]
            if t["side"] in sides
        ]
    else:
        cells = [
            (u["kind"], u["layer"], u["removed"] if u["carries"] else 0.0)
            for u in document["units"]
        ]
    return strip("Share of the direction removed", cells)


def strip(title: str, cells: Iterable[Cell]) -> Any | None:
    """A heat strip: blue is removed, red amplified, white as it was; None without cells.

    Tensors of one component of one block are averaged; where no share can be told, it is empty.
    """
    sums: dict[tuple[str, int | None], list[float]] = {}
    for component, layer, value in cells:
        known = sums.setdefault((component, layer), [])
        if value is not None:
            known.append(value)
    if not sums:
        return None
    components = list(dict.fromkeys(component for component, _ in sums))
    layers: list[int | None] = [None] if any(layer is None for _, layer in sums) else []
    layers += sorted({layer for _, layer in sums if layer is not None})
    made = figure(title, "layer", "", 124 + 26 * len(components))
    made.add_trace(
        plotly().Heatmap(
            z=[[_mean(sums.get((c, layer))) for layer in layers] for c in components],
            x=[_OUTSIDE if layer is None else str(layer) for layer in layers],
            y=[plain(component) for component in components],
            **coloured("removed"),
            zmid=0,
            zmin=-1,
            zmax=1,
            xgap=1,
            ygap=1,
            hovertemplate="%{y}, layer %{x}<br>%{z:.2f} removed<extra></extra>",
            colorbar=colour_bar("share removed"),
        )
    )
    made.update_yaxes(autorange="reversed", showgrid=False, type="category")
    made.update_xaxes(showgrid=False, type="category")
    made.update_layout(margin={"t": 50})
    return made


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None
