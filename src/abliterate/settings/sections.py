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

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    field_validator,
)

from abliterate.settings.marks import Granted, Option, Recorded
from abliterate.settings.values import (
    check_assignments,
    check_attention,
    check_batch_size,
    check_date,
    check_memory,
    check_revision,
    parse_assignment,
    parse_json_object,
    public_server,
    public_url,
    read_template,
    rows_or_none,
    well_formed,
)

# Attributes have the whole address; what is dumped into records has no secret.
_Endpoint = Annotated[str, PlainSerializer(public_url)]
_ServerSpec = Annotated[str, PlainSerializer(public_server)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    _unicode = field_validator("*")(well_formed)


# The headings of --help.
_MODEL, _CHAT, _PROMPTS, _METHOD = "Model", "Chat format", "Prompts", "Method"
_EDIT, _STORAGE = "Other edits than the paper's", "Formats and machine"
_CAPABILITY, _JUDGE, _REFUSAL = "Capability", "Judge", "What counts as a refusal"
_SERVER = "Answers made by a server"

# Commands that have the same options.
_STAGES = ("extract", "select", "evaluate", "run")
_WITH_CHECKPOINT = (
    "orthogonalize",
    "verify",
    "writers",
    "plan",
    "inspect",
    "trace",
    "fragility",
    "chat",
)
_EXTRACT, _SELECT = ("extract", "run"), ("select", "run")
_EDITING, _EVALUATE, _SCORE = ("orthogonalize",), ("evaluate",), ("evaluate", "score")
_SCORED = ("evaluate", "run", "score", "fragility")

# Help texts of settings that more than one section has.
_SOURCE = "Set name, file or org/name[/config][@revision][:split], each with optional [column]."
_LATER_HARMFUL = "Harmful prompts. Default: what extract used."
_LATER_HARMLESS = "Harmless prompts. Default: what extract used."
_FILTER = "Drop harmful prompts that are answered and harmless ones that are refused."


class ModelSettings(_Section):
    """Where and how the model runs."""

    revision: Annotated[
        str | None,
        AfterValidator(check_revision),
        Recorded(),
        Option(
            "Hub branch, tag or commit.",
            _MODEL,
            (*_STAGES, *_WITH_CHECKPOINT, "audit"),
        ),
    ] = None
    device: Annotated[
        str,
        Option(
            "auto, cpu, cuda, cuda:1, mps, ...",
            _MODEL,
            (*_STAGES, "score", "verify", "inspect", "trace", "fragility", "chat"),
        ),
    ] = "auto"
    device_map: Annotated[
        str | None,
        Option(
            "Spread the model over this machine's devices: auto, or JSON of devices by module.",
            _MODEL,
            _STAGES,
        ),
    ] = None
    tensor_parallel: Annotated[
        bool,
        Option(
            "Under torchrun: every rank holds a part of each matrix.",
            _MODEL,
            _STAGES,
            "--tensor-parallel/--no-tensor-parallel",
        ),
    ] = False
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"],
        Recorded(),
        Option(
            "auto, float32, bfloat16 or float16. auto: the checkpoint's own; float32 on a CPU.",
            _MODEL,
            (*_STAGES, "score", "inspect", "trace", "fragility", "chat", "plan"),
        ),
    ] = "auto"
    load_in: Annotated[
        Literal["none", "8bit", "4bit"],
        Recorded(),
        Option(
            "8bit or 4bit: hold the model's matrices so (bitsandbytes), for small cards. Edits are "
            "always made to the files.",
            _MODEL,
            (*_STAGES, "inspect", "trace", "fragility", "chat"),
        ),
    ] = "none"
    attn_implementation: Annotated[
        str,
        AfterValidator(check_attention),
        Recorded(),
        Option(
            "How attention is computed: eager, sdpa, flash_attention_2, ... auto: transformers' "
            "choice.",
            _MODEL,
            (*_STAGES, "fragility", "chat"),
        ),
    ] = "auto"
    batch_size: Annotated[
        int | str,
        AfterValidator(check_batch_size),
        Option(
            "Prompts per forward pass, or auto.",
            _MODEL,
            (*_STAGES, "score", "trace", "fragility"),
        ),
    ] = "auto"
    offload: Annotated[
        bool | None,
        Option(
            "Stream the layers from disk, with all prompts at once. Default: if the weights do not "
            "fit into memory.",
            _MODEL,
            (*_STAGES, "verify"),
            "--offload/--no-offload",
        ),
    ] = None
    activation_memory: Annotated[
        str | None,
        AfterValidator(check_memory),
        Option(
            "Memory for activations under --offload, such as 8GB; more goes to mapped files. "
            "Default: half of what is free.",
            _MODEL,
            (*_STAGES, "verify", "plan"),
        ),
    ] = None
    # Bounds: what numpy, torch and lm-eval all take.
    seed: Annotated[
        int,
        Recorded(),
        Option("Of all sampling.", _MODEL, (*_STAGES, "trace", "chat")),
        Option("Accepted for scripts that pass it: scoring samples nothing.", _MODEL, ("score",)),
    ] = Field(0, ge=0, le=2**32 - 1)
    trust_remote_code: Annotated[
        bool,
        Granted(),
        Option(
            "Run the Python code that the checkpoint brings along.",
            _MODEL,
            (*_STAGES, *_WITH_CHECKPOINT, "score"),
        ),
    ] = False


