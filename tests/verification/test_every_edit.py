"""``verify`` accepts whatever ``orthogonalize`` makes: each format with each option."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures.zoo import tiny_model
from quantized_models import SCALED, make_fp8, make_scaled, save_gpt_oss
from safetensors.torch import load_file, save_file

BLOCK = 16
OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "scale": ("--scale", "1.3", "--layers", "0-1"),
    "parts": ("--components", "attention,embedding"),
    "rows": ("--norm-preserve",),
    "columns": ("--norm-preserve", "columns"),
    "columns of a share": ("--norm-preserve", "columns", "--scale", "0.5"),
    "share": ("--tied-embeddings", "share"),
    "skip": ("--tied-embeddings", "skip"),
}


def _with_draft_head(folder: Path) -> None:
    """Layers for guessing ahead, in the index but not of the model that is loaded."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    head = {
        f"mtp.{name.removeprefix('model.')}": tensor + 0.01
        for name, tensor in tensors.items()
        if ".layers.0." in name and "proj" in name
    }
    head["mtp.fc.weight"] = torch.randn(32, 64).bfloat16()
    assert len(head) > 1
    save_file(tensors | head, path, {"format": "pt"})


@pytest.fixture(scope="module")
def make(tiny, tokenizer_dir: Path, tmp_path_factory) -> Callable[[str], Path]:
    """A small checkpoint in a format, made once."""
    made: dict[str, Path] = {}

    def build(name: str) -> Path:
        folder = tmp_path_factory.mktemp("source") / "model"
        kind, _, form = name.partition(" ")
        if kind == "gpt-oss":
            folder.mkdir()
            save_gpt_oss(folder, tokenizer_dir)
            return folder
        if kind in ("mixtral", "qwen3_next"):
            tiny_model(kind).to(torch.bfloat16).save_pretrained(folder)
        else:
            dtype = {"float32": torch.float32, "float16": torch.float16}.get(form, torch.bfloat16)
            shutil.copytree(tiny(kind, form == "shards", dtype), folder)
        if kind == "qwen3_next":
            _with_draft_head(folder)
        if form in SCALED:
            make_scaled(folder, form)
        scales = {"F32": torch.float32, "BF16": torch.bfloat16, "E8M0": torch.float8_e8m0fnu}
        if form in scales:
            make_fp8(
                folder,
                lambda tensor: "proj" in tensor and "in_proj_ba" not in tensor,
                BLOCK,
                scales[form],
                ("lm_head", "model.embed_tokens"),
            )
        return folder

    def once(name: str) -> Path:
        if name not in made:
            made[name] = build(name)
        return made[name]

    return once


def _width(source: Path) -> int:
    config = json.loads((source / "config.json").read_text())
    return int(config["hidden_size"])


_PLAIN = ("llama float32", "llama float16", "qwen2 shards", "mixtral bfloat16")
_QUANTIZED = (
    *("llama F32", "qwen2 BF16", "llama E8M0", "gpt-oss mxfp4", "qwen3_next BF16"),
    *("llama fp8-tensor", "llama W8A16-fp8-channel", "llama W8A16-int8-packed"),
    "llama W8A16-int8-groups",
)
# What of the options meets the scales, which is all that the formats of SCALED have of their own.
_OF_SCALES = {"--requantize": ("plain", "columns"), "--dequantize": ("plain",)}


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        *((name, ()) for name in _PLAIN),
        *((name, (c,)) for name in _QUANTIZED for c in ("--requantize", "--dequantize")),
    ],
)
def test_verify_accepts_every_format_with_every_option(
    name: str, choice: tuple[str, ...], make, cli, tmp_path: Path
) -> None:
    source, direction = make(name), tmp_path / "direction.safetensors"
    generator = torch.Generator().manual_seed(6)
    vector = torch.randn(_width(source), generator=generator, dtype=torch.float64)
    save_file({"direction": vector}, direction, {"layer": "2", "position": "-1"})
    refused = dict[str, str]()
    for label, options in OPTIONS.items():
        if label in ("share", "skip") and not name.startswith("qwen2 "):
            continue  # nothing is tied there: it would be the plain edit again
        if name.partition(" ")[2] in SCALED and label not in _OF_SCALES[choice[0]]:
            continue
        out = tmp_path / label
        base = ("--direction", direction)
        # Of gpt-oss the experts alone are small numbers: elsewhere the choice would do nothing.
        chosen = () if name.startswith("gpt-oss") and label == "parts" else choice
        made = cli("orthogonalize", source, *base, "-o", out, *options, *chosen, "--json")
        assert made.code == 0, f"{label}: {made.err}"
        checked = cli("verify", out, *base, "--source", source)
        if checked.code != 0:
            refused[label] = checked.out + checked.err
        if label in ("plain", "columns"):  # nothing is left, whatever it was made from
            alone = cli("verify", out, *base)
            if alone.code != 0:
                refused[f"{label}, alone"] = alone.out + alone.err
        shutil.rmtree(out)
    assert not refused
    # And not anything: the source itself, with the record of an edit.
    out = tmp_path / "unedited"
    assert cli("orthogonalize", source, *base, "-o", out, *choice).code == 0
    record = (out / "abliterate.json").read_bytes()
    shutil.rmtree(out)
    shutil.copytree(source, out)
    (out / "abliterate.json").write_bytes(record)
    assert cli("verify", out, *base, "--source", source).code == 6
