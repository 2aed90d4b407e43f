"""Small checkpoints in the formats with scales that are published: FP8 and MXFP4."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig

WIDTH, INNER, EXPERTS, LAYERS = 64, 96, 4, 3


def save_gpt_oss(folder: Path, tokenizer_dir: Path) -> None:
    """A random gpt-oss whose experts are MXFP4 and the rest bfloat16."""
    config = GptOssConfig(
        vocab_size=512, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=EXPERTS,
        num_experts_per_tok=2, max_position_embeddings=256, sliding_window=16, pad_token_id=0,
        eos_token_id=2, bos_token_id=None,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
    )  # fmt: skip
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = {}
    for name, tensor in model.state_dict().items():
        gain = 1.0 if name.endswith("norm.weight") else 0.0
        value = (gain + 0.2 * torch.randn(tensor.shape)).to(torch.bfloat16)
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = value
            continue
        experts, inputs, outputs = tensor.shape  # stored transposed, and packed
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 125, shape, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    document = config.to_dict() | {
        "architectures": ["GptOssForCausalLM"],
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                       "model.embed_tokens", "lm_head"],
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(document))
    for file in tokenizer_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def to_fp8(
    matrix: torch.Tensor, size: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales of a matrix in blocks of ``size`` x ``size``, by the format's book."""
    rows, columns = -(-matrix.shape[0] // size), -(-matrix.shape[1] // size)
    values = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, columns, dtype=scale_dtype)
    for i in range(rows):
        for j in range(columns):
            tile = (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
            scale = matrix[tile].abs().max().float() / 448
            if scale_dtype == torch.float8_e8m0fnu:  # powers of two, upwards
                scale = torch.exp2(torch.ceil(torch.log2(scale)))
            scales[i, j] = scale
            held = matrix[tile].float() / scales[i, j].float()
            values[tile] = held.clamp(-448, 448).to(values.dtype)
    return values, scales


def make_fp8(
    folder: Path,
    is_quantized: Callable[[str], bool],
    size: int,
    scale_dtype: torch.dtype,
    plain: Sequence[str] = (),
) -> None:
    """Store matrices of a checkpoint of one file as FP8, and the rest as bfloat16.

    Args:
        folder: the checkpoint, changed.
        is_quantized: which tensors.
        size: rows and columns that share a scale.
        scale_dtype: what scales are stored as.
        plain: modules that stay as they are, for the configuration.
    """
    path, tensors = folder / "model.safetensors", {}
    for name, tensor in load_file(path).items():
        if is_quantized(name) and tensor.ndim == 2:
            tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(tensor, size, scale_dtype)
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [size, size]}
    if plain:
        config["quantization_config"]["modules_to_not_convert"] = list(plain)
    (folder / "config.json").write_text(json.dumps(config))