class ChatSettings(_Section):
    """How a prompt becomes a conversation."""

    system: Annotated[
        str | None, Recorded(), Option("System message.", _CHAT, (*_STAGES, "chat"))
    ] = None
    template_kwargs: Annotated[
        dict[str, Any],
        BeforeValidator(parse_json_object),
        Recorded(),
        Option(
            "JSON object of chat template variables.",
            _CHAT,
            (*_STAGES, "chat"),
            "--chat-template-kwargs",
        ),
    ] = Field(default_factory=dict)
    template_args: Annotated[
        tuple[str, ...],
        AfterValidator(check_assignments),
        Recorded(),
        Option(
            "A chat template variable as NAME=VALUE, the value JSON or text; repeatable.",
            _CHAT,
            (*_STAGES, "chat"),
            "--template-arg",
        ),
    ] = ()
    template: Annotated[
        str | None,
        BeforeValidator(read_template),
        Recorded(),
        Option(
            "Instead of the checkpoint's chat template: plain (the text as it is, for base models) "
            "or a file.",
            _CHAT,
            (*_STAGES, "chat", "inspect", "trace", "fragility"),
        ),
    ] = None
    date: Annotated[
        str | None,
        AfterValidator(check_date),
        Recorded(),
        Option(
            "Day (YYYY-MM-DD) for chat templates that ask for it. Default: the run's, else today.",
            _CHAT,
            (*_STAGES, "chat"),
        ),
    ] = None
    response_prefix: Annotated[
        str,
        Recorded(),
        Option("Text that the assistant's turn starts with.", _CHAT, (*_STAGES, "chat")),
    ] = ""
    thinking: Annotated[
        Literal["answer", "skip", "whole"] | None,
        Recorded(),
        Option(
            "Of a model that thinks first. answer: the prompt ends where the answer begins. skip: "
            "it thinks, and what follows counts. whole: as it comes. Default: by its template.",
            _CHAT,
            (*_STAGES, "chat"),
        ),
    ] = None
    max_thinking_tokens: Annotated[
        int,
        Recorded(),
        Option("Longest thought under --thinking skip.", _CHAT, (*_STAGES, "chat")),
    ] = Field(1024, ge=1)

    @property
    def arguments(self) -> dict[str, Any]:
        """The variables of the chat template, however they were given."""
        return {**self.template_kwargs, **dict(map(parse_assignment, self.template_args))}


