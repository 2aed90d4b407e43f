"""The commands that look at checkpoints without changing them: verify and writers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from abliterate.cli import options as opt
from abliterate.console import command, print_json, print_line, print_table
from abliterate.errors import CheckpointError, NeedsWeightsError, UsageError
from abliterate.settings import load_settings, refuse_without

# What --forward alone looks at.
_OF_FORWARD = (
    "extract.harmful",
    "extract.harmless",
    "model.device",
    "model.offload",
    "model.activation_memory",
)


@opt.command(last=("revision", "trust_remote_code"))
def verify(
    *,
    edited: Annotated[str, typer.Argument(help="The edited checkpoint.", show_default=False)],
    direction: opt.Direction,
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            help="What it was made from: edited as its record says, all else its bytes.",
            show_default=False,
        ),
    ] = None,
    forward: Annotated[
        bool, typer.Option("--forward", help="Also measure the leak on real prompts.")
    ] = False,
    n_prompts: Annotated[
        int | None,
        typer.Option(help="Prompts per kind for --forward. Default: 16.", show_default=False),
    ] = None,
    given: opt.Given,
    as_json: opt.Json = False,
) -> int:
    """Prove from its files that a checkpoint cannot write along the direction.

    Exit code 0 if every check holds, 6 if one fails.
    """
    if n_prompts is not None and n_prompts < 1:
        raise UsageError(f"--n-prompts must be at least 1, not {n_prompts}")
    if source is None:
        refuse_without("--source", given, "model.revision")
    if not forward:
        refuse_without("--forward", given, *_OF_FORWARD, n_prompts=n_prompts)
    from dataclasses import replace

    from abliterate.auditing.adapters import is_adapter_folder
    from abliterate.checkpoints.checkpoint import find_checkpoint
    from abliterate.cli.commands import find_recorded
    from abliterate.direction_loading import find_direction, load_directions
    from abliterate.projection import Projection
    from abliterate.run_records import source_of_direction, source_of_edit

    load_settings(None, given)
    model, prompts = given["model"], given["extract"]
    trust = bool(model["trust_remote_code"])
    if is_adapter_folder(Path(edited)):
        audit = command("audit", edited, "--base", source or "MODEL", "--direction", direction)
        raise CheckpointError(
            f"{edited} holds a PEFT adapter, and verify takes edited checkpoints: `{audit}` says "
            "what it does to its base"
        )
    checkpoint = find_checkpoint(edited, need="copy")
    chosen = given["select"]
    find_direction(direction, chosen["position"])
    base = None
    if source is not None:
        records = [source_of_edit(checkpoint.folder), source_of_direction(direction)]
        base = find_recorded(source, model["revision"], records, trust, need="copy")
    vector = load_directions(
        direction, Projection.recorded(chosen), chosen["position"], chosen["interpolate"]
    )
    from abliterate.checkpoints.shards import read_shards
    from abliterate.inference.in_memory import engine_of
    from abliterate.offload import OpenOptions, choose_opener
    from abliterate.prompts.chat_template import encode_somehow
    from abliterate.prompts.sampling import load_prompts
    from abliterate.run_folder import batches_of, computes
    from abliterate.run_stage import computed_with
    from abliterate.storage.artifacts import versions
    from abliterate.verification import hook_distance, hooks_of, leak_bound, measure_leak
    from abliterate.verification import verify as check

    result, made = check(checkpoint, vector, base, trust), dict[str, Any]()
    if forward:
        options = OpenOptions(
            model["device"] or "auto",
            "float32",
            trust,
            model["offload"],
            model["activation_memory"],
        )
        texts = [
            prompt.text
            for kind in (prompts["harmful"] or "harmful", prompts["harmless"] or "harmless")
            for prompt in load_prompts(kind, "test", n_prompts or 16, option="--n-prompts")
        ]
        opener, hooks = choose_opener(checkpoint, options), None
        if base is not None:  # one model in memory at a time
            original = opener.open(base)
            hooks = hooks_of(original, vector, encode_somehow(original.tokenizer, texts))
            engine_of(original).close()
            del original
        loaded = opener.open(checkpoint)
        ids = encode_somehow(loaded.tokenizer, texts)
        result = replace(
            result,
            leak=measure_leak(loaded, vector, ids),
            leak_bound=leak_bound(read_shards(checkpoint.folder)),
            distance=hooks and hook_distance(hooks, loaded, ids),
        )
        made = {
            "computed_with": computed_with("auto", 1) | computes(loaded) | batches_of(loaded),
            "versions": versions(),
        }
    if as_json:
        print_json({"passed": result.passed} | asdict(result) | made)
    else:
        _show_verification(edited, result, base is not None)
    return 0 if result.passed else 6


def _show_verification(edited: str, result: Any, compared: bool) -> None:
    dirty = [writer for writer in result.writers if writer.fails]
    worst = max((writer.residual for writer in result.writers), default=0.0)
    checked = "writers edited as declared" if compared else "writers clean"
    which = "its layer's direction" if result.by_layer else "the direction"
    rows = [
        [checked, f"{len(result.writers) - len(dirty)} of {len(result.writers)}"],
        [f"largest share along {which}, |r'E|/|E|", f"{worst:.1e}"],
    ]
    rows += [
        [f"other tensors {label}", str(len(getattr(result, label)))]
        for label in (("changed", "missing", "added") if compared else ())
    ]
    if result.leak is not None:
        rows.append(["leak on prompts", f"{result.leak:.1e} (bound {result.leak_bound:.0e})"])
    if (distance := result.distance) is not None:
        rows.append(
            [
                "logits, edit against hooks",
                f"{distance.logits:.2g} apart (ablation moves them by {distance.moved:.2g}; KL "
                f"{distance.kl:.2g})",
            ]
        )
    print_table(edited, ["check", "result"], rows)
    for sentence in result.files[:20]:
        print_line(f"wrong: {sentence}")
    for writer in dirty[:20]:
        if writer.problem:
            print_line(f"not the edit: {writer.name} {writer.problem}")
        else:
            print_line(
                f"still writes: {writer.name} ({writer.residual:.1e}, rounding explains "
                f"{writer.bound:.1e})"
            )
    for label in ("changed", "missing", "added"):
        for name in getattr(result, label)[:20]:
            print_line(f"{label}: {name}")
    for note in result.notes:
        print_line(f"note: {note}")
    for limit in result.limits:
        print_line(f"the edit's own record: {limit}")
    print_line("passed" if result.passed else "FAILED")


@opt.command()
def writers(
    model: opt.Model,
    given: opt.Given,
    as_json: opt.Json = False,
) -> None:
    """List what writes to the residual stream, from config and headers alone."""
    from abliterate.checkpoints.checkpoint import find_checkpoint

    revision, trust = given["model"]["revision"], bool(given["model"]["trust_remote_code"])
    checkpoint = find_checkpoint(model, revision, need="headers")
    from abliterate.editing.writer_table import describe_writers

    try:
        document = describe_writers(checkpoint, trust)
    except NeedsWeightsError:
        document = describe_writers(find_checkpoint(model, revision), trust)
    if as_json:
        return print_json(document)
    rows = [
        [
            "-" if row["layer"] is None else str(row["layer"]),
            row["kind"],
            _disk_names(row["tensors"] or [row["parameter"]]),
            "x".join(map(str, row["shape"])),
            str(row["axis"]),
            row["direction"],
        ]
        for row in document["writers"]
    ]
    print_table(
        f"{document['model_type']}: {len(rows)} writers, d_model {document['d_model']}",
        ["block", "kind", "tensor", "shape", "axis", "direction"],
        rows,
        left=6,
    )
    if document["untouched"]:
        print_line(f"no part of the language model: {', '.join(document['untouched'])}")
    verdict = "exact" if document["exact"] else f"not exact: {document['reason']}"
    print_line(f"{verdict} (leak on a shrunken random copy: {document['leak']:.1e})")
    return None


def _disk_names(names: list[str]) -> str:
    if len(names) <= 2:
        return ", ".join(names)
    return f"{names[0]} ... {Path(names[-1]).name} ({len(names)})"
