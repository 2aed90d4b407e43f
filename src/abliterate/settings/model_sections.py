"""Settings of the model and of its chat format, which most commands have."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
)

from abliterate.settings.marks import Granted, Needs, Option, Recorded
from abliterate.settings.section import (
    CHAT,
    MODEL,
    STAGES,
    WITH_CHECKPOINT,
    Section,
)
from abliterate.settings.values import (
    check_assignments,
    check_attention,
    check_batch_size,
    check_date,
    check_memory,
    check_revision,
    parse_assignment,
    parse_json_object,
    read_template,
)


class ModelSettings(Section):
    """Where and how the model runs."""

    revision: Annotated[
        str | None,
        AfterValidator(check_revision),
        Recorded(),
        Option(
            "Hub branch, tag or commit.",
            MODEL,
            (*STAGES, *WITH_CHECKPOINT, "audit"),
        ),
    ] = None
    device: Annotated[
        str,
        Option(
            "auto, cpu, cuda, cuda:1, mps, ...",
            MODEL,
            (*STAGES, "score", "verify", "inspect", "trace", "fragility", "chat"),
        ),
    ] = "auto"
    device_map: Annotated[
        str | None,
        Option(
            "Spread the model over this machine's devices: auto, or JSON of devices by module.",
            MODEL,
            STAGES,
        ),
    ] = None
    tensor_parallel: Annotated[
        bool,
        Option(
            "Under torchrun: every rank holds a part of each matrix.",
            MODEL,
            STAGES,
            "--tensor-parallel/--no-tensor-parallel",
        ),
    ] = False
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "float64"],
        Recorded(),
        Option(
            "auto, float32, bfloat16 or float16. auto: the checkpoint's own; float32 on a CPU.",
            MODEL,
            (*STAGES, "score", "inspect", "trace", "fragility", "chat", "plan"),
        ),
    ] = "auto"
    load_in: Annotated[
        Literal["none", "8bit", "4bit"],
        Recorded(),
        Option(
            "8bit or 4bit: hold the model's matrices so (bitsandbytes), for small cards. Edits are "
            "always made to the files.",
            MODEL,
            (*STAGES, "inspect", "trace", "fragility", "chat"),
        ),
    ] = "none"
    attn_implementation: Annotated[
        str,
        AfterValidator(check_attention),
        Recorded(),
        Option(
            "How attention is computed: eager, sdpa, flash_attention_2, ... auto: transformers' "
            "choice.",
            MODEL,
            (*STAGES, "fragility", "chat"),
        ),
    ] = "auto"
    batch_size: Annotated[
        int | str,
        AfterValidator(check_batch_size),
        Option(
            "Prompts per forward pass, or auto.",
            MODEL,
            (*STAGES, "score", "trace", "fragility"),
        ),
    ] = "auto"
    offload: Annotated[
        bool | None,
        Option(
            "Stream the layers from disk, with all prompts at once. Default: if the weights do not "
            "fit into memory.",
            MODEL,
            (*STAGES, "verify"),
            "--offload/--no-offload",
        ),
    ] = None
    activation_memory: Annotated[
        str | None,
        AfterValidator(check_memory),
        Needs(("offload",), (True, None)),
        Option(
            "Memory for activations under --offload, such as 8GB; more goes to mapped files. "
            "Default: half of what is free.",
            MODEL,
            (*STAGES, "verify", "plan"),
        ),
    ] = None
    # Bounds: what numpy, torch and lm-eval all take.
    seed: Annotated[
        int,
        Recorded(),
        Option("Of all sampling.", MODEL, (*STAGES, "trace", "chat")),
        Option("Accepted for scripts that pass it: scoring samples nothing.", MODEL, ("score",)),
    ] = Field(0, ge=0, le=2**32 - 1)
    trust_remote_code: Annotated[
        bool,
        Granted(),
        Option(
            "Run the Python code that the checkpoint brings along.",
            MODEL,
            (*STAGES, *WITH_CHECKPOINT, "score"),
        ),
    ] = False


class ChatSettings(Section):
    """How a prompt becomes a conversation."""

    system: Annotated[
        str | None, Recorded(), Option("System message.", CHAT, (*STAGES, "chat", "audit"))
    ] = None
    template_kwargs: Annotated[
        dict[str, Any],
        BeforeValidator(parse_json_object),
        Recorded(),
        Option(
            "JSON object of chat template variables.",
            CHAT,
            (*STAGES, "chat", "audit"),
            "--chat-template-kwargs",
        ),
    ] = Field(default_factory=dict)
    template_args: Annotated[
        tuple[str, ...],
        AfterValidator(check_assignments),
        Recorded(),
        Option(
            "A chat template variable as NAME=VALUE, the value JSON or text; repeatable.",
            CHAT,
            (*STAGES, "chat", "audit"),
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
            CHAT,
            (*STAGES, "chat", "inspect", "trace", "fragility", "audit"),
        ),
    ] = None
    date: Annotated[
        str | None,
        AfterValidator(check_date),
        Recorded(),
        Option(
            "Day (YYYY-MM-DD) for chat templates that ask for it. Default: the run's, else today.",
            CHAT,
            (*STAGES, "chat", "audit"),
        ),
    ] = None
    response_prefix: Annotated[
        str,
        Recorded(),
        Option("Text that the assistant's turn starts with.", CHAT, (*STAGES, "chat", "audit")),
    ] = ""
    thinking: Annotated[
        Literal["answer", "skip", "whole"] | None,
        Recorded(),
        Option(
            "Of a model that thinks first. answer: the prompt ends where the answer begins. skip: "
            "it thinks, and what follows counts. whole: as it comes. Default: by its template.",
            CHAT,
            (*STAGES, "chat", "audit"),
        ),
    ] = None
    max_thinking_tokens: Annotated[
        int,
        Recorded(),
        Needs(("thinking",), ("skip", None)),
        Option("Longest thought under --thinking skip.", CHAT, (*STAGES, "chat", "audit")),
    ] = Field(1024, ge=1)

    @property
    def arguments(self) -> dict[str, Any]:
        """The variables of the chat template, however they were given."""
        return {**self.template_kwargs, **dict(map(parse_assignment, self.template_args))}
