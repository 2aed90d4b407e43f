"""A tied embedding whose output head is stored too, or alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from architectures.zoo import tiny_vision_language_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from abliterate import ablate
from abliterate.auditing.components import open_checkpoint
from abliterate.models.loading import Checkpoint

IDS = torch.randint(0, 512, (3, 11), generator=torch.Generator().manual_seed(5))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def direction(tmp_path: Path) -> Path:
    path = tmp_path / "direction.safetensors"
    vector = torch.randn(48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    save_file({"direction": vector}, path, {"layer": "2"})
    return path


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _source(tiny, folder: Path, stored: str, kind: str = "qwen2", key: bool = True) -> Path:
    """A tied checkpoint; ``stored`` says how the head lies on disk."""
    source = shutil.copytree(tiny(kind), folder / f"source-{stored}")
    tensors = _tensors(source)
    if stored == "alone":
        tensors[HEAD] = tensors.pop(EMBEDDING)
    else:
        tensors[HEAD] = tensors[EMBEDDING].clone()
        if stored == "different":
            tensors[HEAD] *= 1.5
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"] = True
    if not key:  # the class ties by itself
        del config["tie_word_embeddings"]
    (source / "config.json").write_text(json.dumps(config))
    return source


def _logits(folder: Path, direction: Path | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        if direction is None:
            return model(IDS).logits.double()
        with ablate(model, load_file(direction)["direction"]):
            return model(IDS).logits.double()


def _tied(folder: Path) -> object:
    return json.loads((folder / "config.json").read_text()).get("tie_word_embeddings")


@pytest.mark.parametrize(("kind", "key"), [("qwen2", True), ("gemma", False)])
@pytest.mark.parametrize("stored", ["equal", "different", "alone"])
def test_untying_a_stored_head_gives_what_ablation_gives(
    stored: str, kind: str, key: bool, tiny, cli, direction, tmp_path: Path
) -> None:
    source, out = _source(tiny, tmp_path, stored, kind, key), tmp_path / "out"
    base = ("--direction", direction)
    result = cli("orthogonalize", source, *base, "-o", out, "--json")
    assert result.code == 0, result.err
    assert result.json["promise"]["stream_orthogonal"] is True
    assert EMBEDDING in {entry["name"] for entry in result.json["tensors"]}
    before, after = _tensors(source), _tensors(out)
    assert _tied(out) is False
    assert torch.equal(after[HEAD], before[HEAD])
    assert (_logits(out) - _logits(source, direction)).abs().max() < 1e-4
    assert cli("verify", out, *base).code == 0
    assert cli("verify", out, *base, "--source", source).code == 0
    # The same files under a configuration that ties them.
    config = json.loads((out / "config.json").read_text()) | {"tie_word_embeddings": True}
    (out / "config.json").write_text(json.dumps(config))
    for more in ((), ("--source", source)):
        result = cli("verify", out, *base, *more)
        assert result.code == 6
        assert "wrong: config.json" in result.out
        assert "tie_word_embeddings" in result.out


@pytest.mark.parametrize("choice", ["share", "skip"])
@pytest.mark.parametrize("stored", ["equal", "different", "alone"])
def test_share_and_skip_say_what_the_files_hold(
    stored: str, choice: str, tiny, cli, direction, tmp_path: Path
) -> None:
    source, out = _source(tiny, tmp_path, stored), tmp_path / "out"
    options = ("--direction", direction)
    edit = ("orthogonalize", source, *options, "-o", out, "--tied-embeddings", choice)
    assert cli(*edit).code == 0
    before, after = _tensors(source), _tensors(out)
    assert before.keys() == after.keys()
    unit = load_file(direction)["direction"]
    unit = unit / unit.norm()
    for name in {EMBEDDING, HEAD} & before.keys():
        old = before[name].double()
        new = old - torch.outer(old @ unit, unit) if choice == "share" else old
        assert torch.allclose(after[name].double(), new, atol=1e-6)
    assert _tied(out) is (stored != "different")
    assert cli("verify", out, *options, "--source", source).code == 0
    _logits(out)


@pytest.mark.parametrize("stored", ["different", "alone"])
def test_audit_and_streamed_layers_read_a_stored_head(
    stored: str, tiny, cli, direction, tmp_path: Path
) -> None:
    source, out = _source(tiny, tmp_path, stored), tmp_path / "out"
    base = ("--direction", direction)
    assert cli("orthogonalize", source, *base, "-o", out, "--tied-embeddings", "share").code == 0
    forward = ("--forward", "--n-prompts", "2", "--offload")
    result = cli("verify", out, *base, *forward, "--json")
    assert result.code == 0, result.json
    assert 0 < result.json["leak"] <= 1e-5
    assert cli("verify", source, *base, *forward, "--json").json["leak"] > 1e-3
    (embedding,) = (u for u in open_checkpoint(Checkpoint("x", out)).units if u.layer is None)
    assert [part.edit.name for part in embedding.parts] == [
        HEAD if stored == "alone" else EMBEDDING
    ]
    result = cli("audit", out, "--base", source, "--json")
    assert result.code == 7, result.json


def test_writers_and_adapters_know_a_head_that_is_stored_alone(
    tiny, cli, direction, tmp_path: Path
) -> None:
    source = _source(tiny, tmp_path, "alone")
    rows = cli("writers", source, "--json").json["writers"]
    (row,) = (row for row in rows if row["kind"] == "embedding")
    assert row["tensors"] == [HEAD]
    out = tmp_path / "adapter"
    result = cli("orthogonalize", source, "--direction", direction, "-o", out, "--as-lora")
    assert result.code == 0, result.err
    names = load_file(out / "adapter_model.safetensors").keys()
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in names


def test_the_text_part_of_a_nested_config_is_untied_too(cli, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    model = tiny_vision_language_model("gemma3")
    model.save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    config["text_config"].pop("tie_word_embeddings", None)
    config["tie_word_embeddings"] = True
    (source / "config.json").write_text(json.dumps(config))
    tensors = _tensors(source)
    (name,) = (n for n in tensors if n.endswith("embed_tokens.weight"))
    tensors["lm_head.weight"] = tensors[name].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    width = tensors[name].shape[1]
    save_file({"direction": torch.randn(width)}, tmp_path / "d.safetensors")
    base = ("--direction", tmp_path / "d.safetensors")
    result = cli("orthogonalize", source, *base, "-o", out)
    assert result.code == 0, result.err
    written = json.loads((out / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert written["text_config"]["tie_word_embeddings"] is False
    assert cli("verify", out, *base, "--source", source).code == 0
