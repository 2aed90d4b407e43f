"""Tiny random models of every decoder-only text architecture that transformers knows.

The types come from the library's own mapping, less a table of exclusions with reasons, so that a
type which a new release adds is tested without anyone asking for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from abliterate.writers.tiny_model import randomise

#: The published page, made with one release.
TABLE = (Path(__file__).parents[3] / "docs" / "architectures.md").read_text(encoding="utf-8")
HIDDEN, HEADS, LAYERS, VOCAB, POSITIONS = 48, 4, 4, 136, 64
# Layers of a shallow model whose layers are of one kind or two.
FEW = 2

_BERT = "encoder with an is_decoder switch"
_SEQ2SEQ = "decoder half of an encoder-decoder"
_SPEECH = "decoder half of an audio model"
_VISION = "vision-language wrapper; its text decoder is a type of its own"
_DRAFT = "draft head that needs another model's hidden states"

EXCLUDED: dict[str, str] = {
    **dict.fromkeys(
        (
            *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra"),
            *("ernie", "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert"),
            *("roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
        ),
        _BERT,
    ),
    **dict.fromkeys(
        (
            *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart"),
            *("mvp", "pegasus", "plbart", "prophetnet"),
        ),
        _SEQ2SEQ,
    ),
    **dict.fromkeys(("musicgen", "musicgen_melody", "whisper", "moss_transcribe_diarize"), _SPEECH),
    **dict.fromkeys(("git", "trocr"), "captions images; BERT-like or encoder-decoder text half"),
    **dict.fromkeys(("gemma3n", "gemma4_unified", "got_ocr2"), _VISION),
    **dict.fromkeys(("gemma3", "gemma4"), "vision-language wrapper: exact, see above"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), _DRAFT),
    "xlm": "masked or translation language model; bidirectional by default",
    "xlnet": "permutation language model with two-stream attention",
    "gpt-sw3": "alias of gpt2",
    "dots3_note": "wrapper of dots3_note_text, with audio and vision towers",
}

#: Wrappers whose checkpoints hold a text decoder among others (`AutoModelForImageTextToText`).
VISION_LANGUAGE = (
    "aya_vision", "gemma3", "gemma4", "idefics3", "internvl", "llava", "mistral3", "paligemma",
    "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe",
)  # fmt: skip

# What the oldest supported transformers lacks, or runs at its default sizes only: the release that
# has it right.
_SINCE = {"dbrx": "5.15", "inkling_text": "5.14"}

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
# One size per attribute name; d_model is 48 and nothing else is unless the architecture demands it.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_dim"), HIDDEN),
    **dict.fromkeys(_COUNTS, LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("num_heads", "index_n_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("head_dim", "swa_head_dim", "index_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("kv_channels", "v_head_dim", "qk_nope_head_dim", "dim_head"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "dff", "dim_ff", "ffn_hidden_size"), 80),
    **dict.fromkeys(("intermediate_size_mlp", "dense_intermediate_size"), 88),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 40),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 56),
    **dict.fromkeys(("shared_experts_intermediate_size",), 56),
    **dict.fromkeys(("moe_shared_expert_intermediate_size",), 56),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), POSITIONS),
    **dict.fromkeys(("model_max_length", "original_max_position_embeddings"), POSITIONS),
    **dict.fromkeys(("context_length",), POSITIONS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts",), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("topk_group",), 1),
    **dict.fromkeys(("n_group", "num_expert_group"), 2),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size"), 8),
    **dict.fromkeys(("window_size", "keep_window_size", "local_attention"), 8),
    **dict.fromkeys(("attention_chunk_size", "index_topk"), 8),
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "rotary_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 16,
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 6),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 2),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "block_size"), 16),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 3),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    "unpadded_vocab_size": VOCAB - 6,
    "hidden_size_per_layer_input": 24,
    "laurel_rank": 12,
    "lru_width": 64,
    "word_embed_proj_dim": HIDDEN,
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    "o_lora_rank": 12,
    "o_groups": 2,
    "index_block_size": 4,
    "index_topk_blocks": 2,
    "router_hidden_size": 36,
    "gated_norm_rank": 12,
}
_KV_HEADS = ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads")
_PER_LAYER = ("layer_types", "mlp_layer_types", "indexer_types")
# Their third or fourth layer is of another kind, which stands in none of these lists.
_DEEP = {
    "beam", "dory", "flint", "inkling_text", "inkling2_text", "inkling2_loop_text",
    "modernbert-decoder", "nemotron_h", "recurrent_gemma", "smollm3", "zaya",
}  # fmt: skip

_MOE = {"num_experts_per_tok": 2, "first_k_dense_replace": 1}
_SLIDING_FULL = ["sliding_attention", "full_attention"] * 2
_LINEAR_FULL = ["linear_attention", "full_attention"] * 2
_DENSE_SPARSE = {"mlp_layer_types": ["dense", "sparse"] * 2}
_GEMMA4 = {
    "layer_types": _SLIDING_FULL,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "num_kv_shared_layers": 2,
}

# What the general rules get wrong, by type.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "use_cache": False,
        "encoder_hash_byte_group_vocab": 50,
        "patcher_config": {"head_dim": 12},
        "encoder_config": {"head_dim": 12, "hidden_size_global": 64},
        "decoder_config": {"head_dim": 12, "hidden_size_global": 64},
        "global_config": {"head_dim": 16, "hidden_size": 64},
    },
    "cohere_compass_text": {
        "layer_types": _SLIDING_FULL,
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [3, 3, 2],
            },
            "full_attention": None,
        },
    },
    "cohere2_moe": _DENSE_SPARSE,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"moe_top_k": 2},
    },
    "deepseek_v2": _MOE,
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, **_MOE},
    "dots3_note_text": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": 28,
        "swa_kv_lora_rank": 20,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "ernie4_5_moe": {"moe_layer_end_index": 3},
    "falcon_h1": {"mamba_d_ssm": 96},
    "gemma3n_text": {
        "layer_types": _SLIDING_FULL,
        "num_kv_shared_layers": 2,
        "intermediate_size": 80,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "gemma4_text": {
        **_GEMMA4,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 40,
    },
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoe_swa": {"shared_intermediate_size": 56},
    "granitemoehybrid": {"layer_types": _LINEAR_FULL},
    "granitemoeshared": {"shared_intermediate_size": 56},
    "helium": {"head_dim": 12},
    "hrm_text": {"num_hidden_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"zero_expert_num": 2},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "mamba2": {"num_heads": 6},
    "minimax_m3_vl_text": _DENSE_SPARSE,
    "ministral": {"head_dim": 16, "layer_types": _SLIDING_FULL},
    "mllama": {"text_config": {"cross_attention_layers": [1, 3]}},
    "nemotron": {"num_key_value_heads": 2},
    "phi4_multimodal": {"audio_config": {"nemo_conv_channels": 16}},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "qwen3_next": {"mlp_only_layers": [1]},
    "qwen4_exp_text": {
        "ple_layer_ids": [1],
        "eos_token_id": 2,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
        "hc_lowrank": 12,
        "ple_embed_dim": 32,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "qwen2_5_vl_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [2, 2, 2],
        },
    },
    "reformer": {
        "hash_seed": 0,
        "is_decoder": True,
        "attn_layers": ["local", "lsh"] * 2,
        "attention_head_size": 16,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 32],
        "feed_forward_size": 80,
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
        "num_buckets": 2,
        "use_cache": False,
    },
    "rwkv": {"attention_hidden_size": HIDDEN},
    "stablelm": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention"] * 2 + ["hybrid", "linear_attention"] * 2,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "num_mem_blocks": 2,
        "adapter_rank": 12,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
        "use_shared_attention_adapter": True,
    },
}


def _is_too_old(model_type: str) -> bool:
    return Version(transformers.__version__) < Version(_SINCE.get(model_type, "0"))


def require(model_type: str) -> None:
    """Skips the test where the installed transformers is too old for a type."""
    if _is_too_old(model_type):
        pytest.skip(f"{model_type} needs transformers {_SINCE[model_type]}")


def require_running(model: PreTrainedModel) -> None:
    """Skips the test where another release than the page's does not run a type by itself.

    In older ones some fail in a small shape, or ask for kernels.
    """
    if transformers.__version__ in TABLE:
        return
    try:
        with torch.inference_mode():
            model(input_ids=torch.arange(20, 32)[None])
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        pytest.skip(f"transformers {transformers.__version__} does not run it: {error}")


def decoder_only_types() -> list[str]:
    """Every decoder-only text type registered for ``AutoModelForCausalLM``."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return [name for name in known if name not in EXCLUDED and not _is_too_old(name)]


