"""Behind a post-norm the edit is exact on the stream, and its logits are not those of the hooks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from architectures.zoo import tiny_model
from safetensors.torch import save_file

WIDTH = 48


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("one two three\nfour five\nsix seven\n")
    return path


@pytest.fixture(scope="module")
def direction(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    save_file({"direction": vector}, path, {"layer": "2", "position": "-1"})
    return path


def _post_norm_model(folder: Path, tokenizer_dir: Path) -> Path:
    model = tiny_model("gemma3_text")
    model.resize_token_embeddings(512)  # that of the tokenizer
    model.save_pretrained(folder)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, folder / file.name)
    return folder


def test_verify_and_evaluate_say_how_far_edit_and_hooks_are_apart(
    tokenizer_dir: Path, cli, direction: Path, words: Path, tmp_path: Path
) -> None:
    source, out = _post_norm_model(tmp_path / "source", tokenizer_dir), tmp_path / "out"
    assert cli("orthogonalize", source, "--direction", direction, "-o", out).code == 0
    base = ("verify", out, "--direction", direction)
    result = cli(*base, "--json")
    assert result.code == 0, result.out
    assert any("post-norm" in note for note in result.json["notes"])
    prompts = ("--harmful", words, "--harmless", words, "--n-prompts", "2")
    measured = ("--source", source, "--forward", *prompts)
    result = cli(*base, *measured, "--json")
    assert result.code == 0, result.out  # nothing is written along the direction all the same
    distance = result.json["distance"]
    assert 1e-2 < distance["logits"] < distance["moved"]
    # What docs/writers.md says of this model.
    said = {"logits": 0.19, "moved": 0.94, "kl": 6e-4}
    assert distance == pytest.approx(said, rel=0.05)
    assert "ablation moves them by" in cli(*base, *measured).out
    asked = ("--harmful", words, "--harmless", words, "--n-test", "2", "--max-new-tokens", "2",
             "--refusal-token", "5")  # fmt: skip
    evaluated = tmp_path / "evaluated"
    shown = cli("evaluate", source, "--direction", direction, "--checkpoint", f"mine={out}",
                "--intervention", "ablate", "--intervention", "checkpoint", "-o", evaluated,
                *asked)  # fmt: skip
    assert shown.code == 0, shown.err
    assert "ablate and mine: the same verdict on 2 of 2 harmful prompts" in shown.out
    record = json.loads((evaluated / "evaluation.json").read_text())
    found = record["hooks_and_edits"]["mine"]
    rows = record["interventions"]
    kl = [rows[name]["kl_divergence"] for name in ("ablate", "mine")]
    assert [found["kl_divergence"][name] for name in ("ablate", "edit")] == kl
    assert found["kl_divergence"]["difference"] == pytest.approx(kl[1] - kl[0])
    assert abs(found["kl_divergence"]["difference"]) > 1e-6
    assert found["harmful"]["refusals"] == {"n": 2, "same": 2}
