"""What the declarations of settings share: their base, headings, commands and help texts."""

from __future__ import annotations

from pydantic import (
    BaseModel,
    ConfigDict,
    field_validator,
)

from abliterate.settings.values import (
    well_formed,
)


class Section(BaseModel):
    """A table of settings: unknown names are refused, and nothing is changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    _unicode = field_validator("*")(well_formed)


# The headings of --help.
MODEL, CHAT, PROMPTS, METHOD = "Model", "Chat format", "Prompts", "Method"
EDIT, STORAGE = "Other edits than the paper's", "Formats and machine"
CAPABILITY, JUDGE, REFUSAL = "Capability", "Judge", "What counts as a refusal"
SERVER = "Answers made by a server"

# Commands that have the same options.
STAGES = ("extract", "select", "evaluate", "run")
WITH_CHECKPOINT = (
    "orthogonalize",
    "verify",
    "writers",
    "plan",
    "inspect",
    "trace",
    "fragility",
    "chat",
)
EXTRACT, SELECT = ("extract", "run"), ("select", "run")
EDITING, EVALUATE, SCORE = ("orthogonalize",), ("evaluate",), ("evaluate", "score")
DIRECTED = ("orthogonalize", "evaluate", "verify", "chat")  # what --direction may be made into
SCORED = ("evaluate", "run", "score", "fragility")

# Help texts of settings that more than one section has.
SOURCE = "Set name, file or org/name[/config][@revision][:split], each with optional [column]."
LATER_HARMFUL = "Harmful prompts. Default: what extract used."
LATER_HARMLESS = "Harmless prompts. Default: what extract used."
FILTER = "Drop harmful prompts that are answered and harmless ones that are refused."
