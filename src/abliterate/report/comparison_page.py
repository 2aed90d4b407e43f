"""The page that compares several runs: its figures, and what its template reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from abliterate.report.comparison import ComparedRun, label, summary_rows
from abliterate.report.facts import DASH, tokens_of
from abliterate.report.page import Report
from abliterate.report.rendering import part, render
from abliterate.report.selection_figures import METRICS, Table, heatmap, values_of
from abliterate.report.style import (
    HARMFUL,
    HARMLESS,
    colour_bar,
    coloured,
    dark_scales,
    error_bars,
    figure,
    mark_stale,
    plain,
    plotly,
)
from abliterate.storage.artifacts import versions


def build_comparison(runs: Sequence[ComparedRun], document: Mapping[str, Any]) -> Report:
    """Make the page.

    Args:
        runs: the runs.
        document: of :func:`~abliterate.report.comparison.compare`.

    Raises:
        InputError: a record lacks what its part of the page needs.
        UsageError: plotly is missing.
    """
    figures = _figures(runs, document)
    page = {
        "runs": document["runs"],
        "labels": [label(at) for at in range(len(runs))],
        "summary": summary_rows(document),
        "differences": [
            [str(row["setting"]), *(DASH if value is None else value for value in row["values"])]
            for row in document["differences"]
        ],
        "unlike": [
            f"{label(at)} and {label(later)}"
            for at, row in enumerate(document["cosines"])
            for later, cosine in enumerate(row)
            if later > at and cosine is None and _both_chose(document["runs"], at, later)
        ],
        "one_model": len({_identity(run) for run in document["runs"]}) == 1,
        "metrics": [(metric, metric.key.partition("_")[0]) for metric in METRICS],
        "figures": figures,
        "versions": versions(),
    }
    payload = {
        "figures": {name: json.loads(made.to_json()) for name, made in figures.items()},
        "scales": dark_scales(),
    }
    html = render("comparison.html.j2", page, payload)
    return Report(html, figures, ("summary", "cosines", "selection", "settings"))


def _identity(run: Mapping[str, Any]) -> Any:
    return run["model_files"] or (run["model"], run["revision"])


def _both_chose(runs: Sequence[Mapping[str, Any]], *places: int) -> bool:
    return all(runs[at]["direction"] is not None for at in places)


def _figures(runs: Sequence[ComparedRun], document: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if (drawn := _refusals(document["runs"])) is not None:
        found["refusals"] = drawn
    if sum(run["direction"] is not None for run in document["runs"]) > 1:
        found["cosines"] = _cosines(document)
    tables = [part(f"a record of {each.run.folder}", partial(_table, each)) for each in runs]
    for metric in METRICS:
        known = [value for table in tables for value in values_of(table, metric)]
        for at, (each, table) in enumerate(zip(runs, tables, strict=True)):
            made = part(
                f"selection.json of {each.run.folder}",
                partial(heatmap, table, metric, known),
            )
            made.update_layout(
                title={"text": f"{label(at)}, {plain(each.name)}: {made.layout.title.text}"}
            )
            if "selection" in each.run.stale:
                mark_stale(made)
            found[f"{metric.key.partition('_')[0]}_heatmap_{at + 1}"] = made
    return found


def _table(each: ComparedRun) -> Table:
    return Table(each.selection, tokens_of(each.run))


def _refusals(runs: Sequence[Mapping[str, Any]]) -> Any | None:
    """Refusal rates before and after by run, with their intervals; None if nothing answered."""
    bars = (
        ("harmful", "before", "harmful, unmodified", HARMFUL, ""),
        ("harmful", "after", "harmful, ablated", HARMFUL, "/"),
        ("harmless", "before", "harmless, unmodified", HARMLESS, ""),
        ("harmless", "after", "harmless, added", HARMLESS, "/"),
    )
    made = figure("Refusals by run", "", "prompts refused (%)", 360)
    names = [label(at) for at in range(len(runs))]
    for kind, when, name, colour, shape in bars:
        held = [(run["evaluate"] or {}).get(kind, {}).get(when) for run in runs]
        if not any(held):
            continue
        rates = [one and one["rate"] for one in held]
        made.add_trace(
            plotly().Bar(
                x=names,
                y=rates,
                name=name,
                marker={"color": colour, "pattern": {"shape": shape}},
                error_y=error_bars(rates, [one and one["ci"] for one in held]),
                customdata=[one["text"] if one else "not measured" for one in held],
                hovertemplate="%{x}<br>%{y:.1%} refused (%{customdata})<extra>" + name + "</extra>",
            )
        )
    if not made.data:
        return None
    made.update_layout(barmode="group", bargap=0.3)
    made.update_yaxes(range=[0, 1.04], tickformat=".0%")
    made.update_xaxes(type="category")
    return made


def _cosines(document: Mapping[str, Any]) -> Any:
    """The cosine of each two directions; empty where d_model differs or one run has none."""
    values = document["cosines"]
    names = [label(at) for at in range(len(values))]
    made = figure("Cosines of the selected directions", "", "", 170 + 34 * len(names))
    made.add_trace(
        plotly().Heatmap(
            z=values,
            x=names,
            y=names,
            **coloured("diverging"),
            zmin=-1,
            zmax=1,
            xgap=1,
            ygap=1,
            texttemplate="%{z:.3f}",
            hovertemplate="%{y}, %{x}<br>cosine %{z:.4f}<extra></extra>",
            colorbar=colour_bar("cosine"),
        )
    )
    made.update_yaxes(autorange="reversed", showgrid=False, type="category")
    made.update_xaxes(showgrid=False, type="category")
    made.update_layout(margin={"t": 50})
    return made
