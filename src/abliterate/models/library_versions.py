"""What differs between the releases of transformers that are supported, each in one function."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.generation import GenerateDecoderOnlyOutput


def _takes_plan(load: Any) -> bool:
    """Whether the plan of tensor parallelism is an argument of loading: before 5.16."""
    return "tp_plan" in signature(load).parameters


def cache_name() -> str:
    """What ``generate`` calls keys and values, which it takes and gives back: new since 5.24."""
    return "cache" if hasattr(GenerateDecoderOnlyOutput, "cache") else "past_key_values"


def layer_configs(config: Any, count: int) -> list[Any]:
    """The configuration of each layer: some models' heads differ by layer, told so since 5.2x.

    Args:
        config: of a decoder.
        count: its layers, where it has the same for all of them.
    """
    return list(getattr(config, "per_layer_config", None) or [config] * count)


def has_distributed_tensors() -> bool:
    """Whether tensor parallelism makes every divided parameter a ``DTensor``, as ours needs it.

    Earlier releases keep each rank's part as a plain tensor, of which nothing says that it is one.
    """
    return not _takes_plan(convert_and_load_state_dict_in_model)


def load_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor], config: Any) -> Any:
    """Puts tensors of a checkpoint into ``model``, converted; returns what went wrong.

    Args:
        model: on the meta device, or partly.
        tensors: by their names on disk.
        config: the library's ``LoadStateDictConfig``.
    """
    load: Any = convert_and_load_state_dict_in_model
    options = {"tp_plan": None} if _takes_plan(load) else {}
    return load(model, tensors, config, **options)[0]
