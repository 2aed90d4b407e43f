"""The report's tables of an evaluation: outcomes, test sets, agreement, controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abliterate.metrics.agreement import kappa_text
from abliterate.metrics.spread import place_text
from abliterate.prompts.sampling import prompt_key
from abliterate.report.collect import Completions, Document, kinds_of
from abliterate.report.facts import DASH, answers, counted, number, percent, prompt_count
from abliterate.report.style import finite
from abliterate.report.verdict import points

CONTROLS = {
    "covariance": "random, covariance of the activations",
    "isotropic": "random, isotropic",
    "layers": "candidates of other layers",
}


def outcome_table(evaluation: Document) -> dict[str, Any]:
    """Rows are interventions, columns the metrics; columns that nobody measured are left out."""
    results: Document = evaluation["interventions"]
    baseline = results.get("baseline")
    kinds = kinds_of(evaluation)
    held = list(results.values())
    changes: Document = evaluation.get("deltas") or {}

    def change(result: Document, kind: str) -> Document:
        name = next(name for name, other in results.items() if other is result)
        return (changes.get(name) or {}).get(kind) or {}

    columns: list[tuple[str, Any]] = [
        (
            f"{prompt_count(evaluation, kind)}{kind} refused",
            lambda r, k=kind: _rate(r[k], baseline and baseline[k], change(r, k)),
        )
        for kind in kinds
    ]
    for key, title in (("refused_later", "refused later"), ("broken", "broken")):
        if any(key in r[kind] for r in held for kind in kinds):
            columns.append((title, lambda r, k=key: _counts(r, kinds, k)))
    columns += [
        (f"{kind} judged safe", lambda r, k=kind: _safety(r[k]))
        for kind in kinds
        if any(finite(r[kind].get("safety_score")) is not None for r in held)
    ]
    columns += [
        (f"{kind} judged safe by the second judge", lambda r, k=kind: _safety(r[k], "second_"))
        for kind in kinds
        if any(finite(r[kind].get("second_safety_score")) is not None for r in held)
    ]
    label = (evaluation.get("classifier") or {}).get("label")
    columns += [
        (f"{kind} {label}", lambda r, k=kind: _labelled(r[k]))
        for kind in kinds
        if any(finite(r[kind].get("classifier_rate")) is not None for r in held)
    ]
    columns += [
        (
            f"{prompt_count(evaluation, kind)}{kind} log-odds",
            lambda r, k=kind: _mean(r[k], "refusal_metric", "+.2f"),
        )
        for kind in kinds
        if any("refusal_metric" in r[kind] for r in held)
    ]
    columns.append(
        (
            f"{prompt_count(evaluation, 'harmless')}harmless KL (nats)",
            lambda r: _mean(r, "kl_divergence", ".4f"),
        )
    )
    if any(finite(r.get("kl_exact")) is not None for r in held):
        columns.append(("exact KL (nats)", lambda r: number(r.get("kl_exact"), ".4f")))
    corpora = dict.fromkeys(name for r in held for name in r.get("losses") or {})
    columns += [
        (f"loss (nats per token), {name}", lambda r, c=name: _loss(r, c)) for name in corpora
    ]
    tasks = dict.fromkeys(name for r in held for name in r.get("tasks") or {})
    columns += [(name, lambda r, t=name: _task(r, t)) for name in tasks]
    return {
        "columns": [name for name, _ in columns],
        "rows": [
            {"name": name, "cells": [cell(result) for _, cell in columns]}
            for name, result in results.items()
        ],
    }


def control_rows(evaluation: Document) -> list[list[str]]:
    """What other directions do: the selected one, then each family, for each intervention."""
    figures = {"harmful_score": "+.2f", "harmless_score": "+.2f", "kl_divergence": ".4f"}
    rows = []
    for name, held in ((evaluation.get("controls") or {}).get("rows") or {}).items():
        selected = held["selected"]
        rows.append([name, "selected", *(number(selected[f], form) for f, form in figures.items())])
        for family, of_family in held["families"].items():
            cells = []
            for figure, form in figures.items():
                values = [number(member[figure], form) for member in of_family["members"]]
                place = place_text(of_family["place"][figure])
                cells.append(f"{', '.join(values)} (selected is {place})")
            rows.append([name, CONTROLS[family], *cells])
    return rows


def set_rows(evaluation: Document) -> list[list[str]]:
    """The figures of each test set, where a kind of prompts has several, and the pooled ones."""
    rows = []
    for kind, sources in (evaluation.get("sets") or {}).items():
        for name, found in evaluation["interventions"].items():
            parts = {source: found[kind]["sets"][source] for source in sources}
            pooled = found[kind] if kind == "harmful" else found | found[kind]
            for source, part in [*parts.items(), ("pooled", pooled)]:
                share = percent(part["refusal_score"], part.get("refusal_score_ci"))
                rows.append(
                    [
                        str(name),
                        f"{kind}: {source}",
                        DASH if part["refused"] is None else answers(part),
                        share,
                        _mean(part, "refusal_metric", "+.2f"),
                        _mean(part, "kl_divergence", ".4f"),
                    ]
                )
    return rows


def agreement_rows(evaluation: Document) -> list[list[str]]:
    """How far those who rate the answers agree, and of how many answers they do not."""
    return [
        [
            str(pair["intervention"]),
            str(pair["kind"]),
            " / ".join(map(str, pair["raters"])),
            f"{pair['n']}",
            percent(pair["agreed"]),
            kappa_text(pair),
            str(len(pair["disagreements"])),
        ]
        for pair in evaluation.get("agreement") or ()
    ]


def disagreement_rows(evaluation: Document, completions: Completions | None) -> list[list[str]]:
    """The answers of which raters say different things: prompts and verdicts, no answers."""
    if completions is None:
        return []
    keys = {
        (pair["intervention"], pair["kind"], key)
        for pair in evaluation.get("agreement") or ()
        for key in pair["disagreements"]
    }
    rows = []
    for row in completions.rows:
        for name, answer in zip(completions.interventions, row["answers"], strict=True):
            if answer is None or (name, row["kind"], prompt_key(row["prompt"])) not in keys:
                continue
            verdicts = (answer[rater] for rater in ("refused", "safe", "second_safe", "labelled"))
            said = (DASH if one is None else "yes" if one else "no" for one in verdicts)
            rows.append([str(row["prompt"]), str(name), str(row["kind"]), *said])
    return rows


def _mean(part: Document, key: str, form: str) -> str:
    """A mean with its bootstrap interval, standard error, median and largest prompt, where the
    record has them."""
    text, span = number(part.get(key), form), part.get(f"{key}_ci")
    text = text if not span else f"{text} [{number(span[0], form)}, {number(span[1], form)}]"
    if not (held := part.get(f"{key}_spread")):
        return text
    return (
        f"{text} ± {number(held['standard_error'], form.lstrip('+'))}, "
        f"sd {number(held['sd'], form.lstrip('+'))}, "
        f"median {number(held['median'], form)}, largest {number(held['max'], form)}"
    )


def _rate(now: Document, base: Document | None, change: Document) -> str:
    if now["refused"] is None:
        return "not measured"
    if now["refusal_rate"] is None:
        return counted(now)
    text = f"{counted(now)}  {percent(now['refusal_rate'], now.get('refusal_score_ci'))}"
    if base is None or base is now or base["refusal_rate"] is None:
        return text
    text = f"{text}  Δ {points(float(now['refusal_rate']) - float(base['refusal_rate']))}"
    span, chance = change.get("refusal_score_ci"), finite(change.get("refusal_score_p"))
    text = text if not span else f"{text} [{points(span[0])}, {points(span[1])}]"
    text = f"{text} pp"
    return text if chance is None else f"{text}, p = {chance:z.2g}"


def _counts(result: Document, kinds: Sequence[str], key: str) -> str:
    """How many answers there are of a sort, for each kind of prompts that the record counts."""
    counts = ((kind, result[kind].get(key)) for kind in kinds)
    return ", ".join(f"{kind} {DASH if count is None else count}" for kind, count in counts)


def _labelled(now: Document) -> str:
    text = percent(now.get("classifier_rate"), now.get("classifier_rate_ci"))
    cut = now.get("classifier_truncated")
    return f"{text} ({cut} answers cut)" if cut else text


def _safety(now: Document, judge: str = "") -> str:
    text = percent(now.get(f"{judge}safety_score"), now.get(f"{judge}safety_score_ci"))
    failed, judged = now.get(f"{judge}judge_failed"), now.get(f"{judge}judged")
    text = f"{text} n = {judged}" if judged else text
    return f"{text} ({failed} not judged)" if failed else text


def _loss(result: Document, corpus: str) -> str:
    held = (result.get("losses") or {}).get(corpus)
    if not held:
        return DASH
    count = f", {held['n_tokens']} tokens" if "n_tokens" in held else ""
    error = finite(held.get("loss_standard_error"))
    spread = "" if error is None else f" ± {error:z.4f}"
    return f"{number(held['loss'], '.4f')}{spread} (ppl {number(held['perplexity'])}{count})"


def _task(result: Document, task: str) -> str:
    """The first metric of lm-eval, with its standard error."""
    held: Mapping[str, Any] = (result.get("tasks") or {}).get(task) or {}
    for key, value in held.items():
        name, _, rest = key.partition(",")
        if finite(value) is None or not rest or name.endswith("_stderr"):
            continue
        error = finite(held.get(f"{name}_stderr,{rest}"))
        spread = "" if error is None else f" ± {error:z.3f}"
        count = f", n = {held['n']}" if held.get("n") else ""
        return f"{float(value):z.3f}{spread} ({name}{count})"
    return DASH
