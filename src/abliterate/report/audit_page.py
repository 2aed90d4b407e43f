"""What an audit found, in rows that the terminal and a page of its own show alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abliterate.auditing.verdict import p_text
from abliterate.report.edit_strip import audit_strip
from abliterate.report.figure_page import PageFigure, PageTable, figure_page

Document = Mapping[str, Any]
SUMMARY = ["component", "layers", "differs", "tensors", "share removed"]
KINDS = ["kind", "layers", "units", "share removed"]


def audit_page(name: str, document: Document) -> str:
    """An audit as an HTML file of its own: verdict, why, the strip of what was edited, the rows.

    Args:
        name: of the checkpoint, as it was given.
        document: of ``Audit.document``.

    Raises:
        UsageError: plotly is missing.
    """
    base = document["base"]
    strip = PageFigure(
        "edited",
        audit_strip(document),
        "Share of the direction removed from each component of each block (layers are counted from "
        "0): 1 is all of it, below 0 it was amplified.",
        wide=True,
    )
    notes = [f"Note: {warning}." for warning in document["warnings"]]
    title = f"{name}: {document['verdict']}"
    lines = [_sentence(document["why"]), *notes]
    tables = [PageTable("what was found", (), facts(document))]
    if base is not None:
        tables.append(PageTable("Differences from the base", SUMMARY, summary_rows(base), 3))
    else:
        tables.append(PageTable("Edited", KINDS, kind_rows(document["units"]), 2))
    return figure_page(title, "Audit of a checkpoint", lines, [strip], tables)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def facts(document: Document) -> list[list[str]]:
    """What is known of the edit, a line each: what it is, and its value."""
    writers, base = document["writers"], document["base"]
    rows = []
    if document["evidence"]:
        rows.append(["decided by", document["evidence"]])
    sides = ("writers", "readers")
    rows += [[f"chance for the {side}", _chance(document[side])] for side in sides]
    if document["verdict"] == "edited":
        if base is not None and base["form"] is not None:
            rows.append(["form", ", ".join(base["form"]["kinds"])])
        removed = document["removed"]
        if removed is not None:
            rows.append(["share removed", f"{removed:z.2f}{' (all)' if document['full'] else ''}"])
        if document["style"]:
            rows.append(["looks like", document["style"]])
        rows += [
            [key, "unknown" if document[key] is None else "yes" if document[key] else "no"]
            for key in ("embeddings", "biases")
        ]
    elif writers["detectable_scale"] is not None:
        rows.append(
            ["edits of all writers would show from scale", str(writers["detectable_scale"])]
        )
    if document["declared"]["record"]:
        confirmed = document["declared"]["confirmed"]
        word = {True: "confirmed", False: "NOT borne out", None: "cannot be checked"}[confirmed]
        rows.append(["abliterate.json", word])
    return rows


def _chance(side: Document) -> str:
    """A p-value as far as it was calibrated, or why there is none."""
    if not side["groups"]:
        return str(side["reason"])
    return f"{p_text(side['p_value'])} (claimed below {side['claimed_below']:.0e})"


def kind_rows(units: Sequence[Document]) -> list[list[str]]:
    """Which kinds of writers lost the direction, and in which layers; columns ``KINDS``."""
    rows = []
    for kind in dict.fromkeys(u["kind"] for u in units):
        of_kind = [u for u in units if u["kind"] == kind]
        lost = [u for u in of_kind if u["carries"]]
        layers = sorted(u["layer"] for u in lost if u["layer"] is not None)
        removed = sorted(u["removed"] for u in lost)
        rows.append(
            [
                kind,
                f"{layers[0]}-{layers[-1]}" if layers else "-",
                f"{len(lost)} of {len(of_kind)}",
                _span(removed[0], removed[-1]) if removed else "-",
            ]
        )
    return rows


def summary_rows(base: Document) -> list[list[str]]:
    """What differs from the base, by component and range of layers; columns ``SUMMARY``."""
    rows = []
    for row in base["summary"]:
        scale = row["scale"]
        rows.append(
            [
                row["component"],
                row["layers"] or "-",
                "projected" if row["projected"] else "otherwise",
                f"{row['tensors']} of {row['of']}",
                "-" if scale is None else _span(*scale),
            ]
        )
    return rows


def _span(low: float, high: float) -> str:
    ends = dict.fromkeys((f"{low:z.2f}", f"{high:z.2f}"))
    return " to ".join(ends)
