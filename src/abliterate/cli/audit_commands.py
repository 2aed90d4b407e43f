"""The commands that judge checkpoints: audit, and diff."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from abliterate.cli import options as opt
from abliterate.console import print_json, print_line, print_table

#: Exit codes by verdict.
EXIT_CODES = {"clean": 0, "edited": 7, "undecided": 8}


@opt.command()
def audit(
    *,
    checkpoint: opt.Model,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help="What it is said to be made from; then tensors are compared.",
            show_default=False,
        ),
    ] = None,
    direction: Annotated[
        str | None,
        typer.Option(
            "--direction",
            help="Run folder or safetensors file of the edit that its record declares.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Write the recovered direction here (safetensors); replaces an earlier one of "
            "audit, nothing else.",
            show_default=False,
        ),
    ] = None,
    given: opt.Given,
    device: Annotated[
        str, typer.Option("--device", help="Where to compute: cpu, cuda, auto, ...")
    ] = "cpu",
    as_json: opt.Json = False,
) -> int:
    """Tell from its files whether a checkpoint was abliterated, and along what.

    Exit code 0 if it is clean, 7 if it was edited, 8 if that cannot be told.
    """  # fmt: skip
    from abliterate.checkpoints.checkpoint import find_checkpoint
    from abliterate.cli.commands import find_recorded
    from abliterate.direction import Direction, find_direction, load_direction, save_direction
    from abliterate.errors import UsageError
    from abliterate.run_records import source_of_direction, source_of_edit
    from abliterate.settings import load_settings
    from abliterate.storage.artifacts import check_writable, finite
    from abliterate.storage.ownership import claim_file, has_metadata

    load_settings(None, given)
    if direction is not None:
        find_direction(direction)
    if output is not None:
        if output.is_dir():
            raise UsageError(f"-o {output} is a folder: name a file such as direction.safetensors")
        check_writable(output.parent)
        # A direction that select chose has its position: it is no output of this command.
        claim_file(output, has_metadata("layer", "model", position="None"), "audit -o")
    sources = [None if direction is None else source_of_direction(direction)]
    target = find_checkpoint(checkpoint, given["model"]["revision"])
    other = None
    if base is not None:
        other = find_recorded(base, None, [source_of_edit(target.folder), *sources])
    from abliterate.auditing.report import audit as judge
    from abliterate.models.loading import pick_device
    from abliterate.precision import linear_algebra_device

    place = linear_algebra_device(pick_device(device))
    known = None if direction is None else load_direction(direction)
    found = judge(target, other, known, place)
    document = finite(found.document())
    document["direction"] = None
    if output is not None and found.direction is not None:
        save_direction(output, Direction(found.direction), target.name, target.revision)
        document["direction"] = str(output)
    print_json(document) if as_json else _show(checkpoint, document, found.direction is not None)
    return EXIT_CODES[found.verdict]


def _show(name: str, document: dict[str, Any], has_direction: bool) -> None:
    writers = document["writers"]
    rows = [["verdict", document["verdict"]]]
    if document["evidence"]:
        rows.append(["decided by", document["evidence"]])
    rows.append(["p-value of the writers", f"{writers['p_value']:.1e} (claimed below 1e-07)"])
    if document["verdict"] == "edited":
        removed = document["removed"]
        if removed is not None:
            rows.append(["share removed", f"{removed:.2f}{' (all)' if document['full'] else ''}"])
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
    print_table(name, ["", ""], rows, left=2)
    if document["units"]:
        print_table(
            "units",
            ["unit", "energy along it", "removed", "edited"],
            [
                [u["unit"], f"{u['energy']:.1e}", f"{u['removed']:.2f}", "yes" * u["carries"]]
                for u in document["units"]
            ],
        )
    if document["base"] is not None:
        _show_differences(document["base"])
    for one in writers["set_aside"]:
        channels = one["channels"]
        count = f" ({len(channels)} channels)" if channels else ""
        print_line(f"set aside: {one['reason']}{count}")
    if document["reason"]:
        print_line(f"undecided: {document['reason']}")
    for warning in document["warnings"]:
        print_line(f"note: {warning}")
    if has_direction:
        where = document["direction"]
        print_line(f"direction: {where}" if where else "-o FILE writes the recovered direction")


@opt.command()
def diff(
    a: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.", show_default=False)],
    b: Annotated[str, typer.Argument(help="Another of its architecture.", show_default=False)],
    as_json: opt.Json = False,
) -> None:
    """Compare two checkpoints tensor by tensor: unchanged, rank 1, low rank or dense."""
    from abliterate.checkpoints.checkpoint import find_checkpoint
    from abliterate.storage.artifacts import finite

    pair = find_checkpoint(a), find_checkpoint(b)
    from abliterate.auditing.compare import compare
    from abliterate.auditing.report import comparison_document

    document = finite(comparison_document(compare(*pair)))
    print_json(document) if as_json else _show_differences(document)


def _show_differences(document: dict[str, Any]) -> None:
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
                    f"{t['first']:.3f}",
                    "-" if t["cosine"] is None else f"{t['cosine']:.5f}",
                    "-" if t["scale"] is None else f"{t['scale']:.3f}",
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
