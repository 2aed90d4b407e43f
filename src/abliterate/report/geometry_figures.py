"""Figures of inspect and trace: PCA, cosines and norms by layer, trace curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from abliterate.report.collect import Document
from abliterate.report.style import (
    COLOURS,
    GRID,
    HARMFUL,
    HARMLESS,
    MUTED,
    across,
    colour_bar,
    coloured,
    figure,
    finite,
    label,
    layer_axis,
    plotly,
)

# More panels than this are too small to read: evenly spaced layers stand for the rest.
_PANELS = 12


def panel_layers(layers: Sequence[int], selected: int | None) -> list[int]:
    """The layers shown as small multiples: all, or evenly spaced ones and the selected."""
    if len(layers) <= _PANELS:
        return list(layers)
    step = (len(layers) - 1) / (_PANELS - 1)
    chosen = {layers[round(step * i)] for i in range(_PANELS)}
    if selected in layers and selected not in chosen:
        assert selected is not None
        inner = sorted(chosen)[1:-1]
        chosen.remove(min(inner, key=lambda layer: abs(layer - selected)))
        chosen.add(selected)
    return sorted(chosen)


def pca_panels(inspect: Document) -> Any:
    """PCA of harmful and harmless activations, a panel a layer."""
    projections: Document = inspect["projections"]
    selected = inspect["direction"]["layer"]
    layers = panel_layers(sorted(map(int, projections)), selected)
    columns = min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    titles = [f"layer {layer}" + (" ★" if layer == selected else "") for layer in layers]
    made = plotly("subplots").make_subplots(
        rows, columns, subplot_titles=titles, horizontal_spacing=0.04, vertical_spacing=0.32 / rows
    )
    made.update_layout(figure("PCA by layer", "", "", 70 + 190 * rows).layout)
    for at, layer in enumerate(layers):
        for kind, colour in (("harmful", HARMFUL), ("harmless", HARMLESS)):
            trace = _points(projections[str(layer)], kind, colour, 4)
            trace.update(showlegend=at == 0, legendgroup=kind)
            made.add_trace(trace, row=at // columns + 1, col=at % columns + 1)
    made.update_xaxes(showticklabels=False, gridcolor=GRID, zeroline=False, title=None)
    made.update_yaxes(showticklabels=False, gridcolor=GRID, zeroline=False, title=None)
    made.update_annotations(font={"size": 11})
    made.update_layout(
        margin={"l": 10, "r": 10, "t": 84, "b": 12}, legend={"y": 1.0 + 28 / (190 * rows)}
    )
    return made


def pca_layer(inspect: Document) -> Any:
    """One layer's PCA, which the page's slider moves through the layers."""
    layer = slider_layers(inspect)[1]
    made = figure("PCA of one layer", "first principal component", "second", 420)
    for kind, colour in (("harmful", HARMFUL), ("harmless", HARMLESS)):
        made.add_trace(_points(inspect["projections"][str(layer)], kind, colour, 6))
    return made


def slider_layers(inspect: Document) -> tuple[list[int], int]:
    """The layers with projections, and the one to start with."""
    layers = sorted(map(int, inspect["projections"]))
    selected = inspect["direction"]["layer"]
    return layers, selected if selected in layers else layers[len(layers) // 2]


def _points(projection: Document, kind: str, colour: str, size: int) -> Any:
    points = projection[kind]
    return plotly().Scatter(
        x=[x for x, _ in points],
        y=[y for _, y in points],
        mode="markers",
        marker={"size": size, "color": colour, "opacity": 0.65},
        name=kind,
        hovertemplate=f"{kind}<br>PC1 %{{x:.3g}}, PC2 %{{y:.3g}}<extra></extra>",
    )


def pca_curve(inspect: Document) -> Any:
    """|cos(PC1, difference of means)| and the separation, by layer."""
    names = {
        "cos_pc1": "|cos(PC1, difference of means)|",
        "pc1_share": "share of variance of PC1",
        "auc": "AUC along the direction",
        "silhouette": "silhouette along the direction",
    }
    made = figure("Subspace by layer", "layer", "0 to 1, no unit", 360)
    rows = inspect["layers"]
    for at, (key, name) in enumerate(names.items()):
        values = [finite((row["geometry"] or {}).get(key)) for row in rows]
        made.add_trace(_line([row["layer"] for row in rows], values, name, COLOURS[at]))
    layer_axis(made, len(rows))
    return made


def norms(inspect: Document) -> Any:
    """Norms of the difference of means and of the means themselves, by layer."""
    names = {
        "norm": "difference of means",
        "norm_mean_harmful": "mean, harmful",
        "norm_mean_harmless": "mean, harmless",
    }
    colours = (COLOURS[2], HARMFUL, HARMLESS)
    made = figure("Norms by layer", "layer", "norm (of activations)", 360)
    rows = inspect["layers"]
    for (key, name), colour in zip(names.items(), colours, strict=True):
        values = [finite(row[key]) or None for row in rows]
        made.add_trace(_line([row["layer"] for row in rows], values, name, colour))
    layer_axis(made, len(rows))
    made.update_yaxes(type="log", dtick=1, exponentformat="power")
    return made


def cosines(inspect: Document) -> Any:
    """Cosine of every candidate with the selected direction, layer x position."""
    held = inspect["cosines"]
    rows = len(held["positions"])
    made = figure("Cosine with the selected direction", "layer", "position", 150 + 30 * rows)
    made.add_trace(
        plotly().Heatmap(
            z=held["values"],
            x=list(range(len(held["values"][0]))),
            y=list(range(rows)),
            **coloured("diverging"),
            zmin=-1,
            zmax=1,
            xgap=1,
            ygap=1,
            hovertemplate="layer %{x}<br>cosine %{z:.4f}<extra></extra>",
            colorbar=colour_bar("cosine"),
        )
    )
    labels = [
        f"{position}  {label(token)}".rstrip()
        for position, token in zip(held["positions"], held["tokens"], strict=True)
    ]
    made.update_yaxes(tickvals=list(range(rows)), ticktext=labels, showgrid=False)
    layer_axis(made, len(held["values"][0]))
    made.update_layout(margin={"t": 50})
    return made


def _line(x: Sequence[int], y: Sequence[float | None], name: str, colour: str) -> Any:
    return plotly().Scatter(
        x=list(x),
        y=list(y),
        mode="lines+markers",
        marker={"size": 5},
        line={"width": 2, "color": colour},
        name=name,
        hovertemplate=f"layer %{{x}}<br>{name} %{{y:.4g}}<extra></extra>",
    )


def trace_curves(trace: Document) -> Any:
    """Cosine of the last token with the direction by layer: mean, and one standard deviation."""
    names = {
        "harmful": ("harmful", HARMFUL),
        "harmless": ("harmless", HARMLESS),
        "suffix": ("harmful + suffix", COLOURS[2]),
        "random": ("harmful + random suffix", COLOURS[3]),
    }
    made = figure("Along the direction", "layer", "cosine with the direction", 400)
    objects = plotly()
    held = {kind: curve for kind, curve in trace["cosines"].items() if kind in names}
    for kind, curve in held.items():
        name, colour = names[kind]
        layers = list(range(len(curve["mean"])))
        upper = [m + s for m, s in zip(curve["mean"], curve["std"], strict=True)]
        lower = [m - s for m, s in zip(curve["mean"], curve["std"], strict=True)]
        made.add_trace(
            objects.Scatter(
                x=layers + layers[::-1],
                y=upper + lower[::-1],
                fill="toself",
                fillcolor=_faint(colour),
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
                legendgroup=kind,
            )
        )
        line = _line(layers, curve["mean"], f"{name} (n={curve['n']})", colour)
        line.update(legendgroup=kind)
        made.add_trace(line)
    across(made, 0, line={"color": MUTED, "width": 1, "dash": "dot"})
    layer_axis(made, max(len(curve["mean"]) for curve in held.values()))
    return made


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"
