"""Edits of several checkpoints side by side: how alike their directions are, scales by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abliterate.report.style import COLOURS, figure, finite, plain, plotly
from abliterate.storage.web_page import figure_page

Document = Mapping[str, Any]


def variant_figure(document: Document) -> Any:
    """Left the cosines of all pairs, right every variant's scale in each layer.

    Args:
        document: of ``compare_variants``.
    """
    names = [plain(variant["name"]) for variant in document["variants"]]
    labels = [f"{index}: {name}" for index, name in enumerate(names, start=1)]
    made = figure("Edits side by side", "", "", 300 + 24 * len(names))
    made.set_subplots(rows=1, cols=2, subplot_titles=("cosine of directions", "scale by layer"))
    made.add_trace(
        plotly().Heatmap(
            z=document["cosines"], x=labels, y=labels, zmin=0, zmax=1, colorscale="Blues",
            xgap=1, ygap=1, showscale=False, texttemplate="%{z:.2f}",
            customdata=document["shared"],
            hovertemplate="%{y}<br>%{x}<br>cosine %{z:.3f}, in its subspace %{customdata:.3f}"
            "<extra></extra>",
        ),
        row=1, col=1,
    )  # fmt: skip
    for index, (variant, name) in enumerate(zip(document["variants"], labels, strict=True)):
        scales = (variant["form"] or {}).get("layer_scales") or []
        made.add_trace(
            plotly().Scatter(
                x=list(range(len(scales))), y=[finite(scale) for scale in scales], name=name,
                mode="lines+markers", line={"color": COLOURS[index % len(COLOURS)]},
            ),
            row=1, col=2,
        )  # fmt: skip
    made.update_yaxes(autorange="reversed", type="category", row=1, col=1)
    made.update_xaxes(type="category", row=1, col=1)
    made.update_xaxes(title_text="layer", row=1, col=2)
    made.update_yaxes(title_text="share removed", row=1, col=2)
    return made


def variant_page(document: Document) -> str:
    """The figure as an HTML file of its own.

    Raises:
        UsageError: plotly is missing.
    """
    bundle = plotly("offline").get_plotlyjs()
    lines = [", ".join(group) + " edited alike" for group in document["alike"]]
    title = f"Edits of {document['base']}"
    return figure_page(title, lines or ["no two edited alike"], variant_figure(document), bundle)