def _small(name: str, value: Any, defaults: dict[str, Any]) -> Any:
    """The tiny value for one attribute of a default config, or ``value`` to leave it."""
    if isinstance(value, bool) or value is None:
        return value
    if name.endswith("_token_id"):
        return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}.get(name, 3)
    if "drop" in name and isinstance(value, float):
        return 0.0
    if name == "head_dim" and value == defaults.get("qk_rope_head_dim"):
        return _SIZES["qk_rope_head_dim"]
    if name in _KV_HEADS:
        heads = defaults.get("num_attention_heads", defaults.get("n_head"))
        return HEADS if value == heads else min(value, 2)
    if name in _SIZES and isinstance(value, int):
        return min(value, _SIZES[name])
    return value


def _spread(kinds: list[str], layers: int) -> list[str]:
    """``layers`` layers in which every kind occurs, in the order of the default config."""
    unique = list(dict.fromkeys(kinds))
    return [unique[i % len(unique)] for i in range(layers)]


def _few_layers(kind: str, values: dict[str, Any]) -> bool:
    """Whether ``FEW`` layers hold one of each kind that a default config has."""
    kinds = (set(values.get(name) or ()) for name in _PER_LAYER)
    return kind not in _DEEP and all(len(found) <= FEW for found in kinds)


