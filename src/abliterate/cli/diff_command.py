"""diff: what differs between checkpoints, and whose edits are alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from abliterate.cli import options as opt
from abliterate.console import print_json, print_line, print_table


@opt.command()
def diff(
    a: Annotated[
        str,
        typer.Argument(
            help="Checkpoint folder or hub id; of several, the base.", show_default=False
        ),
    ],
    b: Annotated[
        list[str],
        typer.Argument(help="Another of its architecture, or several.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Draw cosines of edits and scales by layer here (FILE.html); replaces an earlier "
            "page of ours, nothing else.",
            show_default=False,
        ),
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Compare two checkpoints tensor by tensor, or the edits of several made from A."""
    from abliterate.checkpoints.checkpoint import find_checkpoint
    from abliterate.errors import UsageError
    from abliterate.extras import import_extra
    from abliterate.storage.artifacts import check_writable, finite, write_atomically
    from abliterate.storage.ownership import claim_file, is_page

    if output is not None:
        if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
            raise UsageError(f"-o {output}: name a file such as diff.html")
        import_extra("plotly.graph_objects", "-o FILE.html", "plotly", "report")
        check_writable(output.parent)
        claim_file(output, is_page, "diff -o")
    base, *others = [find_checkpoint(name) for name in (a, *b)]
    from abliterate.auditing.compare import compare
    from abliterate.auditing.edit_likeness import compare_variants
    from abliterate.auditing.report import comparison_document

    if len(others) == 1 and output is None:
        document = finite(comparison_document(compare(base, others[0])))
        print_json(document) if as_json else show_differences(document)
        return
    document = finite(compare_variants(base, list(zip(b, others, strict=True))))
    if output is not None:
        from abliterate.report.variant_page import variant_page

        write_atomically(output, variant_page(document).encode())
    print_json(document) if as_json else _show_variants(document)
    if output is not None and not as_json:
        print_line(f"page: {output}")


def _show_variants(document: dict[str, Any]) -> None:
    """What each variant is, how alike their edits are, and the scales by layer."""
    from abliterate.report.variant_page import VARIANTS, variant_rows

    rows = variant_rows(document)
    print_table("variants", VARIANTS, rows, left=3)
    numbers = [row[0] for row in rows]
    for key, title in (
        ("cosines", "cosine of the directions"),
        ("shared", "share of a row's directions in the subspace of a column's"),
    ):
        cells = [["-" if v is None else f"{v:z.3f}" for v in row] for row in document[key]]
        print_table(
            title, ["", *numbers], [[n, *row] for n, row in zip(numbers, cells, strict=True)]
        )
    scales = [(v["form"] or {}).get("layer_scales") or [] for v in document["variants"]]
    depth = max(map(len, scales), default=0)
    layers = [[str(layer), *(_scale(of, layer) for of in scales)] for layer in range(depth)]
    if layers:
        print_table("scale by layer", ["layer", *numbers], layers)
    for group in document["alike"]:
        print_line(f"edited alike: {', '.join(group)}")
    if not document["alike"]:
        print_line("no two edited alike")


def _scale(scales: list[float | None], layer: int) -> str:
    scale = scales[layer] if layer < len(scales) else None
    return "-" if scale is None else f"{scale:z.2f}"


def show_differences(document: dict[str, Any]) -> None:
    """Every tensor that differs, as ``--tensors`` lists them."""
    changed = [t for t in document["tensors"] if t["state"] != "unchanged"]
    if changed:
        print_table(
            "tensors that differ",
            ["tensor", "difference", "size", "in its first direction", "cosine", "scale"],
            [
                [
                    t["name"],
                    t["state"],
                    f"{t['change']:.1e}" if t["change"] is not None else "inf",
                    f"{t['first']:z.3f}",
                    "-" if t["cosine"] is None else f"{t['cosine']:z.5f}",
                    "-" if t["scale"] is None else f"{t['scale']:z.3f}",
                ]
                for t in changed
            ],
            left=2,
        )
    print_line(f"unchanged: {len(document['tensors']) - len(changed)} tensors")
    if document["projected"]:
        print_line(
            f"one direction was projected out of {len(document['projected'])} writers; "
            f"{len(document['beyond'])} tensors differ otherwise"
        )
    for label in ("missing", "added"):
        for name in document[label][:20]:
            print_line(f"{label}: {name}")
