"""Every setting of the pipeline, with the paper's values as defaults.

A configuration file has the tables ``[model]``, ``[chat]``, ``[extract]``, ``[select]``,
``[orthogonalize]`` and ``[evaluate]``; options on the command line win over it. A field is all that
there is to declare: its option appears in the commands that its :class:`Option` names, in the order
of the fields.

A run folder is data, and may come from a stranger: a later stage takes from its record only the
settings that are marked :class:`Recorded` here, which name the experiment. What grants something
(code, addresses, keys, folders to read code from or to write to) or says how a machine is used is
never marked, so that it stands on the command line or in a configuration file or nowhere.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
)

from abliterate.settings.evaluate_section import EvaluateSettings
from abliterate.settings.marks import Follows, Granted, Listed, Needs, Option, Recorded
from abliterate.settings.model_sections import ChatSettings, ModelSettings
from abliterate.settings.section import (
    DIRECTED,
    EDIT,
    EDITING,
    EXTRACT,
    FILTER,
    LATER_HARMFUL,
    LATER_HARMLESS,
    METHOD,
    PROMPTS,
    SELECT,
    SOURCE,
    STORAGE,
    Section,
)
from abliterate.settings.values import (
    check_interpolation,
    rows_or_none,
)

__all__ = [
    "ChatSettings",
    "EvaluateSettings",
    "ExtractSettings",
    "ModelSettings",
    "OrthogonalizeSettings",
    "SelectSettings",
    "Settings",
]


class ExtractSettings(Section):
    """Training prompts and positions (paper, section 2.3)."""

    harmful: Annotated[
        str,
        Recorded(),
        Option(f"Harmful prompts. {SOURCE}", PROMPTS, (*EXTRACT, "verify")),
    ] = "harmful"
    harmless: Annotated[
        str, Recorded(), Option("Harmless prompts, likewise.", PROMPTS, (*EXTRACT, "verify"))
    ] = "harmless"
    n_train: Annotated[int, Recorded(), Option("Training prompts per kind.", PROMPTS, EXTRACT)] = (
        Field(128, ge=1)
    )
    positions: Annotated[
        str,
        Recorded(),
        Listed("those behind the instruction"),
        Option("post-instruction, last, or a list such as -5,-1.", METHOD, EXTRACT),
    ] = "post-instruction"
    filter: Annotated[
        bool, Recorded(), Option(FILTER, PROMPTS, EXTRACT, "--filter/--no-filter")
    ] = True
    refusal_tokens: Annotated[
        tuple[str, ...],
        Recorded(),
        Listed("those that are detected"),
        Option(
            "Token string, id (1234 or id:1234) or preset (llama-2, llama-3, gemma, yi, qwen); "
            "repeatable. "
            "Default: detected.",
            METHOD,
            (*EXTRACT, "evaluate"),
            "--refusal-token",
        ),
    ] = ()
    robust: Annotated[
        Literal["none", "winsor", "median"],
        Option(
            "Means for activations with outliers: winsor (winsorised) or median (geometric). "
            "none: the paper's mean.",
            METHOD,
            (*EXTRACT, "plan"),
        ),
    ] = "none"
    winsor_quantile: Annotated[
        float,
        Needs(("robust",), ("winsor",)),
        Option("Share of the prompts that winsor pulls in at each end.", METHOD, EXTRACT),
    ] = Field(0.05, gt=0, lt=0.5)
    save_activations: Annotated[
        str | None,
        Listed("none"),
        Option(
            "Keep each prompt's vectors for inspect, of all layers or of those given as =3,5-7.",
            METHOD,
            EXTRACT,
            implied="all",
        ),
    ] = None
    activation_positions: Annotated[
        Literal["last", "all"],
        Needs(("save_activations",)),
        Option(
            "last: keep the vectors of the last position. all: of every position.",
            METHOD,
            EXTRACT,
        ),
    ] = "last"


class SelectSettings(Section):
    """Validation prompts and filters (paper, appendix C). Not given: as ``extract`` has them."""

    harmful: Annotated[str | None, Option(LATER_HARMFUL, PROMPTS, ("select",))] = None
    harmless: Annotated[str | None, Option(LATER_HARMLESS, PROMPTS, ("select",))] = None
    n_val: Annotated[int, Option("Validation prompts per kind.", PROMPTS, SELECT)] = Field(32, ge=1)
    filter: Annotated[
        bool,
        Follows("extract"),
        Option(FILTER, PROMPTS, ("run",), "--filter/--no-filter"),
        Option(f"{FILTER} Default: as extract did.", PROMPTS, ("select",)),
    ] = True
    kl_threshold: Annotated[float, Option("Largest KL divergence.", METHOD, SELECT)] = Field(
        0.1, ge=0
    )
    induce_threshold: Annotated[float, Option("Smallest induce score.", METHOD, SELECT)] = 0.0
    prune_layers: Annotated[
        float, Option("Share of the last layers that is left out.", METHOD, SELECT)
    ] = Field(0.2, ge=0, lt=1)
    search: Annotated[
        Literal["staged", "exhaustive"],
        Option(
            "staged: leave out what cannot change the choice. exhaustive: every score, for plots.",
            METHOD,
            SELECT,
        ),
    ] = "staged"
    all_layers: Annotated[
        bool,
        Option("Score the candidates of the left-out layers too, for plots.", METHOD, SELECT),
    ] = False
    kl_on: Annotated[
        str,
        Option(
            "last: KL at the last prompt token. response:N: mean over the first N answer tokens.",
            METHOD,
            SELECT,
        ),
    ] = Field("last", pattern=r"^(last|response:[1-9][0-9]*)$")
    project_harmless: Annotated[
        bool,
        Option(
            "Remove from each candidate what it has along the mean harmless activation.",
            METHOD,
            SELECT,
        ),
        Option(
            "Remove from the run folder's direction what it has along the mean harmless "
            "activation, if select has not.",
            METHOD,
            DIRECTED,
        ),
    ] = False
    project_first_token: Annotated[
        bool,
        Option(
            "Remove from each candidate what it has along the mean residual stream of the prompt's "
            "first token, the attention sink.",
            METHOD,
            SELECT,
        ),
        Option(
            "Remove from the run folder's direction what it has along the mean residual stream of "
            "the prompt's first token, the attention sink, if select has not.",
            METHOD,
            DIRECTED,
        ),
    ] = False
    per_layer: Annotated[
        bool,
        Option(
            "Keep the best candidate of each layer too: --direction RUN is then a direction set. "
            "Scores every candidate.",
            METHOD,
            SELECT,
        ),
    ] = False
    position: Annotated[
        int | None,
        Option(
            "Instead of the run folder's direction a set: the difference of its means at this "
            "position, such as -1, for each layer.",
            METHOD,
            (*DIRECTED, "run"),
        ),
    ] = Field(None, lt=0)
    interpolate: Annotated[
        str | None,
        AfterValidator(check_interpolation),
        Option(
            "linear or spherical: of a set, fill the layers between those that have a direction; "
            "linear:4,10-12: between these.",
            METHOD,
            (*DIRECTED, "run"),
        ),
    ] = None


class OrthogonalizeSettings(Section):
    """The edited checkpoint; see ``abliterate.editing.options.EditOptions``."""

    overwrite: Annotated[
        bool,
        Granted(),
        Option(
            "Replace the output, if it is an edited checkpoint of ours and holds nothing else.",
            METHOD,
            EDITING,
        ),
    ] = False
    allow_leak: Annotated[
        float | None,
        Option(
            "Edit an architecture that cannot be made exact, if no more than this share of the "
            "residual stream remains along the direction.",
            METHOD,
            EDITING,
        ),
    ] = Field(default=None, ge=0)
    layers: Annotated[
        str | None,
        Listed("all"),
        Option("Blocks to edit: 10-25, or 3,5-7.", EDIT, EDITING),
    ] = None
    components: Annotated[
        str | None,
        Listed("all"),
        Option(
            "Any of attention, mlp, embedding (or mixer, expert, position, other), with commas.",
            EDIT,
            EDITING,
        ),
    ] = None
    scale: Annotated[float, Option("Share of the direction to remove.", EDIT, EDITING)] = 1.0
    layer_scale: Annotated[
        str | None,
        Option(
            "JSON or TOML file of weights that multiply --scale, by layer and component.",
            EDIT,
            EDITING,
        ),
    ] = None
    norm_preserve: Annotated[
        Literal["rows", "columns"] | None,
        BeforeValidator(rows_or_none),
        Option(
            "rows (if nothing follows): each row as it is stored keeps its norm, and matrices "
            "whose rows do not lie along the stream leak along the direction again. columns: what "
            "each input writes keeps its norm, and nothing is left along it.",
            EDIT,
            EDITING,
            implied="rows",
        ),
    ] = None
    tied_embeddings: Annotated[
        Literal["untie", "share", "skip"],
        Option(
            "untie (the head keeps the original), share (both are edited) or skip (neither).",
            EDIT,
            EDITING,
        ),
    ] = "untie"
    requantize: Annotated[
        bool,
        Option("Store edited FP8, INT8 and MXFP4 tensors in their format again.", STORAGE, EDITING),
    ] = False
    dequantize: Annotated[bool, Option("Write them as bfloat16.", STORAGE, EDITING)] = False
    add: Annotated[
        float | None,
        Option(
            "Bake in the addition of this multiple of the direction instead, as a bias.",
            EDIT,
            EDITING,
        ),
    ] = None
    as_lora: Annotated[bool, Option("Write a PEFT adapter instead.", EDIT, EDITING)] = False
    device: Annotated[str, Option("Where to compute: cpu, cuda, ...", STORAGE, EDITING)] = "cpu"
    jobs: Annotated[
        int | None, Option("Cores to use, up to 16. Default: all.", STORAGE, EDITING)
    ] = Field(None, ge=1)
    leave_behind: Annotated[
        tuple[str, ...],
        Option(
            "Leave a safetensors file beside the weights behind (a draft head; a pattern may name "
            "several). Those that hold the model's own weights always are; repeatable.",
            STORAGE,
            EDITING,
        ),
    ] = ()
    low_disk: Annotated[
        bool,
        Option(
            "Fetch the shards of a hub id one by one; each is dropped once it is edited.",
            STORAGE,
            EDITING,
        ),
    ] = False


class Settings(Section):
    """All settings of a run."""

    model: ModelSettings = ModelSettings()
    chat: ChatSettings = ChatSettings()
    extract: ExtractSettings = ExtractSettings()
    select: SelectSettings = SelectSettings()
    orthogonalize: OrthogonalizeSettings = OrthogonalizeSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
