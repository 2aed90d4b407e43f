"""Figures of select: heatmaps over layer and position, and the paper's line plots (appendix C)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.report.collect import Document
from abliterate.report.style import (
    COLOURS,
    GOLD,
    LEGEND_BELOW,
    MUTED,
    across,
    colour_bar,
    coloured,
    figure,
    finite,
    label,
    layer_axis,
    plotly,
    upright,
)
from abliterate.selection.candidate_filters import Thresholds, first_pruned_layer

_REASONS = {
    "kl": ("x", "KL above {kl:g}"),
    "induce": ("cross", "induce below {induce:g}"),
    "nan": ("circle", "not finite"),
    "bypass": ("triangle-up", "a lower bypass wins, its KL was not needed"),
    "unknown": ("diamond", "not known"),
}


@dataclass(frozen=True)
class Metric:
    """A score of the candidates: its key, its name, what it says, whether 0 is its middle, unit."""

    key: str
    name: str
    axis: str
    diverging: bool
    unit: str


METRICS = (
    Metric("bypass_score", "Bypass", "refusal score, harmful, ablated", True, "log-odds"),
    Metric("induce_score", "Induce", "refusal score, harmless, added", True, "log-odds"),
    Metric("kl_divergence", "KL", "KL divergence, harmless, ablated", False, "nats"),
)


class Table:
    """The candidates of ``selection.json`` as a grid."""

    def __init__(self, selection: Document, tokens: Mapping[int, str]) -> None:
        self.candidates: Sequence[Document] = selection["candidates"]
        self.n_layers: int = selection["n_layers"]
        self.winner: Document | None = selection["winner"]
        self.baselines: Document = selection["baselines"]
        self.thresholds = Thresholds(**selection["thresholds"])
        self.pruned = first_pruned_layer(self.n_layers, self.thresholds)
        self.positions = sorted({int(c["position"]) for c in self.candidates})
        self.labels = [f"{p}  {label(tokens.get(p, ''))}".rstrip() for p in self.positions]
        self._at = {(c["position"], c["layer"]): c for c in self.candidates}

    def at(self, position: int, layer: int) -> Document | None:
        """The candidate of a cell."""
        return self._at.get((position, layer))

    def grid(self, of: Callable[[Document | None], Any]) -> list[list[Any]]:
        """Something of every cell, positions x layers."""
        return [[of(self.at(p, layer)) for layer in range(self.n_layers)] for p in self.positions]

    def threshold(self, metric: Metric) -> float | None:
        """The filter on a metric, if it has one."""
        return {"induce_score": self.thresholds.induce, "kl_divergence": self.thresholds.kl}.get(
            metric.key
        )


def verdict(candidate: Document | None, thresholds: Thresholds) -> str:
    """Why a candidate was kept or dropped, in words."""
    if candidate is None:
        return "no candidate"
    if candidate["kept"]:
        return "passes the filters"
    reason = candidate["reason"]
    if reason == "layer":
        return f"dropped: in the last {thresholds.prune_layers:.0%} of layers"
    words = _REASONS.get(reason, ("", str(reason)))[1]
    return "dropped: " + words.format(kl=thresholds.kl, induce=thresholds.induce)


def values_of(table: Table, metric: Metric) -> list[float]:
    """The values of a metric that are known, in no order that says anything."""
    found = (finite(c[metric.key]) for c in table.candidates)
    return [value for value in found if value is not None]


def heatmap(table: Table, metric: Metric, beside: Sequence[float] = ()) -> Any:
    """A metric over layer and position, the filters drawn and the winner marked.

    Args:
        table: the candidates.
        metric: what the colours show.
        beside: values of this and other tables that the colours are to tell apart.
    """
    objects = plotly()
    rows = len(table.positions)
    made = figure(f"{metric.name}: {metric.axis}", "layer", "position", 250 + max(30 * rows, 110))
    values = table.grid(lambda c: None if c is None else finite(c[metric.key]))
    known = beside or values_of(table, metric)
    scale = coloured("diverging" if metric.diverging else "amount")
    if metric.diverging:
        reach = max(map(abs, known), default=1.0) or 1.0
        scale |= {"zmin": -reach, "zmax": reach}
    elif known:
        # Most of a KL map lies far below its largest values.
        ranked = sorted(known)
        scale |= {"zmin": 0.0, "zmax": max(ranked[int(0.8 * (len(ranked) - 1))], 1e-9)}
    made.add_trace(
        objects.Heatmap(
            z=values,
            x=list(range(table.n_layers)),
            y=list(range(rows)),
            customdata=table.grid(lambda c: _hover(c, metric, table)),
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=True,
            xgap=1,
            ygap=1,
            colorbar=colour_bar(metric.unit),
            **scale,
        )
    )
    # What is left out has a look of its own.
    absent = table.grid(
        lambda c: 0 if c and c["layer"] < table.pruned and _is_absent(c, metric) else None
    )
    if any(cell is not None for row in absent for cell in row):
        made.add_trace(
            objects.Heatmap(
                z=absent,
                x=list(range(table.n_layers)),
                y=list(range(rows)),
                name="not computed",
                showlegend=True,
                showscale=False,
                hoverinfo="skip",
                xgap=1,
                ygap=1,
                **coloured("absent"),
            )
        )
    made.update_yaxes(
        tickvals=list(range(rows)), ticktext=table.labels, showgrid=False, range=[-0.5, rows - 0.5]
    )
    layer_axis(made, table.n_layers)
    _draw_pruned(made, table)
    _draw_verdicts(made, table)
    made.update_layout(legend=LEGEND_BELOW, margin={"b": 130})
    return made


def _is_absent(candidate: Document, metric: Metric) -> bool:
    """Whether a candidate's value was not computed; one that was may still not be finite."""
    value = finite(candidate[metric.key])
    return value is None and metric.key not in candidate.get("computed", ())


