"""What the report's tables and cards share: numbers and names as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from abliterate.projection import Projection
from abliterate.report.collect import Document, Run
from abliterate.report.style import finite
from abliterate.table_layout import number_text

DASH = "\u2013"
# What is put behind the name of whatever is stale.
STALE = "stale"


def number(value: Any, form: str = ".3g") -> str:
    """A number as text, an en dash where there is none."""
    known = finite(value)
    return DASH if known is None else number_text(known, form)


def percent(value: Any, span: Sequence[float] | None = None) -> str:
    """A share as a percentage, with its interval."""
    known = finite(value)
    if known is None:
        return DASH
    text = f"{known:z.1%}"
    return text if not span else f"{text} [{span[0]:z.1%}, {span[1]:z.1%}]"


def marked(run: Run) -> Document | None:
    """The evaluation, with a mark on the names of the rows that alone are stale."""
    if run.evaluation is None or not run.stale_rows:
        return run.evaluation
    changed = {}
    for key in ("interventions", "deltas"):
        held = run.evaluation.get(key) or {}
        changed[key] = {mark_row(run, name): value for name, value in held.items()}
    return {**run.evaluation, **changed}


def mark_row(run: Run, name: str) -> str:
    """The name of an evaluation's row as it is shown."""
    return f"{name} ({STALE})" if name in run.stale_rows else name


def tokens_of(run: Run) -> dict[int, str]:
    """The template's token at each position; of a stale selection's candidates nothing is known."""
    held = run.extract["positions"] if run.extract and "selection" not in run.stale else []
    return {int(entry["position"]): str(entry["token"]) for entry in held}


def apart(count: Document) -> str:
    """Prompts whose thought did not end, which are left out."""
    return f", {count['unfinished']} unfinished thoughts" if count.get("unfinished") else ""


def counted(part: Document) -> str:
    """Refusals of answers; thoughts that have not ended are no answers and stand apart."""
    return f"{part['refused']}/{answers(part)}"


def answers(part: Document) -> str:
    """Of how many answers a share is, and how many thoughts have not ended beside them."""
    unfinished = part.get("no_verdict") or 0
    return f"{part['n'] - unfinished}" + (f" + {unfinished} unfinished" if unfinished else "")


def prompt_count(evaluation: Document, kind: str) -> str:
    """How many test prompts there are, as a text to put before them; records of old lack it."""
    count = (evaluation.get("n_prompts") or {}).get(kind)
    return "" if count is None else f"{count} "


def selected_without(selection: Document) -> Projection:
    """What the candidates of a selection were without."""
    return Projection.recorded((selection.get("settings") or {}).get("select") or {})
