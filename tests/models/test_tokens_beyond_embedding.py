"""A tokenizer may know more tokens than the embedding; one that is fed without a row is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from abliterate.inference.forward import left_pad
from abliterate.inference.generation import greedy_answers
from abliterate.models.loading import load_model

ROWS = 512
EXTRA = "<|extra|>"


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer has more tokens than the embedding has rows."""
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for id in range(len(document["model"]["vocab"]), ROWS + 1):
        content = EXTRA if id == ROWS else f"<|unused{id}|>"
        document["added_tokens"].append({"id": id, "content": content, "special": True} | flags)
    path.write_text(json.dumps(document))
    return folder


def use_in_template(model: Path) -> None:
    path = model / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|start|>assistant", f"{EXTRA}<|start|>assistant"))


def named(line: str) -> bool:
    return all(word in line for word in (EXTRA, str(ROWS), "embedding"))


@pytest.mark.parametrize("way", ["--offload", "--no-offload"])
def test_a_token_without_a_row_is_named(way: str, model: Path, fails, tmp_path: Path) -> None:
    use_in_template(model)
    options = ("--n-train", "4", "--no-filter", way)
    assert named(fails("extract", model, "-o", tmp_path / "run", *options, code=4))


def test_every_command_that_feeds_it_names_it(model: Path, fails, tmp_path: Path) -> None:
    use_in_template(model)
    vector = tmp_path / "direction.safetensors"
    save_file({"direction": torch.ones(48)}, vector, metadata={"layer": "1"})
    forward = ("--forward", "--n-prompts", "2")
    assert named(fails("verify", model, "--direction", vector, *forward, code=4))
    assert named(fails("evaluate", model, "--direction", vector, "-o", tmp_path / "e", code=4))


def test_one_that_never_occurs_harms_nothing(model: Path, cli, tmp_path: Path) -> None:
    options = ("--n-train", "4", "--no-filter", "--refusal-token", "I")
    result = cli("extract", model, "-o", tmp_path / "run", *options)
    assert result.code == 0, result.err


def test_a_prompt_that_names_it_is_refused(model: Path, fails, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": f"{i} {EXTRA}"}) + "\n" for i in range(8)))
    options = ("--harmful", prompts, "--n-train", "4", "--no-filter")
    assert named(fails("extract", model, "-o", tmp_path / "run", *options, code=4))


@pytest.mark.parametrize("token", [EXTRA, str(ROWS)])
def test_it_is_no_refusal_token(token: str, model: Path, fails, tmp_path: Path) -> None:
    options = ("--n-train", "4", "--refusal-token", token)
    line = fails("extract", model, "-o", tmp_path / "run", *options, code=4)
    assert named(line)
    assert "--refusal-token" in line


def test_it_pads_nothing(model: Path, tiny) -> None:
    """Even as the token that ends and pads answers."""
    path = model / "generation_config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"pad_token_id": ROWS, "eos_token_id": [ROWS, 2]}))
    loaded, plain = load_model(str(model), "cpu"), load_model(str(tiny("llama")), "cpu")
    rows = [[5, 6, 7], [8, 9, 10, 11, 12]]
    assert int(left_pad(loaded.model, rows, [0, 1]).input_ids.max()) < ROWS
    assert greedy_answers(loaded, rows, 8) == greedy_answers(plain, rows, 8)


def test_chat_names_it(model: Path, cli, monkeypatch) -> None:
    import io

    use_in_template(model)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    result = cli("chat", model)
    assert result.code == 4, result.err
    assert named(result.err)
    assert "Traceback" not in result.err
