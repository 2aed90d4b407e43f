"""The report as one HTML file: figures, tables and completions, with everything it needs inside.

Nothing leaves the page: its policy forbids every request, and only the scripts that are written
here may run (by their hashes), so that nothing out of a prompt or a model ever does. Large parts
(plotly.js, the answers) are compressed and unpacked by the browser, the answers on first use.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from abliterate.evaluation.hooks_and_edits_text import hooks_and_edits_lines
from abliterate.report import (
    edit_strip,
    facts,
    geometry_figures,
    outcome_figures,
    outcome_tables,
    record_tables,
    selection_figures,
)
from abliterate.report.cards import cards
from abliterate.report.collect import Completions, Run, read_completions
from abliterate.report.provenance import provenance
from abliterate.report.rendering import packed, part, render
from abliterate.report.reproduce import commands, notes, renewals
from abliterate.report.selection_figures import METRICS, Table
from abliterate.report.style import dark_scales, mark_stale
from abliterate.report.verdict import verdict_sentences
from abliterate.selection.certainty import sentences
from abliterate.storage.artifacts import versions

Figures = dict[str, Any]
# What the page's script knows of an answer, in this order.
_VERDICT = ("refused", "safe", "broken", "refused_at", "labelled")


@dataclass(frozen=True)
class Report:
    """A page, and the figures in it by name."""

    html: str
    figures: Figures
    sections: tuple[str, ...]


def build_report(run: Run, with_completions: bool = True, edited: Path | None = None) -> Report:
    """Make the page.

    Args:
        run: the records of a run folder.
        with_completions: put prompts and answers in; without, no text of either is in the file.
        edited: where the edited checkpoint lies, if it is no part of the run folder.

    Raises:
        InputError: a record lacks what its section needs.
        UsageError: plotly is missing.
    """
    figures = make_figures(run)
    completions = part("evaluation.json", lambda: read_completions(run))
    if not with_completions:
        completions = None
    page: dict[str, Any] = {
        "run": run,
        "cards": part("selection.json", lambda: cards(run)),
        "verdict": part("evaluation.json", lambda: verdict_sentences(run)),
        **_tables(run, completions),
        "slider": _slider(run),
        "provenance": part("extract.json", lambda: provenance(run)),
        "commands": part("a record", lambda: commands(run, edited)),
        "renewals": part("a record", lambda: renewals(run, edited)),
        "columns": [facts.mark_row(run, name) for name in completions.interventions]
        if completions
        else [],
        "notes": part("a record", lambda: notes(run)),
        "versions": versions(),
        "number": facts.number,
        "figures": figures,
        "completions": completions,
        "categories": sorted({str(r["category"]) for r in completions.rows if r["category"]})
        if completions
        else [],
    }
    payload = part("a record", lambda: _payload(run, figures, completions))
    answers = None if completions is None else packed(json.dumps(_answers(completions)))
    html = part("a record", lambda: render("report.html.j2", page, payload, answers))
    names = ("selection", "inspect", "trace", "evaluation", "edit")
    sections = tuple(name for name in names if getattr(run, name) is not None)
    return Report(html, figures, sections)


def _tables(run: Run, completions: Completions | None) -> dict[str, Any]:
    """The page's tables by name, each None where its stage has not run."""
    found: dict[str, Any] = {}

    def add(record: Any, file: str, **tables: Callable[[Any], Any]) -> None:
        for name, make in tables.items():
            found[name] = None if record is None else part(file, partial(make, record))

    add(
        run.evaluation,
        "evaluation.json",
        outcomes=lambda _: outcome_tables.outcome_table(facts.marked(run) or {}),
        hooks_and_edits=lambda record: hooks_and_edits_lines(record, run.stale_rows),
        sets=outcome_tables.set_rows,
        agreement=outcome_tables.agreement_rows,
        disagreements=lambda record: outcome_tables.disagreement_rows(record, completions),
        controls=outcome_tables.control_rows,
    )
    add(
        run.selection,
        "selection.json",
        candidates=lambda _: record_tables.candidate_rows(_table(run), _own_extract(run)),
        resamples=record_tables.resample_rows,
        certainty=sentences,
        front=record_tables.front_rows,
    )
    add(run.inspect, "inspect.json", layers=record_tables.layer_rows)
    add(run.trace, "trace.json", heads=record_tables.head_rows)
    add(run.edit, "abliterate.json", kinds=record_tables.kind_rows)
    return found


