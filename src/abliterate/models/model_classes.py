"""From a configuration to a model: its class in transformers, and the model without its weights.

A configuration may come from anyone: nothing is built far beyond the tensors that lie beside it.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.initialization import no_init_weights

from abliterate.checkpoints.config_sizes import CONFIG, NUMBERS, TENSORS, Held
from abliterate.checkpoints.shards import ShardSet
from abliterate.errors import CheckpointError, one_line
from abliterate.models.bounded_build import TooLargeError, bounded_build


def has_causal_class(config: Any) -> bool:
    """Whether transformers has a class for a language model of exactly this configuration."""
    return type(config) in AutoModelForCausalLM._model_mapping or _named_class(config) is not None


def _named_class(config: Any) -> Any:
    """The class that ``architectures`` names, where the auto classes do not know the config."""
    names = getattr(config, "architectures", None) or [""]
    return getattr(transformers, names[0], None)


def model_class(config: Any) -> Any:
    """The class whose ``from_pretrained`` loads the language model of ``config``.

    A text decoder inside a vision-language model comes with the whole of it, unless transformers
    has a text-only class for that configuration.
    """
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return _named_class(config) or AutoModelForCausalLM


def concrete_class(config: Any) -> Any:
    """The class of the models of ``config``; None where it is not one of transformers."""
    kind = model_class(config)
    if not hasattr(kind, "_model_mapping"):
        return kind
    known = kind._model_mapping.get(type(config), None)
    return known[0] if isinstance(known, tuple) else known


def build_model(config: Any, **options: Any) -> PreTrainedModel:
    """A model of ``config`` with random weights, on the current default device.

    Args:
        config: its configuration.
        options: as for ``from_config`` (``dtype``, ``attn_implementation``, ...).
    """
    kind = model_class(config)
    if hasattr(kind, "from_config"):
        return cast(PreTrainedModel, kind.from_config(config, **options))
    options.pop("trust_remote_code", None)
    return cast(PreTrainedModel, kind._from_config(config, **options))


def build_draft(
    config: Any, elements: int = NUMBERS, tensors: int = TENSORS, **options: Any
) -> PreTrainedModel:
    """A model of ``config`` on the meta device, no larger than these bounds.

    Args:
        config: its configuration.
        elements: numbers of all its parameters.
        tensors: how many parameters those are.
        options: as for :func:`build_model`.

    Raises:
        TooLargeError: it is larger.
    """
    # Random numbers for what has no memory take half of the time, and tying comes with them.
    with torch.device("meta"), no_init_weights(), bounded_build(elements, tensors):
        model = build_model(config, **options)
    model.tie_weights()
    return model


def empty_model(
    config: Any, trust_remote_code: bool = False, shards: ShardSet | None = None
) -> PreTrainedModel:
    """The model of a configuration on the meta device: names and shapes, no memory.

    Plans, checks and tables ask for the same one several times a command: the last few are kept,
    so nobody may change what this gives. For one to fill see :func:`build_empty`.

    Args:
        config: its configuration.
        trust_remote_code: the checkpoint's own code may run.
        shards: its tensors, which a model is not built far beyond.

    Raises:
        CheckpointError: the configuration contradicts itself, or is that of a larger model.
    """
    if trust_remote_code:  # whose code it is does not stand in the configuration
        return build_empty(config, trust_remote_code, shards)
    bounds = _bounds(config, shards)
    model = _kept_empty(_Asked(type(config), values_of(config), bounds, config, shards))
    _check_layers(config, model, shards)
    return model


def values_of(config: Any) -> str:
    """What a configuration says, as text; not where it was read: a copy says the same."""
    values = config.to_dict()
    values.pop("_name_or_path", None)
    return json.dumps(values, sort_keys=True, default=str)


@dataclass(frozen=True)
class _Asked:
    """What decides an empty model, and what it is built from."""

    kind: type
    values: str
    bounds: tuple[int, int]
    config: Any = field(compare=False)
    shards: ShardSet | None = field(compare=False)


# A source, its edited copy, and each with embedding and output head untied.
@lru_cache(maxsize=4)
def _kept_empty(asked: _Asked) -> PreTrainedModel:
    return build_empty(deepcopy(asked.config), shards=asked.shards)


def build_empty(
    config: Any, trust_remote_code: bool = False, shards: ShardSet | None = None, **options: Any
) -> PreTrainedModel:
    """As :func:`empty_model`, a new one that belongs to the caller.

    Args:
        config: its configuration.
        trust_remote_code: the checkpoint's own code may run.
        shards: its tensors, which a model is not built far beyond.
        options: as for :func:`build_model`.

    Raises:
        CheckpointError: the configuration contradicts itself, or is that of a larger model.
    """
    try:
        model = build_draft(
            config, *_bounds(config, shards), trust_remote_code=trust_remote_code, **options
        )
    except TooLargeError as error:
        raise too_large(config, error, shards) from None
    except Exception as error:  # whatever the architecture's own constructor raises
        where = shards.folder if shards is not None else Path(config.name_or_path or "")
        raise CheckpointError(
            f"a '{config.model_type}' model cannot be built from {where / CONFIG} "
            f"({_why(config, error)})"
        ) from None
    _check_layers(config, model, shards)
    return model


def _why(config: Any, error: Exception) -> str:
    """What a model's constructor raised; the field whose value it looked up in vain, if it did."""
    wanted = error.args[0] if isinstance(error, KeyError) and error.args else None
    sections: list[tuple[str, Any]] = [("", config.to_dict())]
    while wanted is not None and sections:
        above, section = sections.pop()
        for key, value in section.items():
            if isinstance(value, dict):
                sections.append((f"{above}{key}.", value))
            elif value == wanted:
                return f"{above}{key} is {value!r}, which the installed transformers does not know"
    return one_line(error)[:300]


def _bounds(config: Any, shards: ShardSet | None) -> tuple[int, int]:
    return (NUMBERS, TENSORS) if shards is None else size_bounds(config, shards)


def _check_layers(config: Any, model: PreTrainedModel, shards: ShardSet | None) -> None:
    """Raise where a model has more layers than its tensors are of."""
    held = None if shards is None else Held.of(shards)
    if held is None or held.layers is None:
        return
    layers = Held(dict.fromkeys(name for name, _ in model.named_parameters())).layers
    if layers is not None and layers > held.layers:
        raise too_large(config, TooLargeError(f"{layers:,} layers"), shards)


def size_bounds(config: Any, shards: ShardSet) -> tuple[int, int]:
    """Elements and tensors of a model beyond which these shards are not its weights."""
    # Some pack eight numbers into one; tied weights count twice, and so does what a quantizer
    # puts in the place of another.
    packed = 8 if getattr(config, "quantization_config", None) else 1
    elements, tensors = Held.of(shards).elements, len(shards.tensors)
    return 4 * packed * elements + (1 << 24), 8 * tensors + 10_000


def too_large(what: Any, error: TooLargeError, shards: ShardSet | None) -> CheckpointError:
    if shards is None:
        kind = getattr(what, "model_type", what)
        return CheckpointError(
            f"config.json describes a '{kind}' model of {error}, which cannot be: it is damaged"
        )
    return CheckpointError(
        f"{shards.folder / CONFIG} describes a model of {error}, but the files beside it hold "
        f"{Held.of(shards)} with {Held.of(shards).elements:,} numbers: they do not belong together"
    )


def text_config(model_or_config: Any) -> Any:
    """The configuration of the text decoder (itself, where there is no nested one)."""
    config = getattr(model_or_config, "config", model_or_config)
    return config.get_text_config(decoder=True)
