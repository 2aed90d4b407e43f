"""Edits of several checkpoints side by side: how alike their directions are, shares by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abliterate.report.figure_page import PageFigure, PageTable, figure_page
from abliterate.report.style import (
    COLOURS,
    MUTED,
    across,
    colour_bar,
    coloured,
    figure,
    finite,
    layer_axis,
    plotly,
)

Document = Mapping[str, Any]
VARIANTS = ["no.", "variant", "edit", "projected", "differ otherwise", "share removed"]
_DASHES = ("solid", "dash", "dot", "dashdot")


def variant_rows(document: Document) -> list[list[str]]:
    """What each variant is, in the columns ``VARIANTS``; the figures name it by its number."""
    rows = []
    for number, variant in enumerate(document["variants"], start=1):
        form = variant["form"]
        rows.append(
            [
                str(number),
                variant["name"],
                "no projection" if form is None else ", ".join(form["kinds"]),
                str(variant["projected"]),
                str(variant["beyond"]),
                "-" if form is None else f"{form['scale']:z.2f}",
            ]
        )
    return rows


def variant_page(document: Document) -> str:
    """The edits as an HTML file of their own.

    Args:
        document: of ``compare_variants``.

    Raises:
        UsageError: plotly is missing.
    """
    alike = [f"Edited alike: {', '.join(group)}." for group in document["alike"]]
    several = len(document["variants"]) > 1
    figures = [
        PageFigure(
            "cosines",
            _cosines(document) if several else None,
            "Cosine of each two variants' directions, signs aside, from 0 to 1; averaged over "
            "layers where each has its own.",
        ),
        PageFigure(
            "shares",
            _shares(document),
            "Share of its direction removed from each block: 1 is all of it, below 0 it was "
            "amplified. Layers are counted from 0.",
        ),
    ]
    return figure_page(
        f"Edits of {document['base']}",
        "Edited checkpoints compared",
        alike or (["No two edited alike."] if several else []),
        figures,
        [PageTable("Variants", VARIANTS, variant_rows(document), 3)],
        "Numbers in the figures are those of the table of variants.",
    )


def _cosines(document: Document) -> Any:
    """The cosines of all pairs; empty where one has no direction."""
    numbers = [str(number) for number in range(1, len(document["variants"]) + 1)]
    made = figure("Cosine of directions", "variant", "variant", 190 + 34 * len(numbers))
    made.add_trace(
        plotly().Heatmap(
            z=document["cosines"],
            x=numbers,
            y=numbers,
            **coloured("share"),
            zmin=0,
            zmax=1,
            xgap=1,
            ygap=1,
            texttemplate="%{z:.3f}",
            customdata=document["shared"],
            hovertemplate="%{y} and %{x}<br>cosine %{z:.3f}<br>in the other's subspace "
            "%{customdata:.3f}<extra></extra>",
            colorbar=colour_bar("cosine"),
        )
    )
    made.update_yaxes(autorange="reversed", showgrid=False, type="category")
    made.update_xaxes(showgrid=False, type="category")
    made.update_layout(margin={"t": 50})
    return made


def _shares(document: Document) -> Any | None:
    """Every variant's share in each layer; None if none has any."""
    made = figure("Share of the direction removed", "layer", "share removed", 360)
    depth = 0
    for index, variant in enumerate(document["variants"]):
        shares = (variant["form"] or {}).get("layer_scales") or []
        if not any(finite(share) is not None for share in shares):
            continue
        depth = max(depth, len(shares))
        # Edits made alike lie on each other: the dashes of the later ones let the earlier through.
        line = {"color": COLOURS[index % len(COLOURS)], "dash": _DASHES[index % len(_DASHES)]}
        made.add_trace(
            plotly().Scatter(
                x=list(range(len(shares))),
                y=[finite(share) for share in shares],
                name=str(index + 1),
                mode="lines+markers",
                line=line,
                hovertemplate="layer %{x}: %{y:.2f}<extra>variant %{fullData.name}</extra>",
            )
        )
    if not made.data:
        return None
    layer_axis(made, depth)
    across(made, 0, line={"color": MUTED, "width": 1})
    made.update_layout(showlegend=True, legend={"title": {"text": "variant "}})
    return made