def shrunk(
    config_class: type[PretrainedConfig], overrides: dict[str, Any], shallow: bool = False
) -> PretrainedConfig:
    """``config_class`` with tiny sizes; what is not passed is derived by the class itself."""
    default = config_class()
    values = default.to_dict()
    kwargs: dict[str, Any] = {}
    few = shallow and not overrides and _few_layers(config_class.model_type, values)
    layers = FEW if few else LAYERS
    for name, value in values.items():
        if name in config_class.sub_configs:
            part = getattr(default, name)
            kwargs[name] = part and shrunk(type(part), overrides.get(name, {}), shallow)
        elif name in overrides:
            continue
        elif name in _PER_LAYER and value and len(set(value)) > 1:
            kwargs[name] = _spread(value, layers)
        elif name in _COUNTS and few:
            kwargs[name] = min(value, FEW)
        elif (small := _small(name, value, values)) != value:
            kwargs[name] = small
    direct = {k: v for k, v in overrides.items() if k not in config_class.sub_configs}
    return config_class(**kwargs, **direct)


def tiny_config(model_type: str, shallow: bool = False) -> PretrainedConfig:
    """A config of ``model_type`` with every kind of layer that the architecture has."""
    overrides = _OVERRIDES.get(model_type, {})
    if "text_config" in CONFIG_MAPPING[model_type].sub_configs:  # a wrapper of a type with `_text`
        overrides = {"text_config": _OVERRIDES.get(f"{model_type}_text", {})} | overrides
    return shrunk(CONFIG_MAPPING[model_type], overrides, shallow)


def _built(auto: Any, config: PretrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomise(model, seed)
    # As a checkpoint says it: one configuration, one proof of its architecture a process.
    model.config.architectures = [type(model).__name__]
    return model.eval()


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random model: float32, eager attention, eval mode, every parameter random."""
    return _built(AutoModelForCausalLM, tiny_config(model_type), seed)


def tiny_vision_language_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """The same for a vision-language type, whose checkpoints hold a text decoder among others."""
    return _built(AutoModelForImageTextToText, tiny_config(model_type), seed)


def shallow_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """As :func:`tiny_model`, with no more layers than it takes to have one of each kind."""
    return _built(AutoModelForCausalLM, tiny_config(model_type, shallow=True), seed)


def shallow_vision_language_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """The same for a vision-language type."""
    return _built(AutoModelForImageTextToText, tiny_config(model_type, shallow=True), seed)
