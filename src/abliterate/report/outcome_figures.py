"""Figures of evaluate and of the edit: refusals by intervention and category, leak by tensor."""

from __future__ import annotations

from typing import Any

from abliterate.report.collect import Document, kinds_of
from abliterate.report.facts import counted
from abliterate.report.style import (
    COLOURS,
    HARMFUL,
    HARMLESS,
    colour_bar,
    coloured,
    error_bars,
    figure,
    finite,
    plain,
    plotly,
    shortened,
)

_COLOURS = {"harmful": HARMFUL, "harmless": HARMLESS, "borderline": COLOURS[4]}


def refusals(evaluation: Document) -> Any | None:
    """Refusal rates by intervention, harmful and harmless, with their 95% intervals.

    None if no answers were generated (a streamed model).
    """
    kinds = kinds_of(evaluation)
    if all(r[kind]["n"] == 0 for r in evaluation["interventions"].values() for kind in kinds):
        return None
    made = figure("Refusal rate by intervention", "", "prompts refused (%)", 360)
    results: Document = evaluation["interventions"]
    for kind in kinds:
        rates = [finite(result[kind]["refusal_rate"]) for result in results.values()]
        spans = [result[kind].get("refusal_score_ci") for result in results.values()]
        made.add_trace(
            plotly().Bar(
                x=[plain(name) for name in results],
                y=rates,
                name=f"{kind} prompts",
                marker={"color": _COLOURS[kind]},
                error_y=error_bars(rates, spans),
                customdata=[
                    counted(result[kind]) if result[kind]["n"] else "no answers"
                    for result in results.values()
                ],
                hovertemplate="%{x}<br>%{y:.1%} refused (%{customdata})<extra>" + kind + "</extra>",
            )
        )
    made.update_layout(barmode="group", bargap=0.3)
    made.update_yaxes(range=[0, 1.04], tickformat=".0%")
    made.update_xaxes(type="category", **_named(results))
    return made


def _named(results: Document) -> dict[str, list[str]]:
    """The ticks of interventions, which checkpoints may give long names."""
    return {
        "tickvals": [plain(name) for name in results],
        "ticktext": [shortened(name, 18) for name in results],
    }


def categories(evaluation: Document, kind: str = "harmful") -> Any | None:
    """Refusal rates of one kind of prompt by category and intervention; None without categories."""
    if kind not in kinds_of(evaluation):
        return None
    results: Document = evaluation["interventions"]
    names = list(
        dict.fromkeys(
            c for result in results.values() for c in result[kind].get("categories") or {}
        )
    )
    if not names:
        return None
    made = figure(f"Refusal rate by category, {kind} prompts", "", "", 130 + 26 * len(names))
    cells = [
        [result[kind]["categories"].get(name) for result in results.values()] for name in names
    ]
    made.add_trace(
        plotly().Heatmap(
            z=[
                [None if cell is None else finite(cell["refusal_rate"]) for cell in row]
                for row in cells
            ],
            x=[plain(name) for name in results],
            y=[plain(name) for name in names],
            customdata=[
                ["no prompts" if cell is None else counted(cell) for cell in row] for row in cells
            ],
            **coloured("share"),
            zmin=0,
            zmax=1,
            xgap=1,
            ygap=1,
            hovertemplate="%{y}, %{x}<br>%{z:.1%} refused (%{customdata})<extra></extra>",
            colorbar=colour_bar("refused (%)", tickformat=".0%"),
        )
    )
    made.update_yaxes(
        autorange="reversed", showgrid=False, type="category",
        tickvals=[plain(name) for name in names], ticktext=[shortened(name) for name in names],
    )  # fmt: skip
    made.update_xaxes(showgrid=False, type="category", side="top", **_named(results))
    made.update_layout(margin={"t": 70})
    return made


def leaks(edit: Document) -> Any:
    """Share of every edited tensor along the direction, before and after the edit."""
    tensors = edit["tensors"]
    made = figure("Share along the direction", "", "share of |W|", 360)
    for key, colour, symbol in (("before", COLOURS[1], "circle"), ("after", COLOURS[2], "diamond")):
        made.add_trace(
            plotly().Scatter(
                x=list(range(len(tensors))),
                # An exact zero has no place on a logarithmic axis.
                y=[finite(tensor[key]) or None for tensor in tensors],
                mode="markers",
                marker={"size": 7, "color": colour, "symbol": symbol},
                name=key,
                customdata=[plain(tensor["name"]) for tensor in tensors],
                hovertemplate="%{customdata}<br>" + key + " %{y:.2e}<extra></extra>",
            )
        )
    made.update_yaxes(type="log", dtick=1, exponentformat="power")
    made.update_xaxes(showticklabels=False, title={"text": "edited tensors, in file order"})
    return made
