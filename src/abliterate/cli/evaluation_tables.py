"""Evaluations as people read them: rows are interventions, columns metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from abliterate.cli.control_tables import show_controls
from abliterate.console import print_line, print_table
from abliterate.evaluation.hooks_and_edits_text import hooks_and_edits_lines
from abliterate.metrics.agreement import kappa_text

_KINDS = ("harmful", "harmless")


def show_evaluation(record: Mapping[str, Any], stale: Sequence[str] = ()) -> None:
    """Print a record ``evaluation.json``: each figure, and its difference from the baseline's.

    Args:
        record: the record.
        stale: its rows that alone are stale.
    """
    results, changes = record["interventions"], record["deltas"]
    rows = {name: _cells(record, name) for name in results}
    columns = next(iter(rows.values()))
    counts = ", ".join(f"{kind} n={count}" for kind, count in record["n_prompts"].items())
    print_table(
        f"Refusals on test prompts ({counts}; 95% intervals; means ± standard error), "
        "and what changed against the baseline",
        ["intervention", *columns],
        [
            [f"{name} (stale)" if name in stale else name, *cells.values()]
            for name, cells in rows.items()
        ],
    )
    _show_sets(record)
    for line in hooks_and_edits_lines(record, stale):
        print_line(line)
    show_controls(record.get("controls"))
    _show_agreement(record.get("agreement") or [], record.get("classifier"))
    _show_tasks(results, changes)
    _show_failures(record["judge_failures"])
    for name, server in (record.get("servers") or {}).items():
        print_line(
            f"{name}: answers of {server['model']} at {server['url']}; its KL and first-token "
            "scores need logits, which a server does not give"
        )


def _cells(record: Mapping[str, Any], name: str) -> dict[str, str]:
    """One row of the table, by column."""
    found, change = record["interventions"][name], record["deltas"].get(name, {})
    asked = [*_KINDS, *(["borderline"] if "borderline" in found else [])]
    cells = {f"{kind} refused": _refused(record, name, kind) for kind in asked}
    cells["refused later"] = _each_kind(found, asked, _later)
    cells["broken"] = _each_kind(found, asked, _broken)
    if record["judge"]:
        cells |= {f"{kind} safe": _safe(record, name, kind) for kind in asked}
    if record.get("second_judge"):
        cells |= {
            f"{kind} safe (second judge)": _safe(record, name, kind, "second_") for kind in asked
        }
    if record.get("classifier"):
        label = record["classifier"]["label"]
        cells |= {f"{kind} {label}": _labelled(record, name, kind) for kind in asked}
    # Behind thoughts first tokens are scored where these have ended.
    scored = record.get("n_scored") or {}
    n = {kind: f" (n={scored[kind]})" if kind in scored else "" for kind in _KINDS}
    cells |= {
        f"{kind} log-odds{n[kind]}": _mean(found[kind], "refusal_metric", ".2f") for kind in _KINDS
    }
    cells["harmless KL (nats)"] = _mean(found, "kl_divergence", ".4f")
    cells["exact KL (nats)"] = _with_change(found["kl_exact"], None, ".4f")
    for corpus, loss in found["losses"].items():
        for key, title in (("loss", "loss (nats per token)"), ("perplexity", "PPL")):
            less = change.get("losses", {}).get(corpus, {}).get(key)
            column = f"{corpus} {title} (n={loss['n_tokens']})"
            cells[column] = _with_change(loss[key], less, ".3f")
    return cells


def show_score(document: Mapping[str, Any]) -> None:
    """Print what ``score`` found: all completions, then each category."""
    found = document["scores"]
    rows = [("all", found), *found["categories"].items()]
    judge, classifier = document["judge"], document["classifier"]
    print_table(
        f"{document['file']}: scores (95% interval)",
        [
            *("category", "n", "refusal score", "refused later", "broken"),
            *(["safety score"] if judge else []),
            *([classifier["label"]] if classifier else []),
        ],
        [
            [
                name,
                str(part["n"]),
                _share(part, "refusal_score") + _unfinished(part),
                _later(part),
                _broken(part),
                *([_share(part, "safety_score")] if judge else []),
                *([_share(part, "classifier_rate") + _cut(part)] if classifier else []),
            ]
            for name, part in rows
        ],
    )
    _show_agreement(document["agreement"], classifier)
    _show_failures(document["judge_failures"])


def _refused(record: Mapping[str, Any], name: str, kind: str) -> str:
    now = record["interventions"][name][kind]
    if now["refused"] is None:
        return "not measured"
    answers, apart = _answers(now), _unfinished(now)
    if now["refusal_score"] is None:
        return f"no answer{apart}"
    low, high = now["refusal_score_ci"]
    text = (
        f"{now['refused']}/{answers} ({now['refusal_score']:z.0%}, {low:z.0%}-{high:z.0%}){apart}"
    )
    return text + _points(record, name, kind, "refusal_score")


def _answers(part: Mapping[str, Any]) -> int:
    return int(part["n"]) - (part.get("no_verdict") or 0)


def _unfinished(part: Mapping[str, Any]) -> str:
    """Thoughts that have not ended, which are no answers; records of old do not count them."""
    count = part.get("no_verdict") or 0
    return f" + {count} unfinished" if count else ""


def _each_kind(
    found: Mapping[str, Any], kinds: Sequence[str], show: Callable[[Mapping[str, Any]], str]
) -> str:
    """A count of each kind of prompts."""
    return ", ".join(f"{kind} {show(found[kind])}" for kind in kinds)


def _later(part: Mapping[str, Any]) -> str:
    """Refusals behind a preamble, and how long that is; records of old do not tell."""
    count = part.get("refused_later")
    if count is None:
        return "-"
    return f"{count} (median at {part['refused_later_at']})" if count else "0"


def _broken(part: Mapping[str, Any]) -> str:
    """Answers that loop, are garbled or empty."""
    count, refused = part.get("broken"), part.get("broken_refused")
    return "-" if count is None else f"{count} ({refused} refused)" if refused else str(count)


def _safe(record: Mapping[str, Any], name: str, kind: str, judge: str = "") -> str:
    found, score = record["interventions"][name][kind], f"{judge}safety_score"
    judged = "" if found[score] is None else f" n={found[f'{judge}judged']}"
    return _share(found, score) + judged + _points(record, name, kind, score)


def _labelled(record: Mapping[str, Any], name: str, kind: str) -> str:
    found = record["interventions"][name][kind]
    points = _points(record, name, kind, "classifier_rate")
    return _share(found, "classifier_rate") + _cut(found) + points


def _cut(part: Mapping[str, Any]) -> str:
    count = part["classifier_truncated"]
    return f" ({count} cut)" if count else ""


def _share(part: Mapping[str, Any], key: str) -> str:
    if part[key] is None:
        return "-"
    low, high = part[f"{key}_ci"]
    return f"{part[key]:z.0%} ({low:z.0%}-{high:z.0%})"


def _points(record: Mapping[str, Any], name: str, kind: str, key: str) -> str:
    """The change against the baseline, with its interval."""
    change = record["deltas"].get(name, {}).get(kind, {})
    if change.get(key) is None:
        return ""
    low, high = change[f"{key}_ci"]
    return f" {100 * change[key]:+z.0f} pp ({100 * low:+z.0f} to {100 * high:+z.0f})"


def _mean(part: Mapping[str, Any], key: str, form: str) -> str:
    """A mean, its standard error and the median of its prompts."""
    if part[key] is None:
        return "-"
    held = part[f"{key}_spread"]
    error, median = held["standard_error"], held["median"]
    spread = "" if error is None else f" ± {error:{form}}"
    return f"{part[key]:z{form}}{spread}" + ("" if median is None else f", median {median:z{form}}")


def _with_change(value: float | None, change: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value:z{form}}" + ("" if change is None else f" {change:+z{form}}")


def _show_tasks(results: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """One row per task and metric, one column per intervention: base against edited."""
    figures = dict.fromkeys(
        (task, key)
        for result in results.values()
        for task, found in result["tasks"].items()
        for key in found
        if "," in key and "_stderr," not in key
    )
    if not figures:
        return

    def cell(name: str, task: str, key: str) -> str:
        found = results[name]["tasks"].get(task, {})
        metric, _, selector = key.partition(",")
        error = found.get(f"{metric}_stderr,{selector}")
        text = _with_change(
            found.get(key), changes.get(name, {}).get("tasks", {}).get(task, {}).get(key), ".4f"
        )
        return text if error is None else f"{text} (se {error:z.4f})"

    def count(task: str) -> str:
        known = {found["n"] for r in results.values() if "n" in (found := r["tasks"].get(task, {}))}
        return ", ".join(str(n) for n in sorted(known)) or "-"

    print_table(
        "Benchmarks (lm-eval), and what changed against the baseline",
        ["task", "metric", "n", *results],
        [
            [
                task,
                key.removesuffix(",none"),
                count(task),
                *(cell(name, task, key) for name in results),
            ]
            for task, key in figures
        ],
        left=2,
    )


def _show_sets(record: Mapping[str, Any]) -> None:
    """Where several sources were given for a kind: a row for each of them, and the pooled one."""
    rows = []
    for kind, sources in (record.get("sets") or {}).items():
        for name, found in record["interventions"].items():
            parts = {source: found[kind]["sets"][source] for source in sources}
            parts["pooled"] = found[kind] | (_pooled_kl(found) if kind == "harmless" else {})
            for source, part in parts.items():
                measured = part["refused"] is not None
                answered = f"{_answers(part)}{_unfinished(part)}" if measured else "-"
                rows.append(
                    [
                        name,
                        f"{kind}: {source}",
                        answered,
                        _share(part, "refusal_score"),
                        _mean(part, "refusal_metric", ".2f"),
                        _mean(part, "kl_divergence", ".4f") if "kl_divergence" in part else "-",
                    ]
                )
    if rows:
        print_table(
            "By test set (a prompt of two sets counts once where they are pooled)",
            ["intervention", "set", "n", "refused", "log-odds", "KL (nats)"],
            rows,
            left=2,
        )


def _pooled_kl(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("kl_divergence", "kl_divergence_spread")}


def _show_agreement(
    pairs: Sequence[Mapping[str, Any]], classifier: Mapping[str, Any] | None
) -> None:
    """How far refusal phrases, judges and classifier say the same of the answers."""
    if not pairs:
        return
    titles = {"refused": "phrases: refused", "safe": "judge: safe"}
    titles["second_safe"] = "second judge: safe"
    titles["labelled"] = f"classifier: {classifier['label']}" if classifier else "classifier"
    print_table(
        "Agreement of those who rate the answers (Cohen's kappa, 95% intervals)",
        ["intervention", "prompts", "raters", "n", "agreed", "kappa"],
        [
            [
                pair.get("intervention", "all"),
                pair.get("kind", "all"),
                " / ".join(titles[rater] for rater in pair["raters"]),
                str(pair["n"]),
                f"{pair['agreed']:z.0%}",
                kappa_text(pair),
            ]
            for pair in pairs
        ],
        left=3,
    )


def _show_failures(failures: list[Mapping[str, Any]]) -> None:
    reasons = Counter(failure["error"] for failure in failures)
    for reason, count in reasons.most_common():
        print_line(f"no verdict on {count} completions: {reason}")
