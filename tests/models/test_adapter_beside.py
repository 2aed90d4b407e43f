"""An adapter that lies beside a model is no part of it, for whatever reads the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.models.loading import load_model

LORA = {
    "peft_type": "LORA",
    "base_model_name_or_path": "base",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["o_proj"],
    "task_type": "CAUSAL_LM",
}


def lay_adapter(folder: Path) -> None:
    """A LoRA of random values on every attention output."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(LORA))
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (2, 48), "B": (48, 2)}
    values = {
        f"base_model.model.model.layers.{i}.self_attn.o_proj.lora_{side}.weight": torch.randn(
            shape, generator=generator
        )
        for i in range(4)
        for side, shape in shapes.items()
    }
    save_file(values, folder / "adapter_model.safetensors")


@pytest.fixture
def merged(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A model with an adapter left in its folder, and another in a folder of its own below."""
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "merged"))
    lay_adapter(folder)
    lay_adapter(folder / "checkpoint-10")
    return folder


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    path = tmp_path / "direction.safetensors"
    generator = torch.Generator().manual_seed(2)
    save_file({"direction": torch.randn(48, generator=generator)}, path)
    return path


def test_the_model_is_loaded_without_the_adapter(merged: Path, tiny) -> None:
    pytest.importorskip("peft")
    plain = dict(load_model(str(tiny("llama")), "cpu").model.named_parameters())
    loaded = dict(load_model(str(merged), "cpu").model.named_parameters())
    assert loaded.keys() == plain.keys()
    assert all(torch.equal(loaded[name], plain[name]) for name in plain)


@pytest.mark.parametrize("offload", ["--offload", "--no-offload"])
def test_extract_reads_the_model_that_is_edited(
    offload: str, merged: Path, tiny, cli, tmp_path: Path
) -> None:
    options = ("--n-train", "4", "--no-filter", "--refusal-token", "I", offload, "-q")
    for name, model in (("with", merged), ("without", tiny("llama"))):
        assert cli("extract", model, "-o", tmp_path / name, *options).code == 0
    one, other = (load_file(tmp_path / n / "directions.safetensors") for n in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_nothing_of_the_adapter_is_carried(
    merged: Path, vector: Path, tiny, cli, tmp_path: Path
) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    result = cli("orthogonalize", merged, "--direction", vector, "-o", out)
    assert result.code == 0, result.err
    (note,) = [line for line in result.err.splitlines() if "left behind" in line]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert name in note
        assert f"checkpoint-10/{name}" in note
    assert not list(out.rglob("adapter*"))
    assert cli("orthogonalize", tiny("llama"), "--direction", vector, "-o", plain).code == 0
    edited = (out / "model.safetensors").read_bytes()
    assert edited == (plain / "model.safetensors").read_bytes()
    assert cli("verify", out, "--source", merged, "--direction", vector).code == 0
    forward = ("verify", out, "--direction", vector, "--forward", "--n-prompts", "2")
    assert cli(*forward).code == 0
    assert cli("audit", merged).code == cli("audit", tiny("llama")).code


def test_an_edited_model_with_an_adapter_beside_it_is_still_audited(
    merged: Path, vector: Path, cli, tmp_path: Path
) -> None:
    """Its record is checked against the weights, which the adapter does not change."""
    out = tmp_path / "out"
    assert cli("orthogonalize", merged, "--direction", vector, "-o", out).code == 0
    before = cli("audit", out, "--json").json
    lay_adapter(out)
    assert cli("audit", out, "--json").json | {"model": before["model"]} == before


def test_an_adapter_alone_says_what_to_do(tmp_path: Path, tiny, vector, fails, cli) -> None:
    lora = tmp_path / "lora"
    assert (
        cli("orthogonalize", tiny("llama"), "--direction", vector, "-o", lora, "--as-lora").code
        == 0
    )
    configured = Path(shutil.copytree(lora, tmp_path / "configured"))
    shutil.copy(tiny("llama") / "config.json", configured)
    pickled = Path(shutil.copytree(configured, tmp_path / "pickled"))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    for folder in (lora, configured, pickled):
        for command in (
            ("extract", folder, "-o", tmp_path / "run", "--no-offload"),
            ("extract", folder, "-o", tmp_path / "run"),
            ("orthogonalize", folder, "--direction", vector, "-o", tmp_path / "out"),
            ("audit", folder),
        ):
            line = fails(*command, code=4)
            assert "PEFT adapter and no model" in line
            assert "merge" in line
            assert str(folder) in line
