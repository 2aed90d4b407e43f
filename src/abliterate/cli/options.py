"""The command line's options, each declared once; defaults shown are those of the settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from abliterate.settings import Settings

# The one option whose value may be left out; see ``spell_out``.
SAVE_ACTIVATIONS = "--save-activations"

_MODEL, _CHAT, _PROMPTS, _METHOD = "Model", "Chat format", "Prompts", "Method"


def setting_option(key: str, flags: tuple[str, ...], help: str, panel: str) -> Any:
    """An option that overrides the setting ``table.key``."""
    table, name = key.split(".")
    section = Settings.model_fields[table].default
    default = getattr(section, name)
    shown: bool | str = False if default in (None, "", (), {}) else str(default)
    # Help texts are rich markup: brackets of the source grammar are none.
    return typer.Option(*flags, help=escape(help), show_default=shown, rich_help_panel=panel)


def spell_out(argv: Sequence[str]) -> list[str]:
    """The arguments with ``--save-activations`` as ``=all``: typer has no optional values."""
    end = list(argv).index("--") if "--" in argv else len(argv)
    return [
        f"{arg}=all" if arg == SAVE_ACTIVATIONS and at < end else arg for at, arg in enumerate(argv)
    ]


Model = Annotated[str, typer.Argument(help="Checkpoint folder or hub id.", show_default=False)]
RunOut = Annotated[
    Path, typer.Option("-o", "--output", help="Run folder to write.", show_default=False)
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", help="TOML file of settings; options win over it.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress, warnings only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and library logs.")]

Revision = Annotated[
    str | None,
    setting_option("model.revision", ("--revision",), "Hub branch, tag or commit.", _MODEL),
]
Device = Annotated[
    str | None,
    setting_option("model.device", ("--device",), "auto, cpu, cuda, cuda:1, mps, ...", _MODEL),
]
DeviceMap = Annotated[
    str | None,
    setting_option(
        "model.device_map",
        ("--device-map",),
        "Spread the model over this machine's devices: auto, or JSON of devices by module.",
        _MODEL,
    ),
]
TensorParallel = Annotated[
    bool | None,
    setting_option(
        "model.tensor_parallel",
        ("--tensor-parallel/--no-tensor-parallel",),
        "Under torchrun: every rank holds a part of each matrix.",
        _MODEL,
    ),
]
Dtype = Annotated[
    str | None,
    setting_option(
        "model.dtype",
        ("--dtype",),
        "auto, float32, bfloat16 or float16. auto: the checkpoint's own; float32 on a CPU.",
        _MODEL,
    ),
]
BatchSize = Annotated[
    str | None,
    setting_option(
        "model.batch_size", ("--batch-size",), "Prompts per forward pass, or auto.", _MODEL
    ),
]
Offload = Annotated[
    bool | None,
    setting_option(
        "model.offload",
        ("--offload/--no-offload",),
        "Stream the layers from disk, with all prompts at once. Default: if the weights do not "
        "fit into memory.",
        _MODEL,
    ),
]
ActivationMemory = Annotated[
    str | None,
    setting_option(
        "model.activation_memory",
        ("--activation-memory",),
        "Memory for activations under --offload, such as 8GB; more goes to mapped files. "
        "Default: half of what is free.",
        _MODEL,
    ),
]
TrustRemoteCode = Annotated[
    bool | None,
    setting_option(
        "model.trust_remote_code",
        ("--trust-remote-code",),
        "Run the Python code that the checkpoint brings along.",
        _MODEL,
    ),
]
Seed = Annotated[int | None, setting_option("model.seed", ("--seed",), "Of all sampling.", _MODEL)]
System = Annotated[
    str | None, setting_option("chat.system", ("--system",), "System message.", _CHAT)
]
TemplateKwargs = Annotated[
    str | None,
    setting_option(
        "chat.template_kwargs",
        ("--chat-template-kwargs",),
        "JSON object of chat template variables.",
        _CHAT,
    ),
]
ResponsePrefix = Annotated[
    str | None,
    setting_option(
        "chat.response_prefix",
        ("--response-prefix",),
        "Text that the assistant's turn starts with.",
        _CHAT,
    ),
]

_SOURCE = "Set name, file or org/name[/config][@revision][:split], each with optional [column]."
Harmful = Annotated[
    str | None,
    setting_option("extract.harmful", ("--harmful",), f"Harmful prompts. {_SOURCE}", _PROMPTS),
]
Harmless = Annotated[
    str | None,
    setting_option("extract.harmless", ("--harmless",), "Harmless prompts, likewise.", _PROMPTS),
]
LaterHarmful = Annotated[
    str | None,
    typer.Option(
        "--harmful",
        help="Harmful prompts. Default: what extract used.",
        show_default=False,
        rich_help_panel=_PROMPTS,
    ),
]
LaterHarmless = Annotated[
    str | None,
    typer.Option(
        "--harmless",
        help="Harmless prompts. Default: what extract used.",
        show_default=False,
        rich_help_panel=_PROMPTS,
    ),
]
NTrain = Annotated[
    int | None,
    setting_option("extract.n_train", ("--n-train",), "Training prompts per kind.", _PROMPTS),
]
NVal = Annotated[
    int | None,
    setting_option("select.n_val", ("--n-val",), "Validation prompts per kind.", _PROMPTS),
]
NTest = Annotated[
    int | None,
    setting_option(
        "evaluate.n_test", ("--n-test",), "Test prompts per kind. Default: all.", _PROMPTS
    ),
]
Filter = Annotated[
    bool | None,
    setting_option(
        "extract.filter",
        ("--filter/--no-filter",),
        "Drop harmful prompts that are answered and harmless ones that are refused.",
        _PROMPTS,
    ),
]
Positions = Annotated[
    str | None,
    setting_option(
        "extract.positions",
        ("--positions",),
        "post-instruction, last, or a list such as -5,-1.",
        _METHOD,
    ),
]
RefusalToken = Annotated[
    list[str] | None,
    setting_option(
        "extract.refusal_tokens",
        ("--refusal-token",),
        "Token string, id or preset (llama-2, llama-3, gemma, yi, qwen); repeatable. "
        "Default: detected.",
        _METHOD,
    ),
]
SaveActivations = Annotated[
    str | None,
    setting_option(
        "extract.save_activations",
        (SAVE_ACTIVATIONS,),
        "Keep each prompt's vectors for inspect, of all layers or of those given as =3,5-7.",
        _METHOD,
    ),
]
ActivationPositions = Annotated[
    str | None,
    setting_option(
        "extract.activation_positions",
        ("--activation-positions",),
        "last: keep the vectors of the last position. all: of every position.",
        _METHOD,
    ),
]
KlThreshold = Annotated[
    float | None,
    setting_option("select.kl_threshold", ("--kl-threshold",), "Largest KL divergence.", _METHOD),
]
InduceThreshold = Annotated[
    float | None,
    setting_option(
        "select.induce_threshold", ("--induce-threshold",), "Smallest induce score.", _METHOD
    ),
]
PruneLayers = Annotated[
    float | None,
    setting_option(
        "select.prune_layers",
        ("--prune-layers",),
        "Share of the last layers that is left out.",
        _METHOD,
    ),
]
SearchKind = Annotated[
    str | None,
    setting_option(
        "select.search",
        ("--search",),
        "staged: leave out what cannot change the choice. exhaustive: every score, for plots.",
        _METHOD,
    ),
]
AllLayers = Annotated[
    bool | None,
    setting_option(
        "select.all_layers",
        ("--all-layers",),
        "Score the candidates of the left-out layers too, for plots.",
        _METHOD,
    ),
]
KlOn = Annotated[
    str | None,
    setting_option(
        "select.kl_on",
        ("--kl-on",),
        "last: KL at the last prompt token. response:N: mean over the first N answer tokens.",
        _METHOD,
    ),
]
MaxNewTokens = Annotated[
    int | None,
    setting_option("evaluate.max_new_tokens", ("--max-new-tokens",), "Longest answer.", _METHOD),
]
Overwrite = Annotated[
    bool | None,
    setting_option(
        "orthogonalize.overwrite",
        ("--overwrite",),
        "Replace the output, if it is an edited checkpoint of ours and holds nothing else.",
        _METHOD,
    ),
]
AllowLeak = Annotated[
    float | None,
    setting_option(
        "orthogonalize.allow_leak",
        ("--allow-leak",),
        "Edit an architecture that cannot be made exact, if no more than this share of the "
        "residual stream remains along the direction.",
        _METHOD,
    ),
]
_EDIT = "Other edits than the paper's"
Layers = Annotated[
    str | None,
    setting_option(
        "orthogonalize.layers", ("--layers",), "Blocks to edit: 10-25, or 3,5-7.", _EDIT
    ),
]
Components = Annotated[
    str | None,
    setting_option(
        "orthogonalize.components",
        ("--components",),
        "Any of attention, mlp, embedding (or mixer, expert, position, other), with commas.",
        _EDIT,
    ),
]
Scale = Annotated[
    float | None,
    setting_option("orthogonalize.scale", ("--scale",), "Share of the direction to remove.", _EDIT),
]
NormPreserve = Annotated[
    bool | None,
    setting_option(
        "orthogonalize.norm_preserve", ("--norm-preserve",), "Rows keep their norm.", _EDIT
    ),
]
TiedEmbeddings = Annotated[
    str | None,
    setting_option(
        "orthogonalize.tied_embeddings",
        ("--tied-embeddings",),
        "untie (the head keeps the original), share (both are edited) or skip (neither).",
        _EDIT,
    ),
]
Add = Annotated[
    float | None,
    setting_option(
        "orthogonalize.add",
        ("--add",),
        "Bake in the addition of this multiple of the direction instead, as a bias.",
        _EDIT,
    ),
]
AsLora = Annotated[
    bool | None,
    setting_option("orthogonalize.as_lora", ("--as-lora",), "Write a PEFT adapter instead.", _EDIT),
]
_STORAGE = "Formats and machine"
Requantize = Annotated[
    bool | None,
    setting_option(
        "orthogonalize.requantize",
        ("--requantize",),
        "Store edited FP8 and MXFP4 tensors in their format again.",
        _STORAGE,
    ),
]
Dequantize = Annotated[
    bool | None,
    setting_option(
        "orthogonalize.dequantize", ("--dequantize",), "Write them as bfloat16.", _STORAGE
    ),
]
EditDevice = Annotated[
    str | None,
    setting_option(
        "orthogonalize.device", ("--device",), "Where to compute: cpu, cuda, ...", _STORAGE
    ),
]
Jobs = Annotated[
    int | None,
    setting_option(
        "orthogonalize.jobs", ("--jobs",), "Cores to use, up to 16. Default: all.", _STORAGE
    ),
]
LowDisk = Annotated[
    bool | None,
    setting_option(
        "orthogonalize.low_disk",
        ("--low-disk",),
        "Fetch the shards of a hub id one by one; each is dropped once it is edited.",
        _STORAGE,
    ),
]
DirectionFrom = Annotated[
    str | None,
    typer.Option(
        "--direction",
        help="Run folder or safetensors file with a tensor 'direction'.",
        show_default=False,
    ),
]
