"""A gpt-oss checkpoint as it is published: MXFP4 experts, through the planner and the CLI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantized_models import EXPERTS, INNER, LAYERS, WIDTH, save_gpt_oss
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6.0])
DOWN = [f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(LAYERS)]


def decode(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``[E, rows, columns]`` of ``[E, rows, groups, 16]`` bytes, by the format's definition."""
    pairs = torch.stack((FP4[(blocks & 15).int()], FP4[(blocks >> 4).int()]), -1).flatten(-2)
    return (pairs.double() * torch.exp2(scales.double() - 127).unsqueeze(-1)).flatten(-2)


def without(matrix: torch.Tensor, axis: int, unit: torch.Tensor) -> torch.Tensor:
    moved = matrix.double().movedim(axis, -1)
    return (moved - (moved @ unit).unsqueeze(-1) * unit).movedim(-1, axis)


@pytest.fixture(scope="module")
def unit() -> torch.Tensor:
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return vector / vector.norm()


@pytest.fixture(scope="module")
def direction(unit: torch.Tensor, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    save_file({"direction": 3 * unit}, path)
    return path


@pytest.fixture(scope="module")
def source(tokenizer_dir: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpt-oss")
    save_gpt_oss(folder, tokenizer_dir)
    return folder


def stream(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the residual stream at every block's input, as transformers computes them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        out = model.float()(ids, output_hidden_states=True)
    return out.logits[0], torch.stack(out.hidden_states[:-1])[:, 0]  # the last is normalised


def leak(hidden: torch.Tensor, unit: torch.Tensor) -> float:
    wide = hidden.double()
    return float(((wide @ unit).abs() / wide.norm(dim=-1)).max())


def spoil(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def failure(result) -> str:
    """What the one line says of a tensor that is not the edit."""
    assert result.code == 6, result.out
    (line,) = (x for x in result.out.splitlines() if x.startswith("not the edit: "))
    return line.removeprefix("not the edit: ")


def test_it_needs_a_choice(source: Path, direction: Path, fails, tmp_path: Path) -> None:
    line = fails("orthogonalize", source, "--direction", direction, "-o", tmp_path / "o", code=4)
    assert f"'{DOWN[0]}_blocks' is stored as MXFP4" in line
    assert "--requantize" in line
    assert "--dequantize" in line
    assert not list(tmp_path.iterdir())


def test_every_expert_is_a_writer(source: Path, cli) -> None:
    document = cli("writers", source, "--json").json
    assert document["exact"]
    tensors = {name for writer in document["writers"] for name in writer["tensors"]}
    assert {*DOWN, *(f"{name}_bias" for name in DOWN)} <= tensors
    assert "model.embed_tokens.weight" in tensors
    assert not [name for name in tensors if "gate_up" in name or "router" in name]


def test_dequantized_nothing_is_left(
    source: Path, direction: Path, unit: torch.Tensor, cli, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    base = ("--direction", direction)
    result = cli("orthogonalize", source, *base, "-o", out, "--dequantize", "--json")
    assert result.code == 0, result.err
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    for name in DOWN:
        plain = decode(before[f"{name}_blocks"], before[f"{name}_scales"]).transpose(1, 2)
        assert after[name].dtype == torch.bfloat16
        assert after[name].shape == (EXPERTS, INNER, WIDTH)
        assert torch.allclose(after[name].double(), without(plain, 2, unit), atol=2e-3, rtol=8e-3)
    assert not [name for name in after if name.endswith(("_blocks", "_scales"))]
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert max(entry["after"] for entry in result.json["tensors"]) < 2e-3
    assert result.json["promise"]["stream_orthogonal"] is True
    (logits, hidden), (original, old_hidden) = stream(out), stream(source)
    assert leak(hidden, unit) < 1e-3 < 0.05 < leak(old_hidden, unit)
    assert not torch.allclose(logits, original, atol=1e-2)
    checked = cli("verify", out, *base, "--forward", "--json")
    assert checked.code == 0, checked.out
    assert checked.json["leak"] < 1e-3
    checked = cli("verify", out, *base, "--source", source)
    assert checked.code == 0, checked.out
    spoil(out, lambda tensors: tensors[DOWN[1]][2].copy_(-tensors[DOWN[1]][2]))
    assert failure(cli("verify", out, *base, "--source", source)).startswith(DOWN[1])


def test_requantized_reports_what_rounding_leaves(
    source: Path, direction: Path, unit: torch.Tensor, cli, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = cli(
        "orthogonalize", source, "--direction", direction, "-o", out, "--requantize", "--json"
    )
    assert result.code == 0, result.err
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    entries = {entry["name"]: entry for entry in result.json["tensors"]}
    for name in DOWN:
        old, new = (decode(t[f"{name}_blocks"], t[f"{name}_scales"]) for t in (before, after))
        exact = without(old, 1, unit)
        assert (new - exact).norm() / exact.norm() < 0.12
        entry = entries[f"{name}_blocks"]
        for key, matrix in (("before", old), ("after", new)):
            share = float(torch.einsum("erc,r->ec", matrix, unit).norm() / old.norm())
            assert entry[key] == pytest.approx(share, rel=1e-3)
        assert entry["after"] < entry["before"] / 3
    for name in before.keys() - {f"{n}_{part}" for n in DOWN for part in ("blocks", "scales")}:
        assert (name in entries) != torch.equal(before[name], after[name]), name
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert result.json["promise"]["tensors_orthogonal"] is False
    assert "rounded again" in result.json["promise"]["limits"][0]
    assert leak(stream(out)[1], unit) < leak(stream(source)[1], unit) / 3
    base = ("verify", out, "--direction", direction)
    for more in ((), ("--source", source)):
        checked = cli(*base, *more)
        assert checked.code == 0, checked.out
    codes, scales = f"{DOWN[0]}_blocks", f"{DOWN[0]}_scales"

    def skip(tensors: dict[str, torch.Tensor]) -> None:  # one expert
        tensors[codes][1], tensors[scales][1] = before[codes][1], before[scales][1]

    def nudge(tensors: dict[str, torch.Tensor]) -> None:  # by one step of one number
        tensors[codes][0, 0, 0, 0] ^= 1

    for change in (skip, nudge, lambda t: t[codes].zero_(), lambda t: t[scales].add_(1)):
        save_file(after, out / "model.safetensors", {"format": "pt"})
        spoil(out, change)
        assert failure(cli(*base, "--source", source)).startswith(f"{codes} ")


def test_requantized_rows_keep_their_norms(
    source: Path, direction: Path, cli, tmp_path: Path
) -> None:
    out, base = tmp_path / "out", ("--direction", direction)
    options = ("--requantize", "--norm-preserve", "--scale", "0.7")
    assert cli("orthogonalize", source, *base, "-o", out, *options).code == 0
    checked = cli("verify", out, *base, "--source", source)
    assert checked.code == 0, checked.out
