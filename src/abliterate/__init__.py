"""Find, test and remove the refusal direction of a language model (Arditi et al. 2024).

In the order of the work: :func:`wrap` or :func:`load` a model, :func:`extract` candidate
directions, :func:`select` one, try it with :func:`ablate` and :func:`add`, bake it in with
:func:`orthogonalize_` (in memory) or :func:`orthogonalize` (on disk), and look at all of it. Names
are imported on first use, so that ``import abliterate`` and the command line start at once.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abliterate import plot
    from abliterate.api.behaviour import Evaluation, Fragility, evaluate, fragility
    from abliterate.api.directions import Selection, activations, extract, select
    from abliterate.api.edits import (
        EditedCheckpoint,
        OrthogonalizedModel,
        orthogonalize,
        orthogonalize_,
    )
    from abliterate.api.language_model import LanguageModel, load, wrap
    from abliterate.api.looking import Inspection, ResourcePlan, Trace, inspect, plan, trace
    from abliterate.api.steering import ablate, add, generate
    from abliterate.api.verdicts import Audit, Diff, Verification, audit, diff, verify
    from abliterate.api.writer_table import WriterTable, writers
    from abliterate.console import set_progress
    from abliterate.direction import Direction
    from abliterate.direction_loading import load_direction
    from abliterate.editing.options import EditOptions
    from abliterate.errors import AbliterateError
    from abliterate.extraction.extraction import Extraction
    from abliterate.models.loading import Loaded, load_model
    from abliterate.prompts.chat_template import ChatFormat
    from abliterate.prompts.sampling import load_prompts
    from abliterate.prompts.sources import Prompt
    from abliterate.selection.candidate_filters import Thresholds

    __version__: str

_HOME = {
    "AbliterateError": "errors",
    "Audit": "api.verdicts",
    "ChatFormat": "prompts.chat_template",
    "Diff": "api.verdicts",
    "Direction": "direction",
    "EditOptions": "editing.options",
    "EditedCheckpoint": "api.edits",
    "Evaluation": "api.behaviour",
    "Extraction": "extraction.extraction",
    "Fragility": "api.behaviour",
    "Inspection": "api.looking",
    "LanguageModel": "api.language_model",
    "Loaded": "models.loading",
    "OrthogonalizedModel": "api.edits",
    "Prompt": "prompts.sources",
    "ResourcePlan": "api.looking",
    "Selection": "api.directions",
    "Thresholds": "selection.candidate_filters",
    "Trace": "api.looking",
    "Verification": "api.verdicts",
    "WriterTable": "api.writer_table",
    "ablate": "api.steering",
    "activations": "api.directions",
    "add": "api.steering",
    "audit": "api.verdicts",
    "diff": "api.verdicts",
    "evaluate": "api.behaviour",
    "extract": "api.directions",
    "fragility": "api.behaviour",
    "generate": "api.steering",
    "inspect": "api.looking",
    "load": "api.language_model",
    "load_direction": "direction_loading",
    "load_model": "models.loading",
    "load_prompts": "prompts.sampling",
    "orthogonalize": "api.edits",
    "orthogonalize_": "api.edits",
    "plan": "api.looking",
    "plot": "",
    "select": "api.directions",
    "set_progress": "console",
    "trace": "api.looking",
    "verify": "api.verdicts",
    "wrap": "api.language_model",
    "writers": "api.writer_table",
}

__all__ = [
    "AbliterateError",
    "Audit",
    "ChatFormat",
    "Diff",
    "Direction",
    "EditOptions",
    "EditedCheckpoint",
    "Evaluation",
    "Extraction",
    "Fragility",
    "Inspection",
    "LanguageModel",
    "Loaded",
    "OrthogonalizedModel",
    "Prompt",
    "ResourcePlan",
    "Selection",
    "Thresholds",
    "Trace",
    "Verification",
    "WriterTable",
    "__version__",
    "ablate",
    "activations",
    "add",
    "audit",
    "diff",
    "evaluate",
    "extract",
    "fragility",
    "generate",
    "inspect",
    "load",
    "load_direction",
    "load_model",
    "load_prompts",
    "orthogonalize",
    "orthogonalize_",
    "plan",
    "plot",
    "select",
    "set_progress",
    "trace",
    "verify",
    "wrap",
    "writers",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("abliterate")
    if name not in _HOME:
        raise AttributeError(f"module 'abliterate' has no attribute '{name}'")
    if not _HOME[name]:
        return importlib.import_module(f"abliterate.{name}")
    return getattr(importlib.import_module(f"abliterate.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallablePackage(ModuleType):
    """A package that has the name of a public function, and is called as that function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        function = getattr(importlib.import_module(f"abliterate.{_HOME[name]}"), name)
        return function(*args, **kwargs)


class _Package(ModuleType):
    """Python binds a package within this one to its name, which a public function may have."""

    def __setattr__(self, name: str, value: Any) -> None:
        if _HOME.get(name) and isinstance(value, ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