class ExtractSettings(_Section):
    """Training prompts and positions (paper, section 2.3)."""

    harmful: Annotated[
        str,
        Recorded(),
        Option(f"Harmful prompts. {_SOURCE}", _PROMPTS, (*_EXTRACT, "verify")),
    ] = "harmful"
    harmless: Annotated[
        str, Recorded(), Option("Harmless prompts, likewise.", _PROMPTS, (*_EXTRACT, "verify"))
    ] = "harmless"
    n_train: Annotated[
        int, Recorded(), Option("Training prompts per kind.", _PROMPTS, _EXTRACT)
    ] = Field(128, ge=1)
    positions: Annotated[
        str,
        Recorded(),
        Option("post-instruction, last, or a list such as -5,-1.", _METHOD, _EXTRACT),
    ] = "post-instruction"
    filter: Annotated[
        bool, Recorded(), Option(_FILTER, _PROMPTS, _EXTRACT, "--filter/--no-filter")
    ] = True
    refusal_tokens: Annotated[
        tuple[str, ...],
        Recorded(),
        Option(
            "Token string, id (1234 or id:1234) or preset (llama-2, llama-3, gemma, yi, qwen); "
            "repeatable. "
            "Default: detected.",
            _METHOD,
            (*_EXTRACT, "evaluate"),
            "--refusal-token",
        ),
    ] = ()
    save_activations: Annotated[
        str | None,
        Option(
            "Keep each prompt's vectors for inspect, of all layers or of those given as =3,5-7.",
            _METHOD,
            _EXTRACT,
            implied="all",
        ),
    ] = None
    activation_positions: Annotated[
        Literal["last", "all"],
        Option(
            "last: keep the vectors of the last position. all: of every position.",
            _METHOD,
            _EXTRACT,
        ),
    ] = "last"


class SelectSettings(_Section):
    """Validation prompts and filters (paper, appendix C). None: the sources of ``extract``."""

    harmful: Annotated[str | None, Option(_LATER_HARMFUL, _PROMPTS, ("select",))] = None
    harmless: Annotated[str | None, Option(_LATER_HARMLESS, _PROMPTS, ("select",))] = None
    n_val: Annotated[int, Option("Validation prompts per kind.", _PROMPTS, _SELECT)] = Field(
        32, ge=1
    )
    filter: Annotated[bool, Option(_FILTER, _PROMPTS, _SELECT, "--filter/--no-filter")] = True
    kl_threshold: Annotated[float, Option("Largest KL divergence.", _METHOD, _SELECT)] = Field(
        0.1, ge=0
    )
    induce_threshold: Annotated[float, Option("Smallest induce score.", _METHOD, _SELECT)] = 0.0
    prune_layers: Annotated[
        float, Option("Share of the last layers that is left out.", _METHOD, _SELECT)
    ] = Field(0.2, ge=0, lt=1)
    search: Annotated[
        Literal["staged", "exhaustive"],
        Option(
            "staged: leave out what cannot change the choice. exhaustive: every score, for plots.",
            _METHOD,
            _SELECT,
        ),
    ] = "staged"
    all_layers: Annotated[
        bool,
        Option("Score the candidates of the left-out layers too, for plots.", _METHOD, _SELECT),
    ] = False
    kl_on: Annotated[
        str,
        Option(
            "last: KL at the last prompt token. response:N: mean over the first N answer tokens.",
            _METHOD,
            _SELECT,
        ),
    ] = Field("last", pattern=r"^(last|response:[1-9][0-9]*)$")
    project_harmless: Annotated[
        bool,
        Option(
            "Remove from each candidate what it has along the mean harmless activation.",
            _METHOD,
            _SELECT,
        ),
        Option(
            "Remove from the run folder's direction what it has along the mean harmless "
            "activation, if select has not.",
            _METHOD,
            ("orthogonalize", "evaluate", "verify", "chat"),
        ),
    ] = False


