"""Find, test and remove the refusal direction of a language model (Arditi et al. 2024).

The public functions mirror the commands: ``load_prompts`` and ``load_model``, then ``extract``,
``select``, ``orthogonalize``, with ``ablate`` and ``add`` as context managers. They are imported on
first use, so that the command line starts without waiting for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abliterate.chat import ChatFormat
    from abliterate.direction import Direction, load_direction
    from abliterate.edit_options import EditOptions
    from abliterate.editing import orthogonalize
    from abliterate.errors import AbliterateError
    from abliterate.evaluation import evaluate
    from abliterate.extraction import Extraction, extract
    from abliterate.interventions import ablate, add
    from abliterate.models import Loaded, load_model
    from abliterate.prompts import load_prompts
    from abliterate.selection import Selection, Thresholds, select
    from abliterate.sources import Prompt

_HOME = {
    "AbliterateError": "errors",
    "ChatFormat": "chat",
    "Direction": "direction",
    "EditOptions": "edit_options",
    "Extraction": "extraction",
    "Loaded": "models",
    "Prompt": "sources",
    "Selection": "selection",
    "Thresholds": "selection",
    "ablate": "interventions",
    "add": "interventions",
    "evaluate": "evaluation",
    "extract": "extraction",
    "load_direction": "direction",
    "load_model": "models",
    "load_prompts": "prompts",
    "orthogonalize": "editing",
    "select": "selection",
}

__all__ = [
    "AbliterateError",
    "ChatFormat",
    "Direction",
    "EditOptions",
    "Extraction",
    "Loaded",
    "Prompt",
    "Selection",
    "Thresholds",
    "ablate",
    "add",
    "evaluate",
    "extract",
    "load_direction",
    "load_model",
    "load_prompts",
    "orthogonalize",
    "select",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'abliterate' has no attribute '{name}'")
    return getattr(importlib.import_module(f"abliterate.{_HOME[name]}"), name)
