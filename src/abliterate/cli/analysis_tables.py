"""The records of inspect and trace as tables on stdout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterate.console import print_line, print_table
from abliterate.selection.certainty import sentences
from abliterate.table_layout import number_text


def show_inspection(record: Mapping[str, Any], run: Path) -> None:
    rows = []
    for row in record["layers"]:
        geometry = row["geometry"] or {}
        rows.append(
            [
                str(row["layer"]),
                _number(row["cosine_with_selected"], "+.3f"),
                _number(row["norm"], ".3g"),
                _number(row.get("norm_standard_error"), ".2g"),
                _number(row.get("split_half_cosine"), ".3f"),
                f"{geometry['n_harmful']}+{geometry['n_harmless']}" if geometry else "-",
                _number(geometry.get("pc1_share"), ".1%"),
                _number(geometry.get("cos_pc1"), ".3f"),
                _number(geometry.get("auc"), ".3f"),
                _number(geometry.get("silhouette"), ".3f"),
                _number(_chance(geometry, "auc"), ".2g"),
                _number((row.get("held_out") or {}).get("auc"), ".3f"),
                _number((row.get("held_out") or {}).get("silhouette"), ".3f"),
                " ".join(repr(token["token"]) for token in row.get("promotes", [])[:3]),
            ]
        )
    _print_measured(
        f"Directions at position {record['position']}",
        [
            "layer",
            "cos selected",
            "norm",
            "± error",
            "split-half cos",
            "n",
            "PC1 share",
            "|cos PC1|",
            "AUC",
            "silhouette",
            "p of AUC",
            "held-out AUC",
            "held-out silhouette",
            "promotes",
        ],
        rows,
    )
    for note in record["notes"]:
        print_line(f"note: {note}")
    if record["lens"]:
        for what in ("promotes", "suppresses"):
            listed = record["lens"][what][:12]
            print_line(
                f"the direction {what}: "
                + " ".join(f"{t['token']!r} {t['logit']:+z.2f}" for t in listed)
            )
    for sentence in sentences(record):
        print_line(sentence)
    print_line(f"wrote {run / 'inspect.json'}")


def show_trace(record: Mapping[str, Any], run: Path) -> None:
    curves = record["cosines"]
    layers = len(curves["harmful"]["mean"])
    rows = [
        [
            str(layer),
            *(f"{c['mean'][layer]:+z.3f} ± {c['std'][layer]:z.3f}" for c in curves.values()),
        ]
        for layer in range(layers)
    ]
    titles = [f"{kind} (n={curve['n']})" for kind, curve in curves.items()]
    print_table(
        "Cosine of the last token's residual stream with the direction",
        ["layer", *titles],
        rows,
        left=0,
    )
    if record["heads"]:
        _heads(record["heads"]["rows"], curves["suffix"]["n"])
    for note in record["notes"]:
        print_line(f"note: {note}")
    print_line(f"wrote {run / 'trace.json'}")


def _heads(heads: list[Any], count: int) -> None:
    rows = []
    for head in heads:
        parts, looks = head["contribution"], head["attention"]
        rows.append(
            [
                f"{head['layer']}.{head['head']}",
                f"{parts['harmful']:+z.3g}",
                f"{parts['suffix']:+z.3g}",
                f"{parts['random']:+z.3g}",
                f"{head['change']:+z.3g}" + _plus_minus(head.get("change_standard_error")),
                _number((head.get("p_holm") or {}).get("change"), ".2g"),
                _number((head.get("p_holm") or {}).get("against_random"), ".2g"),
                _number(looks["harmful"]["instruction"], ".0%"),
                _number(looks["suffix"]["instruction"], ".0%"),
                _number(looks["suffix"]["suffix"], ".0%"),
            ]
        )
    _print_measured(
        f"Heads whose contribution along the direction changes most with the suffix (n={count}; "
        "p: that it does not change, and that it is that of random tokens, Holm over all heads)",
        [
            "head",
            "harmful",
            "+ suffix",
            "+ random",
            "change ± error",
            "p",
            "p (random)",
            "attention: instruction",
            "with suffix: instruction",
            "suffix",
        ],
        rows,
    )


def _print_measured(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table of the columns in which there is anything, and which there is nothing of."""
    there = [at for at in range(len(columns)) if any(row[at] not in ("", "-") for row in rows)]
    kept = [[row[at] for at in there] for row in rows]
    print_table(title, [columns[at] for at in there], kept, left=0)
    absent = [name for at, name in enumerate(columns) if at not in there]
    if absent:
        print_line(f"not measured: {', '.join(absent)}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else number_text(value, form)


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f" ± {error:z.2g}"


def _chance(geometry: Mapping[str, Any], figure: str) -> float | None:
    """The share of random labellings that separate as well; records of old have none."""
    found: float | None = geometry.get("permutations", {}).get(figure, {}).get("p")
    return found
