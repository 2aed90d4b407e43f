"""Which of transformers' attention implementations computes (``--attn-implementation``)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel

from abliterate.errors import UsageError, one_line
from abliterate.models.model_classes import concrete_class

# Beside eager, which every architecture has: the class's mark, and the package that it needs. A
# package that is missing would be replaced by code from the hub.
_OTHERS = {
    "sdpa": ("_supports_sdpa", None),
    "flex_attention": ("_supports_flex_attn", None),
    "flash_attention_2": ("_supports_flash_attn", "flash_attn"),
    "flash_attention_3": ("_supports_flash_attn", "flash_attn_interface"),
}


def attention_options(name: str, config: Any) -> dict[str, str]:
    """What ``from_pretrained`` and ``from_config`` are told of it.

    Args:
        name: ``auto`` is transformers' own choice.
        config: of the model.

    Raises:
        UsageError: the model does not have it, or this machine does not.
    """
    if name == "auto":
        return {}
    possible = ["auto", *attention_names(concrete_class(config))]
    if name not in possible:
        raise UsageError(
            f"--attn-implementation {name} is none that a '{config.model_type}' model has here: "
            f"use {', '.join(possible[:-1])} or {possible[-1]}"
        )
    return {"attn_implementation": name}


def attention_failure(name: str, error: Exception) -> UsageError | None:
    """The error about an implementation that a model turns down as it is built, if that is it."""
    text = one_line(error)[:300]
    if name == "auto" or "attention" not in text.lower():
        return None
    return UsageError(f"--attn-implementation {name} cannot be used here: {text}")


def attention_names(kind: type[PreTrainedModel] | None) -> list[str]:
    """The implementations that a class of models has on this machine.

    Args:
        kind: None where the class comes with the checkpoint: what torch alone can do.
    """
    if kind is None:
        return ["eager", "sdpa"]
    names = ["eager"]
    for name, (mark, package) in _OTHERS.items():
        if getattr(kind, mark, False) and (package is None or find_spec(package) is not None):
            names.append(name)
    return names
