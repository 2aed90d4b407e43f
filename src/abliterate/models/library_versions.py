"""What differs between the releases of transformers that are supported, each in one function."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from functools import cache, wraps
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils.peft_utils import find_adapter_config_file

# Where no adapter lies: nobody can name a folder so beforehand.
_NOWHERE = uuid.uuid4().hex


def _takes_plan(load: Any) -> bool:
    """Whether the plan of tensor parallelism is an argument of loading: before 5.16."""
    return "tp_plan" in signature(load).parameters


def adapter_options(folder: Path) -> dict[str, Any]:
    """What ``from_pretrained`` is told, so that an adapter beside a model is no part of it.

    That is to look for adapters where there are none. Before 5.23 the library looks into the folder
    itself, whatever it is told.

    Args:
        folder: of the model.
    """
    if find_adapter_config_file(str(folder), subfolder=_NOWHERE) is not None:
        _make_finders_heed_nowhere()
    return {"adapter_kwargs": {"subfolder": _NOWHERE}}


@cache
def _make_finders_heed_nowhere() -> None:
    """Once and for good, as other threads may be loading: who looks elsewhere sees no change."""
    from transformers.integrations import peft
    from transformers.models.auto import auto_factory

    def heeding(find: Any) -> Any:
        @wraps(find)
        def found(*args: Any, **options: Any) -> Any:
            return None if options.get("subfolder") == _NOWHERE else find(*args, **options)

        return found

    modules: tuple[Any, ...] = (peft, auto_factory)
    for module in modules:
        module.find_adapter_config_file = heeding(module.find_adapter_config_file)


def cache_name() -> str:
    """What ``generate`` calls keys and values, which it takes and gives back: new since 5.24."""
    return "cache" if hasattr(GenerateDecoderOnlyOutput, "cache") else "past_key_values"


def layer_configs(config: Any, count: int) -> list[Any]:
    """The configuration of each layer: newer releases tell so where heads differ by layer.

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


def even_out_widened(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives matrices that the library has widened from FP8 the dtype that was asked for.

    Before 5.10 it leaves them in that of their scales.

    Args:
        model: as loaded.
        dtype: asked for.
    """
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    if "model" in signature(Fp8Dequantize.convert).parameters:  # whose dtype it goes by
        return
    kept = model._get_dtype_plan(dtype)  # what stays in float32 in every model of the type
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and parameter.dtype != dtype
        if is_matrix and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)


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
