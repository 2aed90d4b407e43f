"""A small random copy of an architecture: the same layers and experts, tiny widths.

Depth, layer patterns and expert counts are kept, so the parameters have the names and axes of the
full model, and a plan made on the copy is a plan for the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from abliterate.checkpoints.config_sizes import absurd_count
from abliterate.models.model_classes import build_draft, build_model, has_causal_class

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HIDDEN, HEADS, VOCAB = 48, 4, 136

# Tiny sizes by attribute name. They agree with each other where architectures demand it: an
# expansion of two makes 96 inner channels, which are 6 state-space heads of 16.
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_dim"), HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("num_heads", "index_n_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("head_dim", "swa_head_dim", "index_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("kv_channels", "v_head_dim", "qk_nope_head_dim", "dim_head"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "dff", "dim_ff", "ffn_hidden_size"), 80),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size", "n_inner"), 88),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 40),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 56),
    **dict.fromkeys(("shared_experts_intermediate_size",), 56),
    **dict.fromkeys(("moe_shared_expert_intermediate_size",), 56),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("model_max_length", "original_max_position_embeddings"), 64),
    **dict.fromkeys(("context_length",), 64),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size"), 8),
    **dict.fromkeys(("window_size", "keep_window_size", "local_attention"), 8),
    **dict.fromkeys(("attention_chunk_size", "index_topk"), 8),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 6),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 2),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "block_size"), 16),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 3),
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("o_lora_rank", "laurel_rank", "adapter_rank", "gated_norm_rank"), 12),
    **dict.fromkeys(("linear_key_head_dim", "hc_lowrank"), 12),
    "linear_value_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "rotary_dim": 8,
    "hidden_size_per_layer_input": 24,
    "global_head_dim": 32,
    "lru_width": 64,
    "word_embed_proj_dim": HIDDEN,
    "o_groups": 2,
    "mamba_d_ssm": 96,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "router_hidden_size": 36,
    "ple_embed_dim": 32,
    "hidden_size_global": 64,  # not the width of the byte encoder and decoder beside it
    "encoder_hash_byte_group_vocab": 50,
}
#: Rows of a table by token or position, and the fewest that the traced tokens need of each.
_TABLES = ("vocab_size", "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
_LEAST_ROWS = 32
_KV_HEADS = (
    *("num_key_value_heads", "swa_num_key_value_heads", "num_global_key_value_heads"),
    *("num_kv_heads", "kv_n_heads"),
)

#: A copy with more parameters than this is not small; 32-bit, so 2 GB.
LARGEST = 500_000_000

#: Parameters that set decay rates: large values of either sign make recurrences overflow.
_RATES = ("A_log", "A_logs", "dt_bias", "time_decay", "time_first", "recurrent_param")

Small = Callable[[str, Any, dict[str, Any]], Any]


class ShrinkError(Exception):
    """No small copy of this configuration could be built and run."""


def _token(value: Any, vocabulary: Any) -> Any:
    if isinstance(value, list):
        return [_token(v, vocabulary) for v in value]
    known = vocabulary if isinstance(vocabulary, int) else VOCAB
    last = min(VOCAB, max(known, _LEAST_ROWS)) - 1
    return min(value, last) if isinstance(value, int) else value


def _sections(rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Rotary parameters whose sections (time, height, width) share out a tiny head again."""
    count, half = len(rope["mrope_section"]), head_dim // 2
    half = int(half * (rope.get("partial_rotary_factor") or 1))
    sections = [half // count + (i < half % count) for i in range(count)]
    return rope | {"mrope_section": sections}


def _tabled(name: str, value: Any, values: dict[str, Any]) -> Any:
    """The tiny value of an attribute from the table, or the value itself."""
    if isinstance(value, dict) and value.get("mrope_section"):
        return _sections(value, _SIZES["head_dim"] if "head_dim" in values else HIDDEN // HEADS)
    if isinstance(value, bool) or value is None:
        return value
    if name.endswith(("_token_id", "_token_ids")):
        return _token(value, values.get("vocab_size"))
    if "drop" in name and isinstance(value, float):
        return 0.0
    rope = values.get("qk_rope_head_dim")
    if name == "head_dim" and isinstance(rope, int):  # either the rotary part, or the whole head
        return _SIZES["qk_rope_head_dim" if value == rope else "qk_head_dim"]
    if name in _KV_HEADS and isinstance(value, int):
        heads = values.get("num_attention_heads", values.get("n_head", values.get("n_heads")))
        return HEADS if value == heads else min(value, 2)
    if name == "num_heads" and "state_size" in values:  # of a state-space model
        return _SIZES["mamba_num_heads"]
    size = _SIZES.get(name, _SIZES.get(name.removeprefix("swa_")))
    if size is not None and isinstance(value, list):
        return [min(v, size) for v in value]
    if size is None or not isinstance(value, int):
        return value
    return min(max(value, _LEAST_ROWS), size) if name in _TABLES else min(value, size)


def _square(name: str, value: Any, values: dict[str, Any]) -> Any:
    """As ``_tabled``, for architectures whose heads have to make up the hidden size."""
    if name in ("head_dim", "kv_channels") and isinstance(value, int):
        return HIDDEN // HEADS
    return _tabled(name, value, values)


_COUNTS = ("num_heads", "n_groups", "mamba_n_groups", "mamba_ngroups", "o_groups")
_STATES = ("mamba_d_state", "state_size", "ssm_state_size")


def _scaled(name: str, value: Any, values: dict[str, Any]) -> Any:
    """Every width divided by the same number, every count kept: products still agree."""
    keep = (*_KV_HEADS, *_COUNTS, *_STATES)
    if "heads" in name or name in keep or name in ("n_head", "chunk_size", "index_topk"):
        return value
    if name.startswith(("vocab", "max_", "n_positions", "n_ctx", "sliding", "window", "block")):
        return _tabled(name, value, values)
    heads = values.get("head_dim") or 64
    factor = max(1, min(heads, values.get("qk_rope_head_dim") or heads) // 8)
    is_size = name in _SIZES and isinstance(value, int) and not isinstance(value, bool)
    return max(1, value // factor) if is_size else _tabled(name, value, values)


def _small_config(config: PretrainedConfig, small: Small) -> PretrainedConfig:
    """The same class with tiny sizes; what the class derives by itself is left to it."""
    kind = type(config)
    values, defaults = config.to_dict(), kind().to_dict()
    kwargs: dict[str, Any] = {}
    for name, value in values.items():
        if name in kind.sub_configs:
            part = getattr(config, name)
            kwargs[name] = part and _small_config(part, small)
        elif name == "per_layer_config" and isinstance(value, dict):
            kwargs[name] = {
                layer: {n: small(n, v, values | own) for n, v in own.items()}
                for layer, own in value.items()
            }
        elif name in ("model_type", "transformers_version", "dtype"):
            continue
        elif (tiny := small(name, value, values)) != value or value != defaults.get(name):
            kwargs[name] = tiny
    return kind(**kwargs)


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int = 0) -> None:
    """Give every parameter a random value, so that none is zero, one or like another.

    Vectors (norm gains, biases) and decay rates move a little from their initial value, which
    keeps recurrences finite; matrices are drawn anew. Routing biases, which are buffers, too.
    """
    generator = torch.Generator().manual_seed(seed)
    routing = [(n, b) for n, b in model.named_buffers() if n.endswith(("bias", "biases", "scalar"))]
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(), *routing]
    for name, tensor in tensors:
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        start = torch.nan_to_num(tensor.float(), 0.0, 0.0, 0.0)
        if tensor.ndim <= 1 or name.endswith(_RATES):
            tensor.copy_(start + 0.2 * noise)
        else:
            tensor.copy_(noise * (0.5 / tensor.shape[-1] ** 0.5))


@contextmanager
def _float32() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_default_dtype(before)


def _built(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration, if it is as small as it is meant to be."""
    draft = build_draft(config, 2 * LARGEST, attn_implementation="eager")
    size = sum(p.numel() for p in draft.parameters())
    if size > LARGEST:
        raise ShrinkError(f"{size:,} parameters are too many")
    model: PreTrainedModel = build_model(config, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


@torch.inference_mode(False)  # its tensors are ordinary ones, wherever they are made
def shrunken(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A tiny random causal language model of the configuration's architecture, ready to run.

    Float32, on the CPU, eager attention, evaluation mode. Depth, layer patterns and numbers of
    experts are those of ``config``.

    Raises:
        ShrinkError: where no copy could be built and run.
    """
    # The text decoder on its own where the library has one, else all of a multimodal model.
    text = config.get_text_config()
    text = text if has_causal_class(text) else config
    absurd = absurd_count(text.to_dict())
    if absurd is not None:
        raise ShrinkError(f"no small copy of {config.model_type}: {absurd[0]} is {absurd[1]:,}")
    errors: list[str] = []
    for small in (_tabled, _square, _scaled):
        try:
            with _float32(), torch.no_grad():
                torch.manual_seed(seed)
                model = _built(_small_config(text, small))
                randomise(model, seed)
                logits = model(input_ids=torch.arange(11)[None] + 3, use_cache=False)[0]
        except Exception as error:  # whatever an architecture's own checks and shapes object to
            errors.append(f"{small.__name__}: {type(error).__name__}: {error}")
            continue
        if bool(torch.isfinite(logits).all()):
            return model
        errors.append(f"{small.__name__}: logits are not finite")
    raise ShrinkError(f"no small copy of {config.model_type}: " + "; ".join(errors))
