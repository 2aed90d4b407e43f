"""FP8 and INT8 with a scale per tensor, row or group, as fp8, fbgemm and compressed-tensors store
them; and what other formats are told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from quantized_models import SCALED, make_scaled, plain_weights
from safetensors.torch import load_file, save_file

_FEW = ("--n-train", "8", "--positions=-1", "--refusal-token", "5", "--no-filter", "-q")


@pytest.fixture(scope="module")
def direction(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    vector = torch.randn(48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    vector[7] = 0.0  # a row that nothing is taken from
    save_file({"direction": vector}, path)
    return path


@pytest.fixture
def scaled(tiny, tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        folder = tmp_path / "source"
        shutil.copytree(tiny("llama"), folder)
        make_scaled(folder, name)
        return folder

    return make


def _without(matrix: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    return matrix - torch.outer(unit, unit @ matrix)


# The largest error of a number by its format: of its size, and of the largest under its scale.
_ROUNDING = {"fp8": (2**-4, 2**-17), "fbgemm": (2**-4, 2**-17), "int8": (0.0, 0.6 / 127)}


@pytest.mark.parametrize("name", SCALED)
def test_an_edit_is_the_projection_rounded_to_the_format(
    name: str, scaled, direction: Path, cli, tmp_path: Path
) -> None:
    source, out, wide = scaled(name), tmp_path / "out", tmp_path / "wide"
    base = ("orthogonalize", source, "--direction", direction, "--json")
    kept, plain = cli(*base, "-o", out, "--requantize"), cli(*base, "-o", wide, "--dequantize")
    assert (kept.code, plain.code) == (0, 0), kept.err + plain.err
    unit = load_file(direction)["direction"]
    unit = unit / unit.norm()
    before, after, dense = (plain_weights(folder) for folder in (source, out, wide))
    assert before.keys() == after.keys() == dense.keys()
    edited = {e["name"].removesuffix("_packed") for e in kept.json["tensors"]}
    edited -= {"model.embed_tokens.weight"}
    assert edited == {n for n in before if "o_proj" in n or "down_proj" in n}
    relative, of_largest = next(v for k, v in _ROUNDING.items() if k in name)
    for key in edited:
        exact = _without(before[key], unit)
        groups = exact
        if SCALED[name][2] in ("rows", "groups"):
            groups = exact.view(
                len(exact), -1, 16 if SCALED[name][2] == "groups" else exact.shape[1]
            )
            groups = groups.abs().amax(-1, keepdim=True).expand_as(groups).reshape(exact.shape)
        allowed = exact.abs() * relative * 1.01 + groups.abs() * of_largest * 1.01
        if SCALED[name][2] in ("scalar", "one"):
            allowed = exact.abs() * relative * 1.01 + exact.abs().max() * of_largest * 1.01
        assert bool(((after[key] - exact).abs() <= allowed + 1e-9).all()), key
        assert bool(((dense[key] - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()), key
    for key in before.keys() - edited - {"model.embed_tokens.weight"}:
        assert torch.equal(after[key], before[key])
        assert torch.equal(dense[key], before[key])
    old, new, flat = (load_file(f / "model.safetensors") for f in (source, out, wide))
    assert old.keys() == new.keys()
    assert all(new[k].dtype == t.dtype and new[k].shape == t.shape for k, t in old.items())
    assert not [k for k in new if "input_scale" in k and not torch.equal(new[k], old[k])]
    modules = {key.removesuffix(".weight") for key in edited}
    # Of a module that is plain now nothing is left: loaders refuse what they do not expect.
    assert {k for k in flat if k.rpartition(".")[0] in modules} == edited
    settings = json.loads((wide / "config.json").read_text())["quantization_config"]
    listed = settings.get("ignore", settings.get("modules_to_not_convert"))
    assert modules <= set(listed)
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_scale_of_the_whole_tensor_is_that_of_its_largest_number_after_the_edit(
    scaled, direction: Path, cli, tmp_path: Path, monkeypatch
) -> None:
    """In blocks of few rows, and where the edit makes the largest number larger."""
    monkeypatch.setattr("abliterate.editing.matrix_orthogonalization._BLOCK_ELEMENTS", 150)
    source, out = scaled("fp8-tensor"), tmp_path / "out"
    base = ("orthogonalize", source, "--direction", direction, "--requantize", "--scale", "-9")
    assert cli(*base, "-o", out).code == 0
    unit = load_file(direction)["direction"]
    unit = unit / unit.norm()
    new, before = load_file(out / "model.safetensors"), plain_weights(source)
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.2.self_attn.o_proj.weight"):
        exact = before[name] + 9 * torch.outer(unit, unit @ before[name])
        assert float(new[f"{name}_scale_inv"]) == pytest.approx(float(exact.abs().max()) / 448)
        assert float(new[name].double().abs().max()) == 448


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.10"),
    reason="transformers fails to widen a matrix of one scale, and says so",
)
def test_one_scale_per_tensor_is_loaded_for_its_activations(scaled, cli, tmp_path: Path) -> None:
    source, plain = scaled("fp8-tensor"), tmp_path / "plain"
    shutil.copytree(source, plain)
    tensors = {name: t.bfloat16() for name, t in plain_weights(source).items()}
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    means = []
    for folder in (source, plain):
        run = tmp_path / f"run of {folder.name}"
        done = cli("extract", folder, "-o", run, *_FEW, "--dtype", "bfloat16")
        assert done.code == 0, done.err
        means.append(load_file(run / "directions.safetensors")["mean_harmful"].flatten())
    assert torch.cosine_similarity(*means, dim=0) > 0.9999


def test_a_packed_row_may_end_within_a_word(scaled, direction: Path, cli, tmp_path: Path) -> None:
    """Rows of 78 numbers fill nineteen words and a half."""
    from quantized_models import pack, to_scaled, unpack

    source, out = scaled("W8A16-int8-packed"), tmp_path / "out"
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["intermediate_size"] = 78
    (source / "config.json").write_text(json.dumps(config))
    originals = {}
    for key, (rows, columns) in {
        "down_proj": (48, 78), "up_proj": (78, 48), "gate_proj": (78, 48)
    }.items():  # fmt: skip
        for layer in range(4):
            name = f"model.layers.{layer}.mlp.{key}.weight"
            matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(layer))
            values, tensors[f"{name}_scale"] = to_scaled(matrix, (rows, 1), torch.bfloat16, True)
            tensors[f"{name}_packed"] = pack(values)
            tensors[f"{name}_shape"] = torch.tensor(values.shape)
            originals[name] = values.double() * tensors[f"{name}_scale"].double()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    base = ("--direction", direction)
    made = cli("orthogonalize", source, *base, "-o", out, "--requantize", "--json")
    assert made.code == 0, made.err
    checked = cli("verify", out, *base, "--source", source)
    assert checked.code == 0, checked.out + checked.err
    new, name = load_file(out / "model.safetensors"), "model.layers.3.mlp.down_proj.weight"
    unit = load_file(direction)["direction"]
    exact = _without(originals[name], unit / unit.norm())
    held = unpack(new[f"{name}_packed"], 78).double() * new[f"{name}_scale"].double()
    assert float((held - exact).abs().max()) < float(exact.abs().max()) / 200


def test_a_number_of_another_row_is_no_rounding(
    scaled, direction: Path, cli, tmp_path: Path
) -> None:
    """verify knows a scale that is far too large for its row, and a code that is one off."""
    source, out = scaled("W8A8-int8"), tmp_path / "out"
    base = ("--direction", direction)
    assert cli("orthogonalize", source, *base, "-o", out, "--requantize").code == 0
    path, name = out / "model.safetensors", "model.layers.0.mlp.down_proj.weight"
    good = load_file(path)

    def verdict(**changed: torch.Tensor) -> int:
        save_file(good | {f"{name}{k}": t for k, t in changed.items()}, path, {"format": "pt"})
        return cli("verify", out, *base, "--source", source).code

    assert verdict() == 0
    codes = good[name].clone()
    codes[3, 5] += 2
    assert verdict(**{"": codes}) == 6
    scales, codes = good[f"{name}_scale"].clone(), good[name].clone()
    scales[3] *= 16
    codes[3] = (codes[3].float() / 16).round().to(torch.int8)
    assert verdict(**{"": codes, "_scale": scales}) == 6


def _weights(**of: object) -> dict:
    return {"config_groups": {"g": {"targets": ["Linear"], "weights": of}}}


_CT = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "gptq"}, "GPTQ"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "modelopt"}, "modelopt"),
        (_CT | _weights(num_bits=4, type="int"), "compressed-tensors INT4 W4A16 (pack-quantized)"),
        (
            _CT | _weights(num_bits=4, type="float") | {"format": "nvfp4-pack-quantized"},
            "compressed-tensors FP4 W4A16 (nvfp4-pack-quantized)",
        ),
        (
            _CT | _weights(num_bits=8, type="int") | {
                "sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}
            },
            "compressed-tensors 2:4 sparse (sparse-24-bitmask)",
        ),
        (_CT | _weights(num_bits=8, type="int", symmetric=False), "with zero points"),
        (
            _CT | _weights(num_bits=8, type="int")
            | {"transform_config": {"config_groups": {"u": {}}}},
            "with transforms",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_edited_is_named(
    settings: dict, named: str, tiny, direction: Path, fails, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny("llama"), source)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = settings
    (source / "config.json").write_text(json.dumps(config))
    line = fails("orthogonalize", source, "--direction", direction, "-o", tmp_path / "out", code=4)
    assert f"is quantized with {named}" in line or (named in line and "compressed-tensors" in line)
    assert "edit the checkpoint in bfloat16 or float16" in line
    assert not (tmp_path / "out").exists()


def test_a_zero_point_beside_a_weight_is_refused(
    scaled, direction: Path, fails, tmp_path: Path
) -> None:
    source = scaled("W8A8-int8")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight_zero_point"
    tensors[name] = torch.ones(48, 1, dtype=torch.int8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    line = fails(
        "orthogonalize", source, "--direction", direction, "-o", out, "--requantize", code=4
    )
    assert "weight_zero_point" in line
    assert "model.layers.1.mlp.down_proj.weight" in line
