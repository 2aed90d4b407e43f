"""Records as people read them: tables and a few lines on stdout."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from abliterate.cli.evaluation_tables import show_evaluation
from abliterate.cli.selection_tables import show_certainty
from abliterate.console import print_command, print_line, print_table
from abliterate.prompts.sampling import split_pool
from abliterate.prompts.sources import read_source
from abliterate.run_folder import MODEL
from abliterate.selection.candidate_filters import Thresholds
from abliterate.selection.score_table import choose_again as choose_among
from abliterate.selection.score_table import read_scores, score_record
from abliterate.settings import Settings
from abliterate.storage.artifacts import finite, read_json


def describe_source(spec: str, examples: int, seed: int) -> dict[str, Any]:
    """Counts, splits, categories and examples of a prompt source."""
    source = read_source(spec)
    splits = {}
    for name, held in source.splits.items():
        pool = split_pool(source, name)
        splits[name] = {
            "prompts": len(held),
            "distinct": len(pool),
            "categories": dict(Counter(p.category for p in pool if p.category is not None)),
        }
    pool = [p for name in source.splits for p in split_pool(source, name)]
    chosen = random.Random(seed).sample(pool, min(max(examples, 0), len(pool)))
    return {
        "source": spec,
        "origin": source.origin,
        **({} if source.commit is None else {"revision": source.commit}),
        "splits": splits,
        "examples": [asdict(prompt) for prompt in chosen],
    }


def show_source(document: Mapping[str, Any]) -> None:
    splits = document["splits"]
    categories = list(dict.fromkeys(c for split in splits.values() for c in split["categories"]))
    rows = [["prompts", *(str(s["prompts"]) for s in splits.values())]]
    rows.append(["distinct", *(str(s["distinct"]) for s in splits.values())])
    rows += [
        [f"  {category}", *(str(s["categories"].get(category, 0)) for s in splits.values())]
        for category in categories
    ]
    commit = f", commit {document['revision']}" if "revision" in document else ""
    print_table(f"{document['source']} ({document['origin']}{commit})", ["", *splits], rows)
    for example in document["examples"]:
        print_line(f"- {example['text']}")


def show_extraction(record: Mapping[str, Any], run: Path) -> None:
    print_table(
        "Candidate directions",
        ["", "value"],
        [
            ["model", record["model"]["id"]],
            ["positions", " ".join(f"{p['position']}:{p['token']!r}" for p in record["positions"])],
            ["layers x d_model", f"{record['n_layers']} x {record['d_model']}"],
            ["refusal tokens", " ".join(repr(t["token"]) for t in record["refusal_tokens"])],
            *(
                [f"{kind} prompts", f"{count['used']} of {count['given']}{_unfinished(count)}"]
                for kind, count in record["counts"].items()
            ),
            ["time", f"{record['seconds']:z.1f} s"],
        ],
    )
    _stability(record)
    print_command("next", "select", run)


def _unfinished(count: Mapping[str, Any]) -> str:
    """Prompts whose thought did not end, which no stage scores."""
    return f" ({count['unfinished']} unfinished thoughts)" if count.get("unfinished") else ""


def _stability(record: Mapping[str, Any]) -> None:
    """By position, how alike the candidates of two halves of the prompts are, and how long."""
    held = record.get("stability")
    if not held:  # of an older version
        return
    rows = []
    for index, entry in enumerate(record["positions"]):
        cosines, norms, errors = (
            held[name][index] for name in ("split_half_cosine", "norm", "norm_standard_error")
        )
        known = [(c, layer) for layer, c in enumerate(cosines) if finite(c) is not None]
        shares = [e / n for n, e in zip(norms, errors, strict=True) if finite(e) is not None]
        if not known:
            continue
        (low, low_layer), (high, high_layer) = min(known), max(known)
        rows.append(
            [
                f"{entry['position']} {entry['token']!r}",
                f"{median(c for c, _ in known):z.3f}",
                f"{low:z.3f} at {low_layer}",
                f"{high:z.3f} at {high_layer}",
                f"{median(shares):z.1%}" if shares else "-",
            ]
        )
    if rows:
        columns = ["position", "median", "least, layer", "largest, layer", "error of the norm"]
        print_table("Cosine of the candidates of two halves of the prompts", columns, rows)


def show_selection(record: Mapping[str, Any], run: Path) -> None:
    _candidates(record)
    show_certainty(record)
    if (best := record.get("per_layer")) is not None:
        chosen = [
            f"{layer}: {one['position']}" + ("" if one["reason"] is None else f" ({one['reason']})")
            for layer, one in enumerate(best)
            if one is not None
        ]
        print_line(
            f"the best position of each layer (with the filter that drops it): {', '.join(chosen)}"
        )
    model = record["model"]["id"]
    print_command("next", "orthogonalize", model, "--direction", run, "-o", "OUT")


def _candidates(record: Mapping[str, Any], shown: int = 8) -> None:
    kept = sorted(
        (c for c in record["candidates"] if c["kept"] or c["reason"] == "bypass"),
        key=lambda c: float(c["bypass_score"]),
    )
    rows = [
        [
            f"{c['position']}",
            f"{c['layer']}",
            f"{c['bypass_score']:z.3f}",
            "" if c["induce_score"] is None else f"{c['induce_score']:z.3f}",
            "not needed" if c["kl_divergence"] is None else f"{c['kl_divergence']:z.4f}",
            "selected" if _is_winner(c, record["winner"]) else "",
        ]
        for c in kept[:shown]
    ]
    dropped = Counter(c["reason"] for c in record["candidates"] if c not in kept)
    words = {"nan": "not finite", "layer": "in the last layers", "kl": "KL", "induce": "induce"}
    reasons = (
        ", ".join(f"{count} {words.get(reason, reason)}" for reason, count in dropped.items())
        or "none"
    )
    lost = sum(not c["kept"] for c in kept)
    # A score table of the paper's repository does not say how many prompts it is of.
    counts = ", ".join(
        f"{kind} n={n['used']}{_unfinished(n)}" for kind, n in record.get("counts", {}).items()
    )
    print_table(
        f"{len(kept)} of {len(record['candidates'])} candidates pass"
        + f" what was measured, {lost} of them without KL, as they cannot win" * bool(lost)
        + f" (dropped: {reasons})"
        + f"; means over {counts}" * bool(counts),
        ["position", "layer", "bypass (log-odds)", "induce (log-odds)", "KL (nats)", ""],
        rows,
        left=0,
    )


def _is_winner(candidate: Mapping[str, Any], winner: Mapping[str, Any] | None) -> bool:
    return winner is not None and all(candidate[key] == winner[key] for key in winner)


def choose_again(file: Path, n_layers: int | None, settings: Settings) -> dict[str, Any]:
    """Re-run the choice on a saved score table."""
    document = read_json(file, "select RUN")
    scores, layers = read_scores(document, n_layers, str(file))
    chosen = settings.select
    thresholds = Thresholds(chosen.kl_threshold, chosen.induce_threshold, chosen.prune_layers)
    winner, judged = choose_among(scores, layers, thresholds, str(file))
    return {
        "winner": {"position": winner.position, "layer": winner.layer},
        "n_layers": layers,
        "thresholds": asdict(thresholds),
        "candidates": [score_record(score) for score in judged],
    }


def show_choice(choice: Mapping[str, Any]) -> None:
    _candidates(choice)
    winner = choice["winner"]
    print_line(f"winner: position {winner['position']}, layer {winner['layer']}")


def show_edit(record: Mapping[str, Any], out: Path) -> None:
    tensors = record["tensors"]
    rows = []
    for kind in dict.fromkeys(t["kind"] for t in tensors):
        of_kind = [t for t in tensors if t["kind"] == kind]
        rows.append(
            [
                kind,
                str(len(of_kind)),
                f"{max(t['before'] for t in of_kind):.2e}",
                f"{max(t['after'] for t in of_kind):.2e}",
            ]
        )
    print_table(
        f"{len(tensors)} tensors edited, from W to E",
        ["kind", "tensors", "|r'W|/|W|", "|r'E|/|W|"],
        rows,
    )
    if record["untied"]:
        print_line(f"untied, with the original matrix: {', '.join(record['untied'])}")
    if record["untouched"]:
        print_line(f"no part of the language model, untouched: {', '.join(record['untouched'])}")
    for limit in record["promise"]["limits"]:
        print_line(f"note: {limit}")
    print_line(f"wrote {out}")


def show_run(record: Mapping[str, Any], run: Path) -> None:
    winner = record["select"]["winner"]
    tokens = {p["position"]: p["token"] for p in record["extract"]["positions"]}
    print_line(
        f"direction: layer {winner['layer']} of {record['extract']['n_layers']}, position "
        f"{winner['position']} ({tokens[winner['position']]!r})"
    )
    show_evaluation(record["evaluate"])
    tensors = record["orthogonalize"]["tensors"]
    before, after = (max(t[key] for t in tensors) for key in ("before", "after"))
    print_line(
        f"edited checkpoint: {run / MODEL} ({len(tensors)} tensors; largest share along the "
        f"direction {before:.1e} -> {after:.1e})"
    )
    print_line(f"hash of all that decides this result: {record['hash']}")
