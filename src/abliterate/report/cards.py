"""The report's headline numbers, of what is current alone."""

from __future__ import annotations

from dataclasses import dataclass

from abliterate.report.collect import Document, Run
from abliterate.report.facts import answers, number, prompt_count, selected_without, tokens_of


@dataclass(frozen=True)
class Card:
    """A headline number."""

    title: str
    value: str
    note: str = ""


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
        count = prompt_count(evaluation, "harmless")
        found.append(Card("KL, ablated", value, f"{count}harmless test prompts, last token, nats"))
    return found
