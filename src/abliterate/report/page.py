"""The report as one HTML file: figures, tables and completions, with everything it needs inside.

Nothing leaves the page: its policy forbids every request, and only the scripts that are written
here may run (by their hashes), so that nothing out of a prompt or a model ever does. Large parts
(plotly.js, the answers) are compressed and unpacked by the browser, the answers on first use.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, PackageLoader
from markupsafe import Markup

from abliterate.errors import InputError
from abliterate.evaluation.hooks_and_edits_text import hooks_and_edits_lines
from abliterate.report import (
    edit_strip,
    facts,
    geometry_figures,
    outcome_figures,
    selection_figures,
)
from abliterate.report.collect import Completions, Run, read_completions
from abliterate.report.reproduce import commands, notes, renewals
from abliterate.report.selection_figures import METRICS, Table
from abliterate.report.style import mark_stale, plotly
from abliterate.report.verdict import verdict_sentences
from abliterate.selection.certainty import sentences
from abliterate.storage.artifacts import OTHER_THINGS, versions
from abliterate.storage.ownership import GENERATOR
from abliterate.storage.web_page import content_policy, script_json

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
    bundle = plotly("offline").get_plotlyjs()
    figures = make_figures(run)
    completions = _part("evaluation.json", lambda: read_completions(run))
    if not with_completions:
        completions = None
    page: dict[str, Any] = {
        "run": run,
        "cards": _part("selection.json", lambda: facts.cards(run)),
        "verdict": _part("evaluation.json", lambda: verdict_sentences(run)),
        "outcomes": run.evaluation
        and _part("evaluation.json", lambda: facts.outcome_table(facts.marked(run) or {})),
        "hooks_and_edits": run.evaluation
        and _part("evaluation.json", lambda: hooks_and_edits_lines(run.evaluation or {})),
        "sets": run.evaluation
        and _part("evaluation.json", lambda: facts.set_rows(run.evaluation or {})),
        "agreement": run.evaluation
        and _part("evaluation.json", lambda: facts.agreement_rows(run.evaluation or {})),
        "disagreements": run.evaluation
        and _part(
            "evaluation.json", lambda: facts.disagreement_rows(run.evaluation or {}, completions)
        ),
        "controls": run.evaluation
        and _part("evaluation.json", lambda: facts.control_rows(run.evaluation or {})),
        "candidates": run.selection
        and _part("selection.json", lambda: facts.candidate_rows(_table(run), _own_extract(run))),
        "resamples": run.selection
        and _part("selection.json", lambda: facts.resample_rows(run.selection or {})),
        "certainty": run.selection
        and _part("selection.json", lambda: sentences(run.selection or {})),
        "front": run.selection
        and _part("selection.json", lambda: facts.front_rows(run.selection or {})),
        "layers": run.inspect
        and _part("inspect.json", lambda: facts.layer_rows(run.inspect or {})),
        "heads": run.trace and _part("trace.json", lambda: facts.head_rows(run.trace or {})),
        "kinds": run.edit and _part("abliterate.json", lambda: facts.kind_rows(run.edit or {})),
        "slider": _slider(run),
        "provenance": _part("extract.json", lambda: facts.provenance(run)),
        "commands": _part("a record", lambda: commands(run, edited)),
        "renewals": _part("a record", lambda: renewals(run, edited)),
        "columns": [facts.mark_row(run, name) for name in completions.interventions]
        if completions
        else [],
        "notes": _part("a record", lambda: notes(run)),
        "versions": versions(),
        "number": facts.number,
        "figures": figures,
        "completions": completions,
        "categories": sorted({str(r["category"]) for r in completions.rows if r["category"]})
        if completions
        else [],
    }
    payload = _part("a record", lambda: _payload(run, figures, completions))
    html = _part("a record", lambda: _render(page, bundle, payload, completions))
    names = ("selection", "inspect", "trace", "evaluation", "edit")
    sections = tuple(name for name in names if getattr(run, name) is not None)
    return Report(html, figures, sections)


def _part(file: str, make: Callable[[], Any]) -> Any:
    """A part of the page; a record that does not hold what it should is named."""
    try:
        return make()
    except OTHER_THINGS as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{file} of the run folder does not hold what the report needs ({reason}): make it "
            "again with this version"
        ) from None


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
        found["refusals"] = _part("evaluation.json", lambda: outcome_figures.refusals(evaluation))
        found["categories"] = _part(
            "evaluation.json", lambda: outcome_figures.categories(evaluation)
        )
        found["borderline_categories"] = _part(
            "evaluation.json", lambda: outcome_figures.categories(evaluation, "borderline")
        )
    are_of("evaluation")
    if run.selection is not None:
        table = _part("selection.json", lambda: _table(run))
        for name, draw in (
            ("heatmap", selection_figures.heatmap),
            ("lines", selection_figures.lines),
        ):
            for metric in METRICS:
                key = f"{metric.key.partition('_')[0]}_{name}"
                found[key] = _part("selection.json", partial(draw, table, metric))
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
            found[key] = _part("inspect.json", partial(make, inspect))
    are_of("inspect")
    if run.trace is not None:
        trace = run.trace
        found["trace"] = _part("trace.json", lambda: geometry_figures.trace_curves(trace))
    are_of("trace")
    if run.edit is not None:
        edit = run.edit
        found["edit_strip"] = _part("abliterate.json", lambda: edit_strip.record_strip(edit))
        found["leaks"] = _part("abliterate.json", lambda: outcome_figures.leaks(edit))
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
    layers, start = _part("inspect.json", lambda: geometry_figures.slider_layers(run.inspect or {}))
    return {"last": len(layers) - 1, "start": layers.index(start), "layer": start}


def _payload(run: Run, figures: Figures, completions: Completions | None) -> dict[str, Any]:
    """What the page's script works on; the answers are apart, compressed."""
    payload: dict[str, Any] = {
        "figures": {name: json.loads(made.to_json()) for name, made in figures.items()}
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


def _packed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


@cache
def _packed_plotly() -> str:
    return _packed(plotly("offline").get_plotlyjs())


def _render(
    page: Mapping[str, Any],
    bundle: str,
    payload: Mapping[str, Any],
    completions: Completions | None,
) -> str:
    loader = PackageLoader("abliterate.report", "assets")
    environment = Environment(
        loader=loader, autoescape=True, undefined=ChainableUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    assert environment.loader is not None
    environment.filters["quoted"] = repr
    script, styles = (
        environment.loader.get_source(environment, name)[0] for name in ("report.js", "report.css")
    )
    rendered: str = environment.get_template("report.html.j2").render(
        page,
        policy=content_policy([script, bundle]),
        generator=Markup(GENERATOR),
        script=Markup(script),
        styles=Markup(styles),
        data=Markup(script_json(payload)),
        plotly=_packed_plotly(),
        answers=_packed(json.dumps(_answers(completions))) if completions else None,
    )
    return rendered