class OrthogonalizeSettings(_Section):
    """The edited checkpoint; see ``abliterate.editing.options.EditOptions``."""

    overwrite: Annotated[
        bool,
        Granted(),
        Option(
            "Replace the output, if it is an edited checkpoint of ours and holds nothing else.",
            _METHOD,
            _EDITING,
        ),
    ] = False
    allow_leak: Annotated[
        float | None,
        Option(
            "Edit an architecture that cannot be made exact, if no more than this share of the "
            "residual stream remains along the direction.",
            _METHOD,
            _EDITING,
        ),
    ] = Field(default=None, ge=0)
    layers: Annotated[str | None, Option("Blocks to edit: 10-25, or 3,5-7.", _EDIT, _EDITING)] = (
        None
    )
    components: Annotated[
        str | None,
        Option(
            "Any of attention, mlp, embedding (or mixer, expert, position, other), with commas.",
            _EDIT,
            _EDITING,
        ),
    ] = None
    scale: Annotated[float, Option("Share of the direction to remove.", _EDIT, _EDITING)] = 1.0
    norm_preserve: Annotated[
        Literal["rows", "columns"] | None,
        BeforeValidator(rows_or_none),
        Option(
            "rows (if nothing follows): each row as it is stored keeps its norm, and matrices "
            "whose rows do not lie along the stream leak along the direction again. columns: what "
            "each input writes keeps its norm, and nothing is left along it.",
            _EDIT,
            _EDITING,
            implied="rows",
        ),
    ] = None
    tied_embeddings: Annotated[
        Literal["untie", "share", "skip"],
        Option(
            "untie (the head keeps the original), share (both are edited) or skip (neither).",
            _EDIT,
            _EDITING,
        ),
    ] = "untie"
    requantize: Annotated[
        bool,
        Option("Store edited FP8 and MXFP4 tensors in their format again.", _STORAGE, _EDITING),
    ] = False
    dequantize: Annotated[bool, Option("Write them as bfloat16.", _STORAGE, _EDITING)] = False
    add: Annotated[
        float | None,
        Option(
            "Bake in the addition of this multiple of the direction instead, as a bias.",
            _EDIT,
            _EDITING,
        ),
    ] = None
    as_lora: Annotated[bool, Option("Write a PEFT adapter instead.", _EDIT, _EDITING)] = False
    device: Annotated[str, Option("Where to compute: cpu, cuda, ...", _STORAGE, _EDITING)] = "cpu"
    jobs: Annotated[
        int | None, Option("Cores to use, up to 16. Default: all.", _STORAGE, _EDITING)
    ] = Field(None, ge=1)
    leave_behind: Annotated[
        tuple[str, ...],
        Option(
            "Leave a safetensors file beside the weights behind (a draft head; a pattern may name "
            "several). Those that hold the model's own weights always are; repeatable.",
            _STORAGE,
            _EDITING,
        ),
    ] = ()
    low_disk: Annotated[
        bool,
        Option(
            "Fetch the shards of a hub id one by one; each is dropped once it is edited.",
            _STORAGE,
            _EDITING,
        ),
    ] = False


