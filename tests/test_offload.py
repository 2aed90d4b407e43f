"""Streaming the layers from disk gives what the model in memory gives, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

COMMON = ("--no-filter", "--refusal-token", "I", "--n-train", "12", "--dtype", "float32")


def _means(run: Path) -> torch.Tensor:
    tensors = load_file(run / "directions.safetensors")
    return torch.stack([tensors["mean_harmful"], tensors["mean_harmless"]])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "mistral"])
def test_extraction_equals_that_of_the_model_in_memory(kind: str, tiny, cli, tmp_path) -> None:
    model = tiny(kind, sharded=True)
    for mode in ("--offload", "--no-offload"):
        result = cli("extract", model, "-o", tmp_path / mode, *COMMON, mode)
        assert result.code == 0, result.err
    streamed, plain = (_means(tmp_path / mode) for mode in ("--offload", "--no-offload"))
    assert (streamed - plain).norm() <= 1e-5 * plain.norm()
    record = json.loads((tmp_path / "--offload" / "extract.json").read_text())
    assert record["offload"]["passes"] == 1
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    # Every weight once; of the embedding, here kept in memory, all rows.
    assert 0.8 * size < record["offload"]["bytes_read"] <= size
