"""How the report's figures look, and how text gets into them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from abliterate.extras import import_extra

#: Colours that hold up on white and on near-black (Okabe and Ito, for the colour-blind).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#999999")
HARMFUL, HARMLESS = COLOURS[1], COLOURS[0]
INK, GRID, MUTED = "#1d2530", "#e3e7ec", "#8a94a3"
GOLD = "#ffc400"
#: For the figures whose top margin is taken; in the container, whatever the height of the plot.
LEGEND_BELOW = {"yref": "container", "y": 0.01, "yanchor": "bottom"}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"


#: A heatmap's colours by what they say, on white (plotly's names) and on near-black: what is not
#: there fades into the ground of either.
SCALES: dict[str, tuple[dict[str, Any], list[tuple[float, str]]]] = {
    "diverging": (
        {"colorscale": "RdBu", "reversescale": True},
        [(0, "#8cc8ff"), (0.25, "#2f75b0"), (0.5, "#0c1116"), (0.75, "#b04a2f"), (1, "#ffb294")],
    ),
    "removed": (
        {"colorscale": "RdBu"},
        [(0, "#ffb294"), (0.25, "#b04a2f"), (0.5, "#0c1116"), (0.75, "#2f75b0"), (1, "#8cc8ff")],
    ),
    "amount": (
        {"colorscale": "Viridis", "reversescale": True},
        [(0, "#440154"), (0.25, "#3b528b"), (0.5, "#21918c"), (0.75, "#5ec962"), (1, "#fde725")],
    ),
    "share": (
        {"colorscale": "Blues"},
        [(0, "#0c1116"), (0.5, "#2f75b0"), (1, "#a9d6ff")],
    ),
    "absent": (
        {"colorscale": [(0, "#d3dae2"), (1, "#d3dae2")]},
        [(0, "#3b4754"), (1, "#3b4754")],
    ),
}


def coloured(scale: str) -> dict[str, Any]:
    """What a heatmap's colours are called, so that the page can change them with its theme."""
    return {**SCALES[scale][0], "meta": {"scale": scale}}


def dark_scales() -> dict[str, list[tuple[float, str]]]:
    """The colours on a dark ground, for the page's script."""
    return {name: dark for name, (_, dark) in SCALES.items()}


def plotly(module: str = "graph_objects") -> Any:
    """A module of plotly.

    Raises:
        UsageError: it is not installed.
    """
    return import_extra(f"plotly.{module}", "report", "plotly", "report")


def plain(text: object) -> str:
    """Text of a prompt, token or model as plotly shows it: it reads a little HTML, so escaped."""
    return html.escape(str(text), quote=False)


def shortened(text: object, most: int = 26) -> str:
    """The beginning of a text that labels an axis, escaped; the rest is in what hovers."""
    held = " ".join(str(text).split())
    return plain(held if len(held) <= most else held[: most - 1].rstrip() + "…")


def label(token: str) -> str:
    """A token as an axis label: white space made visible, escaped."""
    return plain(repr(token)[1:-1])


def finite(value: Any) -> float | None:
    """A number of a record, or None: not there, or not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def figure(title: str, x: str, y: str, height: int = 360) -> Any:
    """An empty figure with the report's look; ``title`` is for the exported picture."""
    axis = {
        "gridcolor": GRID, "zeroline": False, "linecolor": MUTED, "automargin": True,
        "exponentformat": "none",
    }  # fmt: skip
    layout = {
        "template": "none",
        "title": {
            "text": title,
            "x": 0,
            "xref": "paper",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 12},
            "font": {"size": 15},
        },
        "font": {"family": FONT, "size": 12, "color": INK},
        "height": height,
        "margin": {"l": 56, "r": 16, "t": 76, "b": 48},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "font": {"size": 11}},
        "hoverlabel": {"font": {"family": FONT, "size": 12}, "align": "left"},
        "xaxis": {**axis, "title": {"text": x, "standoff": 6}},
        "yaxis": {**axis, "title": {"text": y, "standoff": 6}},
    }
    # Ten times as fast as to change the layout of a figure that is there.
    return plotly().Figure(layout=layout)


def colour_bar(title: str, **changes: Any) -> dict[str, Any]:
    """A heatmap's colour bar: what it measures beside it, in numbers without prefixes."""
    heading = {"text": title, "side": "right", "font": {"size": 11}}
    look = {"thickness": 12, "outlinewidth": 0, "exponentformat": "none", "title": heading}
    return look | changes


def error_bars(rates: Sequence[float | None], spans: Sequence[Any]) -> dict[str, Any]:
    """Intervals about the bars of a figure; no bar where there is none."""
    ends = [
        (0.0, 0.0)
        if rate is None or not span
        else (max(0.0, rate - float(span[0])), max(0.0, float(span[1]) - rate))
        for rate, span in zip(rates, spans, strict=True)
    ]
    return {
        "visible": any(spans),
        "type": "data",
        "symmetric": False,
        "arrayminus": [below for below, _ in ends],
        "array": [above for _, above in ends],
        "thickness": 1.3,
        "width": 4,
        "color": INK,
    }


def mark_stale(made: Any) -> None:
    """A mark across a figure that is of something else than the run holds now."""
    made.update_layout(title={"text": f"STALE: {made.layout.title.text}"})
    made.add_annotation(
        text="STALE",
        xref="paper",
        yref="paper",
        x=0.5,
        y=0.5,
        showarrow=False,
        textangle=-20,
        opacity=0.35,
        font={"size": 54, "color": "#a8320a"},
    )


def across(made: Any, value: float, **look: Any) -> None:
    """A line across a figure at a height. As ``add_hline``, which takes ten times as long."""
    made.add_shape(type="line", xref="x domain", x0=0, x1=1, yref="y", y0=value, y1=value, **look)


def upright(made: Any, start: float, end: float, **look: Any) -> None:
    """A band from the bottom of a figure to its top, or a line where it has no width."""
    kind = "line" if start == end else "rect"
    made.add_shape(type=kind, xref="x", x0=start, x1=end, yref="y domain", y0=0, y1=1, **look)


def layer_axis(made: Any, n_layers: int) -> None:
    """Whole layers on the x axis, with some air at the ends."""
    step = max(1, math.ceil(n_layers / 16))
    made.update_xaxes(range=[-0.6, n_layers - 0.4], dtick=step, tick0=0, showgrid=False)