def _hover(candidate: Document | None, metric: Metric, table: Table) -> str:
    if candidate is None:
        return "no candidate"
    value = finite(candidate[metric.key])
    if value is not None:
        text = f"{metric.name} {value:.4g} {metric.unit}"
    elif not _is_absent(candidate, metric):
        text = f"{metric.name}: not finite"
    else:
        text = f"{metric.name}: not computed, the choice did not need it"
    place = f"layer {candidate['layer']}, position {candidate['position']}"
    return f"{place}<br><b>{text}</b><br>{verdict(candidate, table.thresholds)}"


def _draw_pruned(made: Any, table: Table, named: bool = True) -> None:
    if table.pruned >= table.n_layers:
        return
    begin = table.pruned - 0.5
    upright(
        made,
        begin,
        table.n_layers - 0.5,
        fillcolor=MUTED,
        opacity=0.28,
        line_width=0,
        layer="above",
        showlegend=named,
        name=f"left out: the last {table.thresholds.prune_layers:.0%} of layers",
    )
    upright(made, begin, begin, line={"color": MUTED, "width": 1.5, "dash": "dash"})


def _draw_verdicts(made: Any, table: Table) -> None:
    """A mark on every cell that a filter other than its layer drops, and a star on the winner."""
    objects = plotly()
    row_of = {position: row for row, position in enumerate(table.positions)}

    def marks(chosen: Sequence[Document], symbol: str, name: str, **marker: Any) -> None:
        made.add_trace(
            objects.Scatter(
                x=[c["layer"] for c in chosen],
                y=[row_of[c["position"]] for c in chosen],
                mode="markers",
                marker={"symbol": symbol, **marker},
                name=name,
                hoverinfo="skip",
            )
        )

    limits = {"kl": table.thresholds.kl, "induce": table.thresholds.induce}
    for reason, (symbol, words) in _REASONS.items():
        dropped = [c for c in table.candidates if c["reason"] == reason]
        if dropped:
            # White with a dark rim: seen on every colour of the maps, and on both grounds.
            line = {"width": 1, "color": "#333b47"}
            name = "dropped: " + words.format(**limits)
            marks(dropped, symbol, name, size=8, line=line, color="#ffffff")
    if table.winner is not None:
        line = {"width": 1.2, "color": "#222222"}
        marks([table.winner], "star", "selected", size=16, color=GOLD, line=line)


def lines(table: Table, metric: Metric) -> Any:
    """A metric by layer, a line for each position, as in the paper's appendix."""
    objects = plotly()
    made = figure(
        f"{metric.name} by layer", "layer", f"{metric.axis.partition(',')[0]} ({metric.unit})", 340
    )
    for row, position in enumerate(table.positions):
        cells = [table.at(position, layer) for layer in range(table.n_layers)]
        made.add_trace(
            objects.Scatter(
                x=list(range(table.n_layers)),
                y=[None if c is None else finite(c[metric.key]) for c in cells],
                mode="lines+markers",
                marker={"size": 5},
                line={"width": 1.8, "color": COLOURS[row % len(COLOURS)]},
                name=str(position),
                customdata=[_hover(c, metric, table) for c in cells],
                hovertemplate="%{customdata}<extra></extra>",
            )
        )
    baseline = {
        "bypass_score": ("harmful, unmodified", "harmful_refusal_score"),
        "induce_score": ("harmless, unmodified", "harmless_refusal_score"),
    }.get(metric.key)
    value = finite(table.baselines[baseline[1]]) if baseline else None
    if baseline and value is not None:
        _rule(made, value, baseline[0], "dot")
    threshold = table.threshold(metric)
    if threshold is not None:
        _rule(made, threshold, f"filter: {threshold:g}", "dash")
    layer_axis(made, table.n_layers)
    _draw_pruned(made, table, named=False)
    _draw_winner(made, table, metric)
    if metric.key == "kl_divergence":
        made.update_yaxes(type="log", exponentformat="power")
    return made


def _rule(made: Any, y: float, text: str, dash: str) -> None:
    across(made, y, line={"color": MUTED, "width": 1.3, "dash": dash})
    made.add_annotation(
        text=text,
        font={"size": 10},
        xref="x domain",
        x=0.01,
        xanchor="left",
        yref="y",
        y=y,
        yanchor="bottom",
        showarrow=False,
    )


def _draw_winner(made: Any, table: Table, metric: Metric) -> None:
    if table.winner is None:
        return
    won = table.at(table.winner["position"], table.winner["layer"])
    value = None if won is None else finite(won[metric.key])
    if value is None:
        return
    made.add_trace(
        plotly().Scatter(
            x=[table.winner["layer"]],
            y=[value],
            mode="markers",
            marker={
                "symbol": "star",
                "size": 15,
                "color": GOLD,
                "line": {"width": 1.2, "color": "#222222"},
            },
            name="selected",
            hoverinfo="skip",
        )
    )
