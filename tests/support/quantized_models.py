"""Small checkpoints in the formats with scales that are published: FP8, INT8 and MXFP4."""

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


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """As ``save_file``, which before safetensors 0.6 knows no E8M0: it gets bytes, named after."""
    exponents = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e8m0fnu}
    known = {n: t.view(torch.uint8) if n in exponents else t for n, t in tensors.items()}
    save_file(known, path, {"format": "pt"})
    if not exponents:
        return
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for name in exponents:
        header[name]["dtype"] = "F8_E8M0"
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


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
    _save(tensors, path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [size, size]}
    if plain:
        config["quantization_config"]["modules_to_not_convert"] = list(plain)
    (folder / "config.json").write_text(json.dumps(config))


def to_scaled(
    matrix: torch.Tensor, grid: tuple[int, int], scale_dtype: torch.dtype, integer: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales ``[grid]`` of a matrix whose parts share a scale each, by the book."""
    rows, columns = grid
    parts = matrix.float().view(rows, matrix.shape[0] // rows, columns, matrix.shape[1] // columns)
    largest = parts.abs().amax((1, 3), keepdim=True)
    scales = (largest / (127.0 if integer else 448.0)).to(scale_dtype)
    held = parts / scales.float()
    if integer:
        values = held.round().clamp(-127, 127).to(torch.int8)
    else:
        values = held.clamp(-448, 448).to(torch.float8_e4m3fn)
    return values.reshape(matrix.shape), scales.reshape(grid)


def from_scaled(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The matrix, float64, that values and scales of any grid stand for."""
    scales = scales.double().reshape(scales.shape if scales.ndim == 2 else (1, 1))
    for axis in (0, 1):
        scales = scales.repeat_interleave(values.shape[axis] // scales.shape[axis], axis)
    return values.double() * scales


def pack(values: torch.Tensor) -> torch.Tensor:
    """int8 ``[rows, columns]`` as compressed-tensors packs it: four to a word, from the low end."""
    rows, columns = values.shape
    codes = torch.zeros(rows, -(-columns // 4) * 4, dtype=torch.int64)
    codes[:, :columns] = values.long() + 128
    parts = codes.view(rows, -1, 4)
    words = sum(parts[..., i] << 8 * i for i in range(4))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack(words: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of ``pack``."""
    unsigned = words.long() & 0xFFFFFFFF
    parts = torch.stack([unsigned >> 8 * i & 255 for i in range(4)], -1)
    return (parts.flatten(1)[:, :columns] - 128).to(torch.int8)


def _scheme(kind: str, strategy: str, form: str, activations: int | None, **more: object) -> dict:
    inputs = None if activations is None else {"num_bits": activations, "type": kind}
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, **more}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "quantization_status": "compressed", "config_groups": {"group_0": group},
        "kv_cache_scheme": None, "sparsity_config": {"format": "dense"},
    }  # fmt: skip


#: By name: the configuration, the dtype of scales, how they divide a matrix, and how it is stored.
SCALED: dict[str, tuple[dict, torch.dtype, str, str]] = {
    # As transformers itself loads it, one scale per tensor; Mistral publishes so.
    "fp8-tensor": (
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        torch.float32, "scalar", "weight_scale_inv",
    ),
    "fbgemm-channel": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0,
         "modules_to_not_convert": ["lm_head"]},
        torch.float32, "rows", "weight_scale",
    ),
    "W8A8-fp8-tensor": (
        _scheme("float", "tensor", "float-quantized", 8), torch.bfloat16, "one", "weight_scale"
    ),
    "W8A16-fp8-channel": (
        _scheme("float", "channel", "naive-quantized", None), torch.bfloat16, "rows",
        "weight_scale",
    ),
    "W8A16-int8-packed": (
        _scheme("int", "channel", "pack-quantized", None), torch.bfloat16, "rows", "packed"
    ),
    "W8A16-int8-groups": (
        _scheme("int", "group", "pack-quantized", None, group_size=16), torch.float16, "groups",
        "packed",
    ),
    "W8A8-int8": (_scheme("int", "channel", "int-quantized", 8), torch.float32, "rows", "int"),
}  # fmt: skip


def make_scaled(folder: Path, name: str) -> None:
    """Store the linear layers of a checkpoint of one file in a format of ``SCALED``.

    Args:
        folder: the checkpoint, changed.
        name: of the format.
    """
    settings, scale_dtype, grid, stored = SCALED[name]
    path, tensors = folder / "model.safetensors", {}
    for key, tensor in load_file(path).items():
        if "proj" not in key:
            tensors[key] = tensor.bfloat16()
            continue
        rows, columns = tensor.shape
        cells = {"rows": (rows, 1), "groups": (rows, columns // 16)}.get(grid, (1, 1))
        integer = stored in ("packed", "int")
        values, scales = to_scaled(tensor, cells, scale_dtype, integer)
        if grid in ("scalar", "one"):
            scales = scales.reshape(() if grid == "scalar" else (1,))
            own = "activation_scale" if grid == "scalar" else "input_scale"
            tensors[key.replace("weight", own)] = torch.tensor(0.25).to(scale_dtype)
        if stored == "packed":
            tensors[f"{key}_packed"] = pack(values)
            tensors[f"{key}_shape"] = torch.tensor(values.shape)
        else:
            tensors[key] = values
        scale_name = "weight_scale_inv" if stored == "weight_scale_inv" else "weight_scale"
        tensors[key.replace("weight", scale_name)] = scales
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))


def plain_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of such a checkpoint, by its plain name, float64."""
    held, plain = load_file(folder / "model.safetensors"), {}
    for name, tensor in held.items():
        if name.endswith(("_scale", "_scale_inv", "weight_shape")):
            continue
        key = name.removesuffix("_packed")
        scales = held.get(f"{key}_scale_inv", held.get(f"{key}_scale"))
        values = tensor
        if name.endswith("_packed"):
            values = unpack(tensor, int(held[f"{key}_shape"][1]))
        plain[key] = tensor.double() if scales is None else from_scaled(values, scales)
    return plain
