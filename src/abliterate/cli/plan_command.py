"""The command plan: what the stages would take, before anything is loaded."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from abliterate.capacity.hardware import CARDS, COMPUTES, READS, parse_hardware
from abliterate.cli import options as opt
from abliterate.console import print_json, print_line, print_table
from abliterate.errors import UsageError
from abliterate.settings import load_settings, parse_memory


@opt.command(last=("dtype", "revision", "trust_remote_code"))
def plan(
    *,
    model: opt.Model,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="Main memory. Default: what is free.", show_default=False),
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            "--gpu-memory",
            help="Memory of one accelerator, 0 for none. Default: what is there.",
            show_default=False,
        ),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            "--machine",
            help="Machine that is not at hand, such as 24GB, 8x80GB or 2x8xH100: makers' figures. "
            f"Cards: {', '.join(CARDS)}.",
            show_default=False,
        ),
    ] = None,
    n_train: Annotated[int, typer.Option(help="Training prompts per kind.")] = 128,
    n_val: Annotated[int, typer.Option(help="Validation prompts per kind.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens of a prompt, template included.")] = 32,
    positions: Annotated[int, typer.Option(help="Positions that are looked at.")] = 5,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 512,
    given: opt.Given,
    as_json: opt.Json = False,
) -> None:
    """Estimate memory, time and passes of each stage from config.json and headers alone."""
    if min(n_train, n_val, tokens, positions, answer_tokens) < 1:
        raise UsageError(
            "--n-train, --n-val, --tokens, --positions and --answer-tokens must be at least 1"
        )
    if machine is not None and gpu_memory is not None:
        raise UsageError("--machine names the accelerators: leave out --gpu-memory")
    hardware = None if machine is None else parse_hardware(machine)
    from abliterate.checkpoints.checkpoint import find_checkpoint

    asked = given["model"]
    robust = load_settings(None, given).extract.robust
    given_memory = None if memory is None else parse_memory(memory, "--memory")
    given_gpu = None
    if gpu_memory is not None:
        given_gpu = 0 if gpu_memory.strip() == "0" else parse_memory(gpu_memory, "--gpu-memory")
    checkpoint = find_checkpoint(model, asked["revision"], need="headers")
    from abliterate.capacity.resource_plan import plan_resources

    activations = asked["activation_memory"]
    document = plan_resources(
        checkpoint,
        memory=given_memory,
        gpu_memory=given_gpu,
        hardware=hardware,
        n_train=n_train,
        n_val=n_val,
        tokens=tokens,
        positions=positions,
        answer_tokens=answer_tokens,
        activation_memory=(
            parse_memory(activations, "--activation-memory") if activations else None
        ),
        dtype=asked["dtype"] or "auto",
        robust=robust != "none",
        trust_remote_code=bool(asked["trust_remote_code"]),
    )
    document = {**document, "model": model}
    if as_json:
        return print_json(document)
    return _show(document)


def _show(document: Any) -> None:
    machine, small = document["machine"], document["bytes_loaded_in"]
    print_table(
        f"{document['model']} ({document['model_type']})",
        ["", "value"],
        [
            ["parameters", f"{document['parameters']:,}"],
            ["of which a token passes, in blocks", f"{document['active_parameters']:,}"],
            ["weights in memory / on disk",
             f"{_size(document['bytes'])} / {_size(document['bytes_on_disk'])}"],
            *([[f"weights with --load-in {' / '.join(small)}",
                " / ".join(map(_size, small.values()))]] if small else []),
            ["largest of the blocks",
             f"{_size(document['largest_block'])} of {document['n_layers']}"],
            ["memory / accelerator", f"{_size(machine['memory'])} / {_cards(machine)}"],
            ["disk / copy in memory",
             f"{_size(machine['disk'])}/s / {_size(machine['copy'])}/s"],
            ["arithmetic of layers",
             "not measured" if machine["matmul"] is None else f"{machine['matmul']:.2e} FLOP/s"],
            ["mode", document["mode"] + _over(document["spread"])],
        ],
    )  # fmt: skip
    print_table(
        "stages",
        ["stage", "mode", "passes", "read", "FLOPs", "peak memory", "time"],
        [
            [
                stage["name"],
                stage["mode"],
                str(stage["passes"]),
                _size(stage["bytes_read"]),
                f"{stage['flops']:.1e}",
                _size(stage["memory"]),
                _time(stage["seconds"]),
            ]
            for stage in document["stages"]
        ],
        left=2,
    )
    lacking = [stage for stage in document["stages"] if stage["memory"] > machine["memory"]]
    if lacking and not machine["gpu_memory"]:
        print_line(
            f"too little memory for {', '.join(stage['name'] for stage in lacking)}: at least "
            f"{_size(max(stage['memory'] for stage in lacking))} are needed, even so"
        )
    print_line(f"to start: {document['start']}")
    if document["spread"]["why"] and machine["gpu_memory"]:
        print_line(f"{document['spread']['way']}: {document['spread']['why']}")
    if document["spread"]["way"] != "offload":
        print_line(
            f"evaluate: as if every answer had {document['workload']['answer']} tokens "
            "(--answer-tokens); select: as if no search were cut short"
        )
    if document["kept_activations"]:
        print_line(
            f"extract --robust: {_size(document['kept_activations'])} of main memory for all "
            "activations of a kind of prompt"
        )
    if machine["assumed"]:
        print_line(
            f"assumed, not measured: a card of {machine['assumed']}, {COMPUTES:.0%} of its maker's "
            f"arithmetic and {READS:.0%} of its bandwidth, a disk of {_size(machine['disk'])}/s"
        )
    elif machine["matmul"] is None:
        print_line(
            "times: run plan on a machine with the accelerator, whose speed is measured, or name "
            "one with --machine"
        )


def _cards(machine: Any) -> str:
    count = machine["cards"] * machine["nodes"]
    return (f"{count} x " if count > 1 else "") + _size(machine["gpu_memory"])


def _over(spread: Any) -> str:
    count = spread["parts"] * spread["copies"]
    return f", {count} devices" if count > 1 else ""


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds / 86400:.1f} days"
