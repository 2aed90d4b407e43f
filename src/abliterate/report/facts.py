"""The report's numbers and tables as plain values, ready for the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abliterate.projection import Projection
from abliterate.prompts.sampling import prompt_key
from abliterate.report.collect import Completions, Document, Run, kinds_of
from abliterate.report.selection_figures import METRICS, Table, verdict
from abliterate.report.style import finite
from abliterate.report.verdict import points
from abliterate.run_records import recorded_stability
from abliterate.selection.certainty import often_first

DASH = "\u2013"
# What is put behind the name of whatever is stale.
STALE = "stale"
CONTROLS = {
    "covariance": "random, covariance of the activations",
    "isotropic": "random, isotropic",
    "layers": "candidates of other layers",
}


@dataclass(frozen=True)
class Card:
    """A headline number."""

    title: str
    value: str
    note: str = ""


def number(value: Any, form: str = ".3g") -> str:
    """A number as text, an en dash where there is none."""
    known = finite(value)
    return DASH if known is None else format(known, form)


def percent(value: Any, span: Sequence[float] | None = None) -> str:
    """A share as a percentage, with its interval."""
    known = finite(value)
    if known is None:
        return DASH
    text = f"{known:.1%}"
    return text if not span else f"{text} [{span[0]:.1%}, {span[1]:.1%}]"


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


def cards(run: Run) -> list[Card]:
    """The numbers that come first, of what is current alone."""
    found = [*_direction_cards(run)]
    if evaluation := run.current("evaluation"):
        found[1:1] = _refusal_cards(evaluation)
    if edit := run.current("edit"):
        before, after = (max(float(t[key]) for t in edit["tensors"]) for key in ("before", "after"))
        found.append(
            Card(
                "Largest share along the direction",
                f"{before:.2g} → {after:.2g}",
                f"of {len(edit['tensors'])} edited tensors, before and after, by the old norm",
            )
        )
    return found


def selected_without(selection: Document) -> Projection:
    """What the candidates of a selection were without."""
    return Projection.recorded((selection.get("settings") or {}).get("select") or {})


def _direction_cards(run: Run) -> list[Card]:
    winner = run.selection["winner"] if run.selection else None
    if not run.selection:
        return []
    if "selection" in run.stale:
        return [Card("Direction", "stale", run.stale["selection"].why)]
    if winner is None:
        return [Card("Direction", "none", "no candidate passes the filters")]
    token = tokens_of(run).get(winner["position"])
    place = f"position {winner['position']}" + (f", {token!r}" if token is not None else "")
    layers = run.selection["n_layers"]
    chosen = next(
        c for c in run.selection["candidates"] if all(c[key] == winner[key] for key in winner)
    )
    base, counts = run.selection["baselines"], run.selection["counts"]
    if words := selected_without(run.selection).words:
        place += f"; without its component along {words}"
    if (best := run.selection.get("per_layer")) is not None:
        place += f"; ablated: a direction of its own in {sum(map(bool, best))} layers"
    return [
        Card("Direction", f"layer {winner['layer']} of {layers}", place),
        Card(
            "Bypass (validation)",
            f"{number(base['harmful_refusal_score'], '+.2f')} → "
            f"{number(chosen['bypass_score'], '+.2f')}",
            f"log-odds of refusal on harmful prompts, ablated, n = {counts['harmful']['used']}",
        ),
        Card(
            "Induce (validation)",
            f"{number(base['harmless_refusal_score'], '+.2f')} → "
            f"{number(chosen['induce_score'], '+.2f')}",
            f"log-odds of refusal on harmless prompts, added, n = {counts['harmless']['used']}",
        ),
        Card(
            "KL (validation)",
            number(chosen["kl_divergence"]),
            f"nats; filter {number(run.selection['thresholds']['kl'])}, "
            f"n = {counts['harmless']['used']}",
        ),
    ]


def _refusal_cards(evaluation: Document) -> list[Card]:
    results: Document = evaluation["interventions"]
    base = results.get("baseline")
    found = []
    for name, kind, title in (
        ("ablate", "harmful", "Harmful prompts refused"),
        ("add", "harmless", "Harmless prompts refused"),
    ):
        if name not in results:
            continue
        now = results[name][kind]
        if now["refusal_rate"] is None:  # a streamed model
            continue
        text = f"{now['refusal_rate']:.0%}"
        known = base is not None and base[kind]["refusal_rate"] is not None
        before = "" if base is None or not known else f"{base[kind]['refusal_rate']:.0%} → "
        span = now.get("refusal_score_ci")
        interval = f", 95% interval {span[0]:.0%} to {span[1]:.0%}" if span else ""
        found.append(Card(title, before + text, f"baseline → {name}, n = {answers(now)}{interval}"))
    if "ablate" in results:
        value = number(results["ablate"]["kl_divergence"])
        count = _count(evaluation, "harmless")
        found.append(Card("KL, ablated", value, f"{count}harmless test prompts, last token, nats"))
    return found


def _count(evaluation: Document, kind: str) -> str:
    """How many test prompts there are, as a text to put before them; records of old lack it."""
    count = (evaluation.get("n_prompts") or {}).get(kind)
    return "" if count is None else f"{count} "


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
            f"{_count(evaluation, kind)}{kind} refused",
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
    label = (evaluation.get("classifier") or {}).get("label")
    columns += [
        (f"{kind} {label}", lambda r, k=kind: _labelled(r[k]))
        for kind in kinds
        if any(finite(r[kind].get("classifier_rate")) is not None for r in held)
    ]
    columns += [
        (
            f"{_count(evaluation, kind)}{kind} log-odds",
            lambda r, k=kind: _mean(r[k], "refusal_metric", "+.2f"),
        )
        for kind in kinds
        if any("refusal_metric" in r[kind] for r in held)
    ]
    columns.append(
        (
            f"{_count(evaluation, 'harmless')}harmless KL (nats)",
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
                place = of_family["place"][figure]
                z = "" if finite(place["z"]) is None else f"; selected: z {place['z']:+.1f}"
                cells.append(
                    f"{', '.join(values)} (selected is above {place['below']} of {place['of']}{z})"
                )
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
    rows = []
    for pair in evaluation.get("agreement") or ():
        span = pair["kappa_ci"]
        interval = f" [{number(span[0], '.2f')}, {number(span[1], '.2f')}]" if span else ""
        rows.append(
            [
                str(pair["intervention"]),
                str(pair["kind"]),
                " / ".join(map(str, pair["raters"])),
                f"{pair['n']}",
                percent(pair["agreed"]),
                number(pair["kappa"], ".2f") + interval,
                str(len(pair["disagreements"])),
            ]
        )
    return rows


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
            verdicts = (answer[rater] for rater in ("refused", "safe", "labelled"))
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
    return text if chance is None else f"{text}, p = {chance:.2g}"


def _counts(result: Document, kinds: Sequence[str], key: str) -> str:
    """How many answers there are of a sort, for each kind of prompts that the record counts."""
    counts = ((kind, result[kind].get(key)) for kind in kinds)
    return ", ".join(f"{kind} {DASH if count is None else count}" for kind, count in counts)


def _labelled(now: Document) -> str:
    text = percent(now.get("classifier_rate"), now.get("classifier_rate_ci"))
    cut = now.get("classifier_truncated")
    return f"{text} ({cut} answers cut)" if cut else text


def _safety(now: Document) -> str:
    text = percent(now.get("safety_score"), now.get("safety_score_ci"))
    failed, judged = now.get("judge_failed"), now.get("judged")
    text = f"{text} n = {judged}" if judged else text
    return f"{text} ({failed} not judged)" if failed else text


def _loss(result: Document, corpus: str) -> str:
    held = (result.get("losses") or {}).get(corpus)
    if not held:
        return DASH
    count = f", {held['n_tokens']} tokens" if "n_tokens" in held else ""
    error = finite(held.get("loss_standard_error"))
    spread = "" if error is None else f" ± {error:.4f}"
    return f"{number(held['loss'], '.4f')}{spread} (ppl {number(held['perplexity'])}{count})"


def _task(result: Document, task: str) -> str:
    """The first metric of lm-eval, with its standard error."""
    held: Mapping[str, Any] = (result.get("tasks") or {}).get(task) or {}
    for key, value in held.items():
        name, _, rest = key.partition(",")
        if finite(value) is None or not rest or name.endswith("_stderr"):
            continue
        error = finite(held.get(f"{name}_stderr,{rest}"))
        spread = "" if error is None else f" ± {error:.3f}"
        count = f", n = {held['n']}" if held.get("n") else ""
        return f"{float(value):.3f}{spread} ({name}{count})"
    return DASH


def candidate_rows(table: Table, extracted: Document | None = None) -> list[list[str]]:
    """Every candidate as text: what the heatmaps show, for keyboards, screen readers and print.

    With the record of ``extract`` also how sure its direction is.
    """

    def stability(position: int, layer: int) -> tuple[str, str]:
        if extracted is None:
            return DASH, DASH
        held = recorded_stability(extracted, position, layer)
        error = (
            "" if held["norm_standard_error"] is None else f" ± {held['norm_standard_error']:.2g}"
        )
        return number(held["split_half_cosine"], ".3f"), number(held["norm"], ".4g") + error

    return [
        [
            str(c["position"]),
            str(c["layer"]),
            *(number(c[metric.key], ".4g") for metric in METRICS),
            *stability(c["position"], c["layer"]),
            verdict(c, table.thresholds)
            + (" — selected" if table.winner and _same(c, table.winner) else ""),
        ]
        for c in table.candidates
    ]


def resample_rows(selection: Document, shown: int = 12) -> list[list[str]]:
    """The candidates that win or pass on resamples of the prompts; none of an older record."""
    held = selection.get("bootstrap")
    rows = []
    for c in often_first(held)[:shown] if held else ():
        spans = (c[metric.key] for metric in METRICS)
        rows.append(
            [
                str(c["position"]),
                str(c["layer"]),
                percent(c["wins"]),
                percent(c["passes"]),
                *(f"[{number(low, '.3g')}, {number(high, '.3g')}]" for low, high in spans),
            ]
        )
    return rows


def front_rows(selection: Document) -> list[list[str]]:
    """Where no candidate passes: those that no other beats, and what each fails."""
    return [
        [
            str(c["position"]),
            str(c["layer"]),
            *(number(c[metric.key], ".4g") for metric in METRICS),
            ", ".join(f"{miss['filter']} by {number(miss['by'])}" for miss in c["fails"]),
            " ".join(str(miss["option"]) for miss in c["fails"]),
        ]
        for c in selection.get("front") or ()
    ]


def _same(candidate: Document, winner: Document) -> bool:
    return all(candidate[key] == winner[key] for key in ("position", "layer"))


def kind_rows(edit: Document) -> list[list[str]]:
    """The edited tensors by kind: how many, and the largest share before and after."""
    rows = []
    for kind in dict.fromkeys(str(t["kind"]) for t in edit["tensors"]):
        of_kind = [t for t in edit["tensors"] if t["kind"] == kind]
        before, after = (max(float(t[key]) for t in of_kind) for key in ("before", "after"))
        rows.append([kind, str(len(of_kind)), f"{before:.2e}", f"{after:.2e}"])
    return rows


def head_rows(trace: Document) -> list[list[str]]:
    """The head table."""
    held = trace.get("heads") or {"rows": []}
    rows = []
    for head in held["rows"]:
        parts, looks = head["contribution"], head["attention"]
        rows.append(
            [
                f"{head['layer']}.{head['head']}",
                *(number(parts[kind], "+.3g") for kind in ("harmful", "suffix", "random")),
                f"{number(head['change'], '+.3g')} ± {number(head['change_std'], '.2g')}",
                *(
                    number((head.get("p_holm") or {}).get(test), ".2g")
                    for test in ("change", "against_random")
                ),
                percent(looks["harmful"]["instruction"]),
                percent(looks["suffix"]["instruction"]),
                percent(looks["suffix"]["suffix"]),
                percent(looks["random"]["suffix"]),
            ]
        )
    return rows


def layer_rows(inspect: Document) -> list[list[str]]:
    """The numbers of inspect, a row a layer."""
    rows = []
    for row in inspect["layers"]:
        geometry = row["geometry"] or {}
        rows.append(
            [
                str(row["layer"]),
                number(row["cosine_with_selected"], "+.3f"),
                number(row["norm"]),
                number(row.get("norm_standard_error"), ".2g"),
                number(row.get("split_half_cosine"), ".3f"),
                f"{geometry['n_harmful']}+{geometry['n_harmless']}" if geometry else DASH,
                percent(geometry.get("pc1_share")),
                number(geometry.get("cos_pc1"), ".3f"),
                number(geometry.get("auc"), ".3f"),
                number(geometry.get("silhouette"), ".3f"),
                *(
                    number(((geometry.get("permutations") or {}).get(name) or {}).get("p"), ".2g")
                    for name in ("auc", "norm")
                ),
                number((row.get("held_out") or {}).get("auc"), ".3f"),
                number((row.get("held_out") or {}).get("silhouette"), ".3f"),
                " ".join(repr(token["token"]) for token in row.get("promotes") or []),
                " ".join(repr(token["token"]) for token in row.get("suppresses") or []),
            ]
        )
    return rows


def computed_line(record: Document | None) -> str:
    """How a stage computed: dtype, device, attention, batches, threads; empty for an older one."""
    held = (record or {}).get("computed_with") or {}
    if "dtype" not in held:
        return ""
    batches = (record or {}).get("batches") or {}
    most = "".join(f", up to {count} {name.replace('_', ' ')}" for name, count in batches.items())
    words = [str(held[name]) for name in ("dtype", "device", "attention") if held.get(name)]
    small = held.get("quantization") or {}
    words += [f"{small['method']} {small.get('bits')} bit"] if small.get("method") else []
    asked = f"--batch-size {held.get('batch_size')}{most}"
    return f"{', '.join(words)}, {asked}, {held.get('threads')} threads"


def _other_dtype(record: Document | None, extract: Document | None) -> str:
    """A note where a stage ran in another dtype than extract did."""
    now = ((record or {}).get("computed_with") or {}).get("dtype")
    before = (extract or {}).get("dtype", now)
    return "" if now == before else f" (extract ran in {before})"


def provenance(run: Run) -> list[tuple[str, str]]:
    """Where the numbers come from: model, hashes, seeds, versions, prompts."""
    rows: list[tuple[str, str]] = [("model", run.model)]
    first = run.extract or run.selection or run.evaluation
    if first:
        identity = first["model"]
        rows += [("revision", str(identity["revision"]))] if identity.get("revision") else []
        rows += [
            (f"file {name}", str(digest)) for name, digest in identity.get("files", {}).items()
        ]
    parts = (run.current(part) for part in ("evaluation", "inspect", "edit"))
    direction = next((part for part in parts if part), {}).get("direction")
    if direction:
        rows.append(("direction", str(direction["sha256"])))
    if run.extract:
        rows += [
            ("dtype, device", f"{run.extract['dtype']}, {run.extract['device']}"),
            ("refusal tokens", " ".join(repr(t["token"]) for t in run.extract["refusal_tokens"])),
        ]
        rows += [
            (f"{kind} training prompts", f"{count['used']} used of {count['given']}{apart(count)}")
            for kind, count in run.extract["counts"].items()
        ]
    for name, record in (("extract", run.extract), ("evaluate", run.evaluation)):
        if record and (done := record.get("thinking")):
            rows.append((f"thinking, {name}", f"{done['mode']}: {done['why']}"))
    for name, record in (
        ("extract", run.extract),
        ("select", run.selection),
        ("evaluate", run.evaluation),
        ("inspect", run.inspect),
        ("trace", run.trace),
    ):
        part = {"select": "selection", "evaluate": "evaluation"}.get(name, name)
        if record:
            spent = f"{number(record['seconds'], '.1f')} s"
            whole = part in run.stale and not run.stale[part].rows
            mark = f" ({STALE})" if whole else ""
            rows.append((name + mark, f"seed {record['seed']}, {spent}, inputs {record['inputs']}"))
    rows += [
        (f"computed, {name}", line + _other_dtype(record, run.extract))
        for name, record in (
            ("extract", run.extract),
            ("select", run.selection),
            ("evaluate", run.evaluation),
            ("inspect", run.inspect),
            ("trace", run.trace),
        )
        if (line := computed_line(record))
    ]
    if first:
        made = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
        rows.append(("versions", made))
    return rows
