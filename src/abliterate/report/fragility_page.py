"""The page and the pictures of fragility.json: refusals, refusal score and KL by share removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abliterate.errors import UsageError, one_line
from abliterate.extras import import_extra, missing_extra
from abliterate.report.figure_page import PageFigure, PageTable, figure_page
from abliterate.report.style import (
    GRID,
    HARMFUL,
    HARMLESS,
    MUTED,
    error_bars,
    figure,
    finite,
    plain,
    plotly,
)
from abliterate.storage.artifacts import write_atomically
from abliterate.storage.ownership import Kind, claim, is_page, is_picture, mark_picture

_PACKAGES = "plotly and kaleido"
_WIDTH = 860
POINTS = ["share removed", "refused", "harmful log-odds", "harmless refused", "KL (nats)"]


def require_plotly() -> None:
    """Fail before any work is done if the picture cannot be drawn.

    Raises:
        UsageError: plotly is missing.
    """
    otherwise = ", or pass --no-picture"
    import_extra("plotly.graph_objects", "the picture", _PACKAGES, "report", otherwise)


def claim_pictures(folder: Path, images: Sequence[str]) -> None:
    """Refuse a folder in which :func:`draw` would replace something else.

    Raises:
        InputError: one of its names is taken by a link or by a foreign file.
    """
    pictures: dict[str, Kind] = {f"fragility.{kind}": is_picture for kind in images}
    claim(folder, {"fragility.html": is_page} | pictures)


def draw(record: Mapping[str, Any], folder: Path, images: Sequence[str] = ()) -> list[Path]:
    """Write ``fragility.html``, which needs no network, and images on request.

    Args:
        record: the document ``fragility.json``.
        folder: where to.
        images: ``png`` and ``svg``, drawn by kaleido in a Chrome.

    Raises:
        UsageError: plotly or kaleido is missing, or there is no Chrome.
    """
    made = _figure(record)
    written = [folder / "fragility.html"]
    write_atomically(written[0], _page(record, made).encode())
    for kind in images:
        try:
            content = made.to_image(format=kind, width=_WIDTH, scale=2)
        except Exception as error:  # kaleido raises many kinds; all mean that no image can be had
            short = one_line(error)[:160]
            needs = missing_extra(f"--image {kind}", _PACKAGES, "report")
            raise UsageError(f"{needs}, and a Chrome or Chromium ({short})") from None
        written.append(folder / f"fragility.{kind}")
        write_atomically(written[-1], mark_picture(content))
    return written


def _page(record: Mapping[str, Any], made: Any) -> str:
    counts = ", ".join(f"{count} {kind}" for kind, count in record["n_prompts"].items())
    shown = PageFigure(
        "fragility",
        made,
        "Above the share of answers that refuse, with 95% intervals, and the mean refusal score on "
        "harmful prompts (log-odds, right axis); below the KL divergence on harmless prompts "
        "(nats).",
        wide=True,
    )
    return figure_page(
        str(record["model"]["id"]),
        "Fragility of refusal",
        [f"{_said(record)}."],
        [shown],
        [PageTable("By step", POINTS, point_rows(record), 0)],
        f"On {counts} prompts. Shaded: between these two steps half of the refusals are "
        "gone. Brackets: 95% intervals; ±: standard error.",
    )


def _said(record: Mapping[str, Any]) -> str:
    number, half = record["fragility"], record["half_fraction"]
    if number is None:
        return "Nothing is refused"
    if half is None:
        return f"Fragility {number:z.2f}; half of the refusals are gone at no step"
    return (
        f"Fragility {number:z.2f}; half of the refusals are gone between "
        f"{record['half_after']:z.2f} and {half:z.2f} of the direction removed"
    )


def _figure(record: Mapping[str, Any]) -> Any:
    """Above refusal rates and score, below KL, over the share removed."""
    points = record["points"]
    fractions = [point["fraction"] for point in points]
    made = figure(f"{plain(record['model']['id'])}: {_said(record)}", "", "", 600)

    def line(key: str, name: str, colour: str, dash: str = "solid", **axes: str) -> None:
        values = [finite(point[key]) for point in points]
        spans = [point.get(f"{key}_ci") for point in points]
        made.add_trace(
            plotly().Scatter(
                x=fractions,
                y=values,
                name=name,
                mode="lines+markers",
                line={"dash": dash, "color": colour},
                error_y=error_bars(values, spans),
                **axes,
            )
        )

    counts = record["n_prompts"]
    rates = [f"refused, {kind} (n={count})" for kind, count in counts.items()]
    line("refusal_rate", rates[0], HARMFUL)
    line("harmless_refusal_rate", rates[1], HARMLESS)
    line("bypass_score", "refusal score, harmful", HARMFUL, "dot", yaxis="y3")
    line("kl_divergence", "KL, harmless", HARMLESS, "dash", xaxis="x2", yaxis="y2")
    if record["half_fraction"] is not None:  # somewhere between these two steps
        made.add_shape(
            type="rect",
            xref="x",
            x0=record["half_after"],
            x1=record["half_fraction"],
            yref="paper",
            y0=0,
            y1=1,
            fillcolor="grey",
            opacity=0.18,
            line_width=0,
            layer="below",
        )
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": MUTED, "exponentformat": "none"}
    span = {"range": [-0.02, 1.02]}

    def titled(text: str) -> dict[str, Any]:
        return {"title": {"text": text, "standoff": 6}}

    made.update_layout(
        xaxis={**span, "matches": "x2", "showticklabels": False, "anchor": "y"},
        xaxis2={**axis, **span, **titled("share of the direction removed"), "anchor": "y2"},
        yaxis={**titled("refused (%)"), "range": [-0.03, 1.03], "tickformat": ".0%",
               "domain": [0.42, 1]},
        yaxis2={**axis, **titled("KL (nats)"), "domain": [0, 0.36], "anchor": "x2",
                "rangemode": "tozero"},
        yaxis3={**axis, **titled("refusal score (log-odds)"), "overlaying": "y", "side": "right",
                "anchor": "x", "showgrid": False, "tickmode": "auto"},
        margin={"t": 80, "r": 64},
    )  # fmt: skip
    return made


def point_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """What was measured at each step, in the columns ``POINTS``."""
    return [
        [
            f"{p['fraction']:z.2f}",
            _share(p, "refusal_rate") + _unfinished(p["no_verdict"]),
            _mean(p, "bypass_score", ".2f"),
            _share(p, "harmless_refusal_rate") + _unfinished(p["harmless_no_verdict"]),
            _mean(p, "kl_divergence", ".3f"),
        ]
        for p in record["points"]
    ]


def _unfinished(count: int) -> str:
    """Thoughts that have not ended, which are no answers."""
    return f" + {count} unfinished" if count else ""


def _share(point: Mapping[str, Any], key: str) -> str:
    low, high = point[f"{key}_ci"]
    return f"{point[key]:z.2f} ({low:z.2f}-{high:z.2f})"


def _mean(point: Mapping[str, Any], key: str, form: str) -> str:
    error = point[f"{key}_spread"]["standard_error"]
    return f"{point[key]:z{form}}" + ("" if error is None else f" ± {error:{form}}")
