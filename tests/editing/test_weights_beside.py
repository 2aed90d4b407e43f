"""Safetensors beside the weights: a draft head comes along, a second copy of the model does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@pytest.fixture
def source(tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama", True), tmp_path / "source"))


@pytest.fixture
def direction(tmp_path: Path) -> Path:
    path = tmp_path / "d.safetensors"
    save_file({"direction": torch.randn(48, generator=torch.Generator().manual_seed(1))}, path)
    return path


def weights(source: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(source.glob("model-*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def draft_head() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "mtp.fc.weight": (48, 96),
        "mtp.layers.0.self_attn.o_proj.weight": (48, 48),
        "mtp.layers.0.mlp.down_proj.weight": (48, 80),
        "mtp.norm.weight": (48,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_a_draft_head_comes_along_and_verify_knows_it(
    source: Path, direction: Path, cli, fails, tmp_path: Path
) -> None:
    save_file(draft_head(), source / "mtp.safetensors")
    (source / "draft").mkdir()
    save_file(draft_head(), source / "draft" / "model.safetensors")
    out = tmp_path / "out"
    command = ("orthogonalize", source, "--direction", direction, "-o", out)
    check = ("verify", out, "--source", source, "--direction", direction)
    result = cli(*command)
    assert result.code == 0, result.err
    (note,) = [line for line in result.err.splitlines() if "mtp.safetensors" in line]
    assert "kept" in note
    assert (out / "mtp.safetensors").read_bytes() == (source / "mtp.safetensors").read_bytes()
    record = json.loads((out / "abliterate.json").read_text())
    assert record["beside"]["kept"] == ["draft/model.safetensors", "mtp.safetensors"]
    assert "mtp.safetensors" in record["files"]
    assert cli(*check).code == 0

    altered = draft_head()
    altered["mtp.norm.weight"][0] += 1
    save_file(altered, out / "mtp.safetensors")
    result = cli(*check)
    assert result.code == 6
    assert "mtp.safetensors is not the source's" in result.out + result.err
    (out / "mtp.safetensors").unlink()
    result = cli(*check)
    assert result.code == 6
    assert "mtp.safetensors is missing" in result.out + result.err

    left = cli(*command, "--overwrite", "--leave-behind", "mtp*")
    assert left.code == 0, left.err
    assert not (out / "mtp.safetensors").exists()
    assert (out / "draft" / "model.safetensors").exists()
    assert any("mtp.safetensors (as asked)" in line for line in left.err.splitlines())
    assert cli(*check).code == 0
    shutil.copy(source / "mtp.safetensors", out)
    assert "mtp.safetensors" in fails(*command, "--overwrite", code=2)
    line = fails(*command[:-1], tmp_path / "new", "--leave-behind", "medusa.safetensors", code=2)
    assert "--leave-behind medusa.safetensors" in line
    assert not (tmp_path / "new.partial").exists()


@pytest.mark.parametrize("kind", ["renamed writer", "same name", "second set", "rows", "damaged"])
def test_what_holds_the_unedited_model_stays_behind(
    kind: str, source: Path, direction: Path, cli, tmp_path: Path
) -> None:
    model = weights(source)
    extra, down = draft_head(), "model.layers.2.mlp.down_proj.weight"
    if kind == "renamed writer":
        extra["layers.2.feed_forward.w2.weight"] = model[down].bfloat16()
    elif kind == "same name":
        extra[down] = torch.randn(48, 80)
    elif kind == "second set":
        extra = {name.removeprefix("model."): tensor.half() for name, tensor in model.items()}
    elif kind == "rows":  # stored the other way round, as a second set by another library
        extra = {f"x.{n}": t.T.contiguous() if t.ndim == 2 else t for n, t in model.items()}
    save_file(extra, source / "consolidated.safetensors")
    if kind == "damaged":
        (source / "consolidated.safetensors").write_bytes(b"\xff" * 64)
    save_file(draft_head(), source / "mtp.safetensors")
    out = tmp_path / "out"
    result = cli("orthogonalize", source, "--direction", direction, "-o", out)
    assert result.code == 0, result.err
    (note,) = [line for line in result.err.splitlines() if "left behind" in line]
    assert "consolidated.safetensors (" in note
    assert not (out / "consolidated.safetensors").exists()
    assert load_file(out / "mtp.safetensors").keys() == draft_head().keys()
    check = ("verify", out, "--source", source, "--direction", direction)
    assert cli(*check).code == 0
    shutil.copy(source / "consolidated.safetensors", out)
    result = cli(*check)
    assert result.code == 6
    assert "consolidated.safetensors is not of the source" in result.out + result.err


def test_a_part_of_the_edit_keeps_the_same_files(
    source: Path, direction: Path, cli, tmp_path: Path
) -> None:
    """A writer that the options leave alone is one all the same."""
    writer = weights(source)["model.layers.3.self_attn.o_proj.weight"]
    save_file({"x": writer.clone()}, source / "head.safetensors")
    out = tmp_path / "out"
    command = ("orthogonalize", source, "--direction", direction, "-o", out, "--layers", "0-1")
    assert cli(*command).code == 0
    assert not (out / "head.safetensors").exists()