class EvaluateSettings(_Section):
    """Test prompts, decoding, judge and capability checks.

    None for the prompts: the sources of ``extract``, and all that they hold.
    """

    harmful: Annotated[str | None, Option(_LATER_HARMFUL, _PROMPTS, ("evaluate", "fragility"))] = (
        None
    )
    harmless: Annotated[
        str | None, Option(_LATER_HARMLESS, _PROMPTS, ("evaluate", "fragility"))
    ] = None
    n_test: Annotated[
        int | None,
        Option("Test prompts per kind. Default: all.", _PROMPTS, ("evaluate", "run")),
        Option("Test prompts per kind. Default: 32.", None, ("fragility",)),
    ] = Field(None, ge=1)
    borderline: Annotated[
        str | None,
        Option(
            "Harmless prompts that look harmful, whose refusals are counted as well: borderline "
            "(bundled), xstest, orbench-hard, or any source.",
            _PROMPTS,
            ("evaluate", "run"),
        ),
    ] = None
    max_new_tokens: Annotated[
        int,
        Option("Longest answer.", _METHOD, ("evaluate", "run", "chat")),
        Option("Longest answer, in tokens. Default: 64.", None, ("fragility",)),
    ] = Field(512, ge=1)
    server: Annotated[
        tuple[_ServerSpec, ...],
        Granted("SERVER"),
        Option(
            "Have the baseline answered by an OpenAI-compatible server, such as "
            "http://localhost:8000/v1 (key in OPENAI_API_KEY), or with ROW=URL the row of "
            "--checkpoint ROW=DIR; repeatable. Hooks run here all the same.",
            _SERVER,
            _EVALUATE,
        ),
    ] = ()
    served_model: Annotated[
        tuple[str, ...],
        Option(
            "The model's name at the server: NAME of the baseline, ROW=NAME of another row; "
            "repeatable.",
            _SERVER,
            _EVALUATE,
        ),
    ] = ()
    server_api: Annotated[
        Literal["completions", "chat"],
        Option(
            "completions: send what is rendered here, as tokens. chat: send messages, which the "
            "server's own template renders.",
            _SERVER,
            _EVALUATE,
        ),
    ] = "completions"
    concurrency: Annotated[int, Option("Requests to a server at once.", _SERVER, _EVALUATE)] = (
        Field(8, ge=1)
    )
    server_timeout: Annotated[
        float,
        Option("Seconds for one attempt, up to the answer's last byte.", _SERVER, _EVALUATE),
    ] = Field(600.0, gt=0)
    server_retries: Annotated[int, Option("Further attempts.", _SERVER, _EVALUATE)] = Field(4, ge=0)
    corpus: Annotated[
        tuple[str, ...],
        Option(
            "Measure loss and perplexity on pile, alpaca, own (baseline completions), pile=FILE or "
            "alpaca=FILE (or a hub id); repeatable.",
            _CAPABILITY,
            _EVALUATE,
        ),
    ] = ()
    corpus_texts: Annotated[int, Option("Texts per corpus.", _CAPABILITY, _EVALUATE)] = Field(
        4096, ge=1
    )
    corpus_tokens: Annotated[int, Option("Longest text, in tokens.", _CAPABILITY, _EVALUATE)] = (
        Field(256, ge=2)
    )
    tasks: Annotated[
        str | None,
        Option("lm-eval tasks with commas: mmlu,arc_challenge,gsm8k.", _CAPABILITY, _EVALUATE),
    ] = None
    tasks_dir: Annotated[
        str | None,
        Granted("TASKS_DIR"),
        Option("Folder of further task definitions.", _CAPABILITY, _EVALUATE),
    ] = None
    task_limit: Annotated[int | None, Option("Examples per task.", _CAPABILITY, _EVALUATE)] = Field(
        None, ge=1
    )
    refusal_phrases: Annotated[
        str,
        Option(
            "Languages whose refusal phrases count, with commas: en (the paper's list), zh, es, "
            "fr, de, ja, ru, ar, hi, pt.",
            _REFUSAL,
            _SCORED,
        ),
    ] = "all"
    refusal_phrase: Annotated[
        tuple[str, ...],
        Option("A further phrase that makes an answer a refusal; repeatable.", _REFUSAL, _SCORED),
    ] = ()
    judge: Annotated[
        str | None, Option("A Llama Guard checkpoint: folder or hub id.", _JUDGE, _SCORE)
    ] = None
    judge_url: Annotated[
        _Endpoint | None,
        Granted("JUDGE_URL"),
        Option(
            "An OpenAI-compatible endpoint, such as http://localhost:8000/v1; key in "
            "OPENAI_API_KEY.",
            _JUDGE,
            _SCORE,
        ),
    ] = None
    judge_model: Annotated[str | None, Option("Its name at the endpoint.", _JUDGE, _SCORE)] = None
    judge_template: Annotated[
        Literal["llama-guard", "prompt"],
        Option(
            "llama-guard: send the conversation. prompt: ask any model for safe or unsafe.",
            _JUDGE,
            _SCORE,
        ),
    ] = "llama-guard"
    classifier: Annotated[
        str | None,
        Option(
            "A text classifier, MODEL[:LABEL]: folder or hub id[@REV], and the label (name or "
            "index) whose share of answers is counted.",
            _JUDGE,
            ("evaluate", "run", "score"),
        ),
    ] = None
    classifier_input: Annotated[
        Literal["auto", "pair", "answer"],
        Option(
            "pair: it reads prompt and answer. answer: the answer alone. auto: a pair where its "
            "tokenizer sets something between two texts.",
            _JUDGE,
            ("evaluate", "run", "score"),
        ),
    ] = "auto"
    judge_timeout: Annotated[
        float,
        Option(
            "Seconds for one attempt as a whole: connection, question and the reply's last byte.",
            _JUDGE,
            _SCORE,
        ),
    ] = Field(60.0, gt=0)
    judge_retries: Annotated[int, Option("Further attempts.", _JUDGE, _SCORE)] = Field(4, ge=0)
    judge_concurrency: Annotated[int, Option("Requests at once.", _JUDGE, _SCORE)] = Field(8, ge=1)


class Settings(_Section):
    """All settings of a run."""

    model: ModelSettings = ModelSettings()
    chat: ChatSettings = ChatSettings()
    extract: ExtractSettings = ExtractSettings()
    select: SelectSettings = SelectSettings()
    orthogonalize: OrthogonalizeSettings = OrthogonalizeSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
