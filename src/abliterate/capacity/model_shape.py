"""What a model is made of, from its configuration: built on the meta device, nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from abliterate.checkpoints.shards import ShardSet
from abliterate.errors import UsageError
from abliterate.models.library_versions import layer_configs
from abliterate.models.loading import DTYPES
from abliterate.models.model_classes import empty_model, text_config
from abliterate.models.quantized_loading import stored_method
from abliterate.writers import decoder_blocks, find_writers

_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k")


@dataclass(frozen=True)
class Shape:
    """What a model is made of, in parameters and bytes of the dtype that computes.

    Attributes:
        parameters: all of them.
        active: those that one token passes in the blocks.
        weights: bytes in memory.
        stored: bytes on disk.
        blocks: bytes of each decoder block.
        rest: bytes beside the blocks and the embeddings that are read row by row.
        projection: parameters of the vocabulary projection.
        vocabulary: its rows.
        width: d_model.
        itemsize: bytes of a number that computes.
        source: bytes on disk of what loading copies (another dtype, fused experts); they are mapped
            beside the copies until all is loaded.
        fusing: bytes at once while the largest fused tensor is made: its source, the stacked
            experts and what they are joined to.
        heads: attention and key/value heads, which ranks of one model divide.
        cached: bytes of a token's keys and values in all layers.
        loaded_in: bytes in memory under each ``--load-in``; empty if the checkpoint is quantised.
        routed: of the active parameters those of experts that a token is sent to.
    """

    parameters: int
    active: int
    weights: int
    stored: int
    blocks: tuple[int, ...]
    rest: int
    projection: int
    vocabulary: int
    width: int
    itemsize: int
    source: int = 0
    fusing: int = 0
    heads: tuple[int, ...] = ()
    cached: int = 0
    loaded_in: Mapping[str, int] = field(default_factory=dict)
    routed: int = 0


def shape_of(
    config: Any,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    shards: ShardSet | None = None,
) -> Shape:
    """Sizes of a model, from its configuration.

    Args:
        config: the configuration.
        dtype: of the weights in memory.
        trust_remote_code: the checkpoint's own code may run.
        shards: its tensors, if they are there too.

    Raises:
        CheckpointError: the configuration contradicts itself, or is that of a larger model.
        UnsupportedArchitectureError: its decoder blocks cannot be found. That its writers can is
            not looked at.
    """
    model = empty_model(config, trust_remote_code, shards)
    text = text_config(model)
    blocks = _layers(model, text) or decoder_blocks(model)
    width = getattr(text, "hidden_size", None) or find_writers(model).d_model
    size = dtype.itemsize
    inside = {id(p) for block in blocks for p in block.parameters()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = {id(p) for p in embedding.parameters()}
    projected = 0 if head is None else head.weight.numel()
    everything = {id(p): p.numel() for p in model.parameters()}
    total = sum(everything.values())
    rest = sum(n for key, n in everything.items() if key not in inside | rows)
    stored = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    active = [_active(block, text) for block in blocks]
    return Shape(
        total,
        sum(each for each, _ in active),
        total * size,
        total * stored.itemsize,
        tuple(sum(p.numel() for p in block.parameters()) * size for block in blocks),
        min(rest * size, 64 << 20) if head is not None else rest * size,
        projected,
        embedding.weight.shape[0],
        width,
        size,
        *_copied(model, dtype, stored),
        *_attention(text, len(blocks), size),
        {} if stored_method(config) is not None else _loaded_in(model, total * size, size),
        sum(routed for _, routed in active),
    )


def _layers(model: Any, text: Any) -> list[nn.Module]:
    """The decoder's blocks where they are plain to see; empty where it takes a trace to tell.

    A trace runs a copy with all layers and experts, which takes minutes for the largest.
    """
    parts = model.get_decoder().children()
    lists = [module for module in parts if isinstance(module, nn.ModuleList)]
    if len(lists) != 1 or len(lists[0]) != getattr(text, "num_hidden_layers", None):
        return []
    return list(lists[0])


def _copied(model: Any, dtype: torch.dtype, stored: torch.dtype) -> tuple[int, int]:
    """Bytes on disk of the parameters that are copies once loaded, and what fusing one takes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    made = [
        pattern
        for each in get_model_conversion_mapping(model)
        if isinstance(each, WeightConverter)
        for pattern in each.target_patterns
    ]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    fused = [n for name, n in sizes.items() if any(pattern in name for pattern in made)]
    copied = sum(sizes.values() if dtype != stored else fused)
    largest = max(fused, default=0)
    return copied * stored.itemsize, largest * (stored.itemsize + 2 * dtype.itemsize)


def _loaded_in(model: Any, whole: int, size: int) -> dict[str, int]:
    """Bytes of the weights where bitsandbytes holds the matrices, all but the output head's."""
    head = model.get_output_embeddings()
    matrices = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    rest = whole - size * sum(matrix.numel() for matrix in matrices)
    # Beside the numbers their scales, float32: one for each row, or for each 64 numbers.
    eight = sum(matrix.numel() + 4 * len(matrix) for matrix in matrices)
    four = sum(matrix.numel() // 2 + 4 * -(-matrix.numel() // 64) for matrix in matrices)
    return {"8bit": rest + eight, "4bit": rest + four}


def _attention(text: Any, layers: int, itemsize: int) -> tuple[tuple[int, ...], int]:
    """Heads, and bytes of a token's keys and values, where the configuration names heads."""
    pairs: dict[tuple[int, int], None] = {}
    held = 0
    for layer in layer_configs(text, layers):
        heads = getattr(layer, "num_attention_heads", None)
        if not isinstance(heads, int) or heads < 1:
            return (), 0
        grouped = getattr(layer, "num_key_value_heads", None)
        grouped = grouped if isinstance(grouped, int) and grouped > 0 else heads
        width = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        pairs[heads, grouped] = None
        held += 2 * grouped * width * itemsize
    return tuple(count for pair in pairs for count in pair), held


def _active(block: nn.Module, config: Any) -> tuple[int, int]:
    """Parameters of a block that one token passes: of routed experts, those it is sent to; and how
    many are these experts'."""
    found = [getattr(config, name, None) for name in _PER_TOKEN]
    used = next((k for k in found if isinstance(k, int) and k > 0), 0)
    total = in_experts = 0
    for name, parameter in block.named_parameters():
        n = parameter.numel()
        if parameter.ndim == 3 and "expert" in name and used > 0:
            n = n * min(used, parameter.shape[0]) // parameter.shape[0]
            in_experts += n
        total += n
    return total, in_experts


def dtype_of(name: str, config: Any, accelerator: bool) -> torch.dtype:
    """The dtype that computes: ``auto`` is float32 on a CPU, else the checkpoint's own.

    Raises:
        UsageError: no such dtype.
    """
    if name != "auto":
        if name not in DTYPES:
            raise UsageError(f"--dtype must be auto or one of {', '.join(DTYPES)}, not '{name}'")
        return DTYPES[name]
    own = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
    own = getattr(torch, own) if isinstance(own, str) else own
    return (own or torch.float32) if accelerator else torch.float32
