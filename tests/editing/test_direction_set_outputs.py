"""A direction for each layer in every kind of output: an adapter, quantised weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from quantized_models import make_fp8, make_scaled, plain_weights, save_gpt_oss
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from abliterate import ablate
from abliterate.direction_set import DirectionSet

LAYERS, WIDTH = 4, 48


def _rows(layers: int = LAYERS, width: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(layers, width, generator=generator, dtype=torch.float64)


def _save(path: Path, rows: torch.Tensor) -> Path:
    save_file({"directions": rows}, path)
    return path


@pytest.fixture(scope="module")
def held(tmp_path_factory) -> Path:
    return _save(tmp_path_factory.mktemp("set") / "set.safetensors", _rows())


def _without(name: str, matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The matrix less its own layer's direction, float64."""
    unit = rows[0 if "embed" in name else int(name.split(".")[2])]
    unit = unit / unit.norm()
    if "embed" in name:
        return matrix - torch.outer(matrix @ unit, unit)
    return matrix - torch.outer(unit, unit @ matrix)


def test_an_adapter_by_layer_is_the_checkpoint(tiny, cli, held: Path, tmp_path: Path) -> None:
    source, adapter, whole = tiny("llama", True), tmp_path / "adapter", tmp_path / "whole"
    base = ("orthogonalize", source, "--direction", held, "--json", "-o")
    made = cli(*base, adapter, "--as-lora")
    assert made.code == 0, made.err
    assert made.json["promise"]["stream_orthogonal"] is False
    assert cli(*base, whole).code == 0
    held_by, before = load_file(adapter / "adapter_model.safetensors"), {}
    for shard in source.glob("*.safetensors"):
        before |= load_file(shard)
    for name in (f"layers.{layer}.{part}" for layer in range(LAYERS)
                 for part in ("self_attn.o_proj", "mlp.down_proj")):  # fmt: skip
        key, weight = f"model.{name}.weight", before[f"model.{name}.weight"].double()
        up, down = (
            held_by[f"base_model.model.model.{name}.lora_{side}.weight"].double() for side in "BA"
        )
        assert torch.allclose(weight + up @ down, _without(key, weight, _rows()), atol=1e-6), name
    found = cli("audit", adapter, "--base", source, "--json")
    assert found.code == 7, found.err
    assert len(found.json["base"]["projected"]) == 1 + 2 * LAYERS
    assert "by layer" in found.json["base"]["form"]["kinds"]
    peft = pytest.importorskip("peft", reason="the extra [lora] is not installed")
    ids = torch.arange(3, 12)[None]
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad(), ablate(plain, DirectionSet(_rows())):
        hooks = plain(ids).logits
    loaded = peft.PeftModel.from_pretrained(plain, adapter).eval()
    edited = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = loaded(ids).logits
        assert (logits - edited(ids).logits).abs().max() < 1e-4
    assert (logits - hooks).abs().max() < 1e-4


# The largest error of a number: of its size, and of the largest of its tensor.
_ROUNDING = {"fp8-tensor": (2**-4, 2**-17), "fp8-blocks": (2**-4, 2**-17),
             "W8A16-fp8-channel": (2**-4, 2**-17), "W8A8-int8": (0.0, 0.6 / 127),
             "W8A16-int8-packed": (0.0, 0.6 / 127)}  # fmt: skip


@pytest.mark.parametrize("form", ["--requantize", "--dequantize"])
@pytest.mark.parametrize("name", _ROUNDING)
def test_quantised_weights_lose_their_own_layers_direction(
    name: str, form: str, tiny, cli, held: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny("llama"), source)
    if name == "fp8-blocks":
        make_fp8(source, lambda key: "proj" in key, 16, torch.float32)
    else:
        make_scaled(source, name)
    base = ("--direction", held)
    made = cli("orthogonalize", source, *base, "-o", out, form, "--json")
    assert made.code == 0, made.err
    before, after = plain_weights(source), plain_weights(out)
    edited = {one["name"].removesuffix("_packed") for one in made.json["tensors"]}
    assert len(edited) == 1 + 2 * LAYERS
    relative, of_largest = _ROUNDING[name] if form == "--requantize" else (2**-8, 1e-6)
    for key in edited:
        exact = _without(key, before[key], _rows())
        allowed = exact.abs() * max(relative, 2**-8) + exact.abs().max() * of_largest
        assert bool(((after[key] - exact).abs() <= 1.01 * allowed + 1e-9).all()), key
        assert not torch.allclose(exact, _without(key, before[key], _rows().roll(1, 0)), atol=0.05)
    checks = (*base, "--source", source), ("--direction", out / "abliterate.json")
    for options in checks:
        checked = cli("verify", out, *options)
        assert checked.code == 0, checked.out + checked.err
    other = _save(tmp_path / "other.safetensors", _rows().roll(1, 0))
    assert cli("verify", out, "--direction", other).code == 6


def test_experts_in_four_bits_lose_their_own_layers_direction(
    tokenizer_dir: Path, cli, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    save_gpt_oss(source, tokenizer_dir)
    config = json.loads((source / "config.json").read_text())
    rows = _rows(config["num_hidden_layers"], config["hidden_size"])
    base = ("--direction", _save(tmp_path / "set.safetensors", rows))
    made = cli("orthogonalize", source, *base, "-o", out, "--dequantize", "--json")
    assert made.code == 0, made.err
    checked = cli("verify", out, *base, "--source", source)
    assert checked.code == 0, checked.out + checked.err
    experts = "model.layers.1.mlp.experts.down_proj"
    tensor = {k: v for p in out.glob("*.safetensors") for k, v in load_file(p).items()}[experts]
    shares = [
        (tensor.double() @ (row / row.norm())).norm() / tensor.double().norm() for row in rows
    ]
    assert shares[1] < 0.01 < min(shares[0], shares[2])
