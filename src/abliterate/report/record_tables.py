"""The report's tables of what extract, select, inspect, trace and the editor recorded."""

from __future__ import annotations

from abliterate.report.collect import Document
from abliterate.report.facts import DASH, number, percent
from abliterate.report.selection_figures import METRICS, Table, verdict
from abliterate.run_records import recorded_stability
from abliterate.selection.certainty import often_first


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
