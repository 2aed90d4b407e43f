"""Values of options and inputs that once ended in an unexpected error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from judge_server import endpoint

_HALF = "half a pair \ud83d"
_QUICK = ("--refusal-token", "I", "--no-filter", "--n-train", "4", "-q")


@pytest.mark.parametrize("seed", [-1, 2**32, -(2**63) - 1, 10**40])
def test_seeds_that_no_generator_takes(tiny, fails, seed: int, tmp_path: Path) -> None:
    line = fails("extract", tiny("llama"), "-o", tmp_path / "run", f"--seed={seed}", code=2)
    assert "--seed" in line
    assert not (tmp_path / "run").exists()


def test_a_device_without_weights(tiny, fails, tmp_path: Path) -> None:
    line = fails("extract", tiny("llama"), "-o", tmp_path, "--device", "meta", *_QUICK, code=2)
    assert "--device meta holds no weights" in line


@pytest.mark.parametrize(
    "options", [("--system", _HALF), ("--response-prefix", _HALF), ("--refusal-token", _HALF),
                ("--harmful", _HALF), ("--chat-template-kwargs", '{"a": ["\\ud83d"]}')],
)  # fmt: skip
def test_options_that_are_no_unicode(tiny, fails, options, tmp_path: Path) -> None:
    line = fails("extract", tiny("llama"), "-o", tmp_path / "run", *_QUICK, *options, code=2)
    assert options[0] in line or "template-kwargs" in line
    assert "not valid Unicode" in line


def test_files_that_spell_half_of_a_character(tiny, fails, tmp_path: Path) -> None:
    """JSON can: ``\\ud83d`` alone. No tokenizer takes it."""
    texts = tmp_path / "prompts.json"
    texts.write_text(json.dumps(["fine", _HALF, "fine too", "and this", "and that"]))
    line = fails(
        "extract", tiny("llama"), "-o", tmp_path / "r", "--harmful", texts, *_QUICK, code=3
    )
    assert line.endswith("prompts.json, entry 2: not valid Unicode text (a lone surrogate, U+D83D)")
    for key in ("prompt", "response", "category"):
        row = {"prompt": "p", "response": "r"} | {key: _HALF}
        answers = tmp_path / "answers.jsonl"
        answers.write_text(json.dumps(row))
        line = fails("score", answers, "-o", tmp_path / "out.jsonl", code=3)
        assert "answers.jsonl, entry 1: not valid Unicode" in line
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": _HALF}))
    line = fails("evaluate", tiny("llama"), "--intervention", "baseline", "--corpus",
                 f"pile={corpus}", "-q", code=3)  # fmt: skip
    assert "not valid Unicode" in line


def test_a_judge_that_spells_half_of_a_character(cli, tmp_path: Path) -> None:
    answers, out = tmp_path / "answers.jsonl", tmp_path / "out.jsonl"
    answers.write_text(json.dumps({"prompt": "p", "response": "r"}))
    with endpoint(lambda body: f"unsafe {_HALF}") as server:
        judge = ("--judge-url", server.url, "--judge-model", "guard")
        found = cli("score", answers, *judge, "-o", out, "--json")
    assert found.code == 0, found.err
    assert found.json["scores"]["safety_score"] == 0.0
    assert json.loads(out.read_text())["safe"] is False


@pytest.mark.parametrize("place", ["", ".", "/"])
def test_an_output_without_a_name(tiny, fails, place: str, tmp_path: Path, monkeypatch) -> None:
    import torch
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    save_file({"direction": torch.ones(48)}, "direction.safetensors")
    model = tiny("llama")
    line = fails(
        "orthogonalize", model, "--direction", "direction.safetensors", "-o", place, code=2
    )
    assert "names no folder" in line
    assert [path.name for path in tmp_path.iterdir()] == ["direction.safetensors"]
