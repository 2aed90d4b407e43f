"""audit: was a checkpoint abliterated, and along what?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abliterate.cli import audit_prompts
from abliterate.cli import options as opt
from abliterate.cli.diff_command import show_differences
from abliterate.console import print_json, print_line, print_table

if TYPE_CHECKING:
    from abliterate.models.loading import Checkpoint
    from abliterate.run_records import HubSource

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
            help="Write the recovered direction here (safetensors; of several one, and all of them "
            "as 'subspace' [k, d_model]), or as FILE.html the verdict and a strip of what was "
            "edited; replaces an earlier one of audit, nothing else.",
            show_default=False,
        ),
    ] = None,
    save_directions: Annotated[
        Path | None,
        typer.Option(
            "--save-directions",
            help="With --base: write what each layer lost here (safetensors 'directions', "
            "[n_layers, d_model]); replaces an earlier one of audit, nothing else.",
            show_default=False,
        ),
    ] = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Also list every unit and tensor.")
    ] = False,
    prompts: Annotated[
        bool,
        typer.Option(
            "--prompts",
            help="Also run the model: what it does with harmful and harmless prompts. The verdict "
            "rests on the weights alone.",
        ),
    ] = False,
    harmful: audit_prompts.Harmful = None,
    harmless: audit_prompts.Harmless = None,
    n_prompts: audit_prompts.Count = None,
    refusal_token: audit_prompts.Tokens = None,
    given: opt.Given,
    device: Annotated[
        str, typer.Option("--device", help="Where to compute: cpu, cuda, auto, ...")
    ] = "cpu",
    as_json: opt.Json = False,
) -> int:
    """Tell from its files whether a checkpoint was abliterated, and along what.

    Exit code 0 if it is clean, 7 if it was edited, 8 if that cannot be told.
    """  # fmt: skip
    from abliterate.direction import Direction, save_direction
    from abliterate.direction_loading import find_direction, load_direction
    from abliterate.errors import UsageError
    from abliterate.extras import import_extra
    from abliterate.run_records import source_of_direction
    from abliterate.settings import load_settings
    from abliterate.storage.artifacts import check_writable, finite, write_atomically
    from abliterate.storage.ownership import claim_file, has_metadata, is_page

    settings = load_settings(None, given)
    if not prompts and any(value is not None for value in given["chat"].values()):
        raise UsageError("the options of the chat format go with --prompts: give both, or neither")
    asked = audit_prompts.chosen(prompts, harmful, harmless, n_prompts, refusal_token or ())
    if direction is not None:
        find_direction(direction)
    as_page = output is not None and output.suffix.lower() in (".html", ".htm")
    if output is not None:
        if as_page:
            import_extra("plotly.graph_objects", "-o FILE.html", "plotly", "report")
        if output.is_dir():
            raise UsageError(f"-o {output} is a folder: name a file such as direction.safetensors")
        check_writable(output.parent)
        # A direction that select chose has its position: it is no output of this command.
        kind = is_page if as_page else has_metadata("layer", "model", position="None")
        claim_file(output, kind, "audit -o")
    if save_directions is not None:
        if base is None:
            raise UsageError("--save-directions needs --base: what each layer lost is told by it")
        if save_directions.is_dir():
            raise UsageError(
                f"--save-directions {save_directions} is a folder: name a file such as "
                "directions.safetensors"
            )
        if output is not None and save_directions.absolute() == output.absolute():
            raise UsageError(f"-o and --save-directions both name {output}: name two files")
        check_writable(save_directions.parent)
        claim_file(
            save_directions,
            has_metadata("edit", "layer_scales", "model"),
            "audit --save-directions",
        )
    sources = [None if direction is None else source_of_direction(direction)]
    with ExitStack() as temporary:
        target, other = _open(checkpoint, base, given["model"]["revision"], sources, temporary)
        from abliterate.auditing.direction_sets import save_direction_set
        from abliterate.auditing.report import audit as judge
        from abliterate.models.loading import pick_device
        from abliterate.precision import linear_algebra_device

        place = linear_algebra_device(pick_device(device))
        known = None if direction is None else load_direction(direction)
        # What cannot be run is refused before the weights are read.
        seen = None if asked is None else asked.gather(target, other, device, settings.chat)
        found = judge(target, other, known, place)
        document = finite(found.document())
        document["activations"] = None
        if seen is not None and asked is not None:
            document["activations"] = finite(asked.document(seen, known, found.direction))
        document["direction"] = None
        document["subspace"] = None if found.subspace is None else list(found.subspace.shape)
        if output is not None and as_page:
            from abliterate.report.audit_page import audit_page

            write_atomically(output, audit_page(checkpoint, document).encode())
        elif output is not None and found.direction is not None:
            save_direction(
                output,
                Direction(found.direction),
                target.name,
                target.revision,
                subspace=found.subspace,
            )
            document["direction"] = str(output)
        document["directions"] = None
        if save_directions is not None and found.comparison is not None and found.comparison.form:
            save_direction_set(save_directions, found.comparison.form, target)
            document["directions"] = str(save_directions)
    if as_json:
        print_json(document)
    else:
        _show(checkpoint, document, found.direction is not None and not as_page, tensors)
        if as_page:
            print_line(f"page: {output}")
    return EXIT_CODES[found.verdict]


def _open(
    name: str,
    base: str | None,
    revision: str | None,
    sources: Sequence[HubSource | None],
    temporary: ExitStack,
) -> tuple[Checkpoint, Checkpoint | None]:
    """The checkpoint and its base; an adapter is merged into a copy of that, for as long."""
    from abliterate.auditing.adapters import is_adapter_folder, merge_adapter
    from abliterate.checkpoints.checkpoint import find_checkpoint
    from abliterate.cli.commands import find_recorded
    from abliterate.run_records import source_of_edit

    folder = Path(name).expanduser()
    if base is None or not is_adapter_folder(folder):
        target = find_checkpoint(name, revision)
        known = [source_of_edit(target.folder), *sources]
        return target, None if base is None else find_recorded(base, None, known)
    other = find_recorded(base, None, [source_of_edit(folder), *sources])
    room = Path(temporary.enter_context(TemporaryDirectory(prefix="abliterate-merged-")))
    return merge_adapter(folder, name, other, room), other


def _show(name: str, document: dict[str, Any], has_direction: bool, tensors: bool) -> None:
    """The verdict and why, a summary; with ``tensors`` the long tables as well."""
    from abliterate.report.audit_page import KINDS, facts, kind_rows

    base = document["base"]
    print_line(f"{name}: {document['verdict']}")
    print_line(document["why"])
    print_table("", ["", ""], facts(document), left=2)
    if document["activations"] is not None:
        audit_prompts.show(document["activations"])
    if base is not None:
        _show_summary(base)
    elif document["units"]:
        print_table("edited", KINDS, kind_rows(document["units"]), left=2)
    if tensors and document["units"]:
        print_table(
            "units",
            ["unit", "energy along it", "removed", "edited"],
            [
                [u["unit"], f"{u['energy']:.1e}", f"{u['removed']:z.2f}", "yes" * u["carries"]]
                for u in document["units"]
            ],
        )
    if tensors and base is not None:
        show_differences(base)
    for one in (*document["writers"]["set_aside"], *document["readers"]["set_aside"]):
        channels = one["channels"]
        count = f" ({len(channels)} channels)" if channels else ""
        print_line(f"set aside: {one['reason']}{count}")
    for warning in document["warnings"]:
        print_line(f"note: {warning}")
    if has_direction:
        where, shape = document["direction"], document["subspace"]
        text = f"direction: {where}" if where else "-o FILE writes the recovered direction"
        if shape is not None:
            text += f", one of {shape[0]}, and all of them as 'subspace' {shape}"
        print_line(text)
    if document["directions"]:
        print_line(f"directions by layer: {document['directions']}")
    if not tensors and (base is not None or document["units"]):
        print_line("--tensors lists each of them")


def _show_summary(base: dict[str, Any]) -> None:
    """What differs from the base, by component and range of layers."""
    from abliterate.report.audit_page import SUMMARY, summary_rows

    if rows := summary_rows(base):
        print_table("differences from the base", SUMMARY, rows, left=3)
    same = sum(t["state"] == "unchanged" for t in base["tensors"])
    print_line(f"unchanged: {same} tensors")
    for label in ("missing", "added"):
        if base[label]:
            print_line(f"{label}: {len(base[label])} tensors")