def _own_extract(run: Run) -> Mapping[str, Any] | None:
    """The extraction whose candidates were scored, if it is the one that is there."""
    return None if "selection" in run.stale else run.extract


def _table(run: Run) -> Table:
    assert run.selection is not None
    return Table(run.selection, facts.tokens_of(run))


def make_figures(run: Run) -> Figures:
    """Every figure that the records allow, by name, in the order of the page."""
    found: Figures = {}
    drawn_of: dict[str, str] = {}

    def are_of(part: str) -> None:
        """The figures that are new are this part's."""
        drawn_of.update({name: part for name in found if name not in drawn_of})

    if (evaluation := facts.marked(run)) is not None:
        found["refusals"] = part("evaluation.json", lambda: outcome_figures.refusals(evaluation))
        found["categories"] = part(
            "evaluation.json", lambda: outcome_figures.categories(evaluation)
        )
        found["borderline_categories"] = part(
            "evaluation.json", lambda: outcome_figures.categories(evaluation, "borderline")
        )
    are_of("evaluation")
    if run.selection is not None:
        table = part("selection.json", lambda: _table(run))
        for name, draw in (
            ("heatmap", selection_figures.heatmap),
            ("lines", selection_figures.lines),
        ):
            for metric in METRICS:
                key = f"{metric.key.partition('_')[0]}_{name}"
                found[key] = part("selection.json", partial(draw, table, metric))
    are_of("selection")
    if run.inspect is not None:
        inspect = run.inspect
        drawn: dict[str, Callable[[Any], Any]] = {"cosines": geometry_figures.cosines}
        drawn["norms"] = geometry_figures.norms
        if inspect.get("projections"):
            drawn |= {
                "pca_panels": geometry_figures.pca_panels,
                "pca_layer": geometry_figures.pca_layer,
                "pca_curve": geometry_figures.pca_curve,
            }
        for key, make in drawn.items():
            found[key] = part("inspect.json", partial(make, inspect))
    are_of("inspect")
    if run.trace is not None:
        trace = run.trace
        found["trace"] = part("trace.json", lambda: geometry_figures.trace_curves(trace))
    are_of("trace")
    if run.edit is not None:
        edit = run.edit
        found["edit_strip"] = part("abliterate.json", lambda: edit_strip.record_strip(edit))
        found["leaks"] = part("abliterate.json", lambda: outcome_figures.leaks(edit))
    are_of("edit")
    kept = {name: made for name, made in found.items() if made is not None}
    for name, made in kept.items():
        held = run.stale.get(drawn_of[name])
        if held is not None and not held.rows:
            mark_stale(made)
    return kept


def _slider(run: Run) -> dict[str, Any] | None:
    if run.inspect is None or not run.inspect.get("projections"):
        return None
    layers, start = part("inspect.json", lambda: geometry_figures.slider_layers(run.inspect or {}))
    return {"last": len(layers) - 1, "start": layers.index(start), "layer": start}


def _payload(run: Run, figures: Figures, completions: Completions | None) -> dict[str, Any]:
    """What the page's script works on; the answers are apart, compressed."""
    payload: dict[str, Any] = {
        "figures": {name: json.loads(made.to_json()) for name, made in figures.items()},
        "scales": dark_scales(),
    }
    if run.inspect is not None and run.inspect.get("projections"):
        payload["projections"] = run.inspect["projections"]
        payload["geometry"] = {row["layer"]: row["geometry"] for row in run.inspect["layers"]}
    if completions is not None:
        payload["interventions"] = [facts.mark_row(run, n) for n in completions.interventions]
        payload["label"] = ((run.evaluation or {}).get("classifier") or {}).get("label")
        payload["rows"] = [
            {
                "prompt": row["prompt"],
                "category": row["category"],
                "kind": row["kind"],
                "verdicts": [
                    None if answer is None else [answer[key] for key in _VERDICT]
                    for answer in row["answers"]
                ],
            }
            for row in completions.rows
        ]
    return payload


def _answers(completions: Completions) -> list[list[Any]]:
    """Each answer's text, or its thought and its answer where it has the two."""

    def text(answer: Mapping[str, Any] | None) -> Any:
        if answer is None:
            return None
        told = answer["told"]
        return answer["response"] if told is None else [told.thought, told.answer]

    return [[text(answer) for answer in row["answers"]] for row in completions.rows]
