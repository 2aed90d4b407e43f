"""Find, test and remove the refusal direction of a language model (Arditi et al. 2024).

The public functions mirror the commands: ``load_prompts`` and ``load_model``, then ``extract``,
``select``, ``orthogonalize``, with ``ablate`` and ``add`` as context managers. They are imported on
first use, so that the command line starts without waiting for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abliterate.direction import Direction, load_direction
    from abliterate.editing.options import EditOptions
    from abliterate.editing.orthogonalize import orthogonalize
    from abliterate.errors import AbliterateError
    from abliterate.evaluation.compare import evaluate
    from abliterate.extraction.means import Extraction, extract
    from abliterate.inference.interventions import ablate, add
    from abliterate.models.loading import Loaded, load_model
    from abliterate.prompts.chat_template import ChatFormat
    from abliterate.prompts.sampling import load_prompts
    from abliterate.prompts.sources import Prompt
    from abliterate.selection.search import Selection, Thresholds, select

_HOME = {
    "AbliterateError": "errors",
    "ChatFormat": "prompts.chat_template",
    "Direction": "direction",
    "EditOptions": "editing.options",
    "Extraction": "extraction.means",
    "Loaded": "models.loading",
    "Prompt": "prompts.sources",
    "Selection": "selection.search",
    "Thresholds": "selection.search",
    "ablate": "inference.interventions",
    "add": "inference.interventions",
    "evaluate": "evaluation.compare",
    "extract": "extraction.means",
    "load_direction": "direction",
    "load_model": "models.loading",
    "load_prompts": "prompts.sampling",
    "orthogonalize": "editing.orthogonalize",
    "select": "selection.search",
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
