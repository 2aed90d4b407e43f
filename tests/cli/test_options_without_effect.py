"""Options that would do nothing are refused, on the command line and in a configuration file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from abliterate.direction import Direction, save_direction
from abliterate.settings import Settings, flags_of, load_settings, sections_of
from abliterate.settings.marks import needs_of

_EXTRACT = ("extract", "{model}", "-o", "{new}")
_EVALUATE = ("evaluate", "{model}", "-o", "{new}")
_VERIFY = ("verify", "{model}", "--direction", "{vector}")
_SELECT = ("select", "--scores", "scores.json")
_CHAT = ("chat", "{model}")
_RUN = ("run", "{model}", "-o", "{new}")
_EDIT = ("orthogonalize", "{model}", "-o", "{new}", "--direction", "{vector}")

# A command, an option of it, and what it does nothing without.
ALONE = [
    (_EXTRACT, ("--winsor-quantile", "0.1"), "--robust winsor"),
    ((*_RUN, "--robust", "median"), ("--winsor-quantile", "0.05"), "--robust winsor"),
    (_EXTRACT, ("--activation-positions", "all"), "--save-activations"),
    ((*_EXTRACT, "--thinking", "answer"), ("--max-thinking-tokens", "9"), "--thinking skip"),
    ((*_EXTRACT, "--no-offload"), ("--activation-memory", "1GB"), "--offload"),
    (("select", "{new}"), ("--n-layers", "4"), "--scores FILE"),
    (_EVALUATE, ("--position=-1",), "--direction"),
    (_EVALUATE, ("--interpolate", "linear"), "--direction"),
    (_EVALUATE, ("--project-harmless",), "--direction"),
    (_EVALUATE, ("--project-first-token",), "--direction"),
    (_EVALUATE, ("--controls", "2"), "--direction"),
    (_EVALUATE, ("--served-model", "m"), "--server"),
    (_EVALUATE, ("--server-api", "chat"), "--server"),
    (_EVALUATE, ("--concurrency", "2"), "--server"),
    (_EVALUATE, ("--server-timeout", "2"), "--server"),
    (_EVALUATE, ("--server-retries", "2"), "--server"),
    (_EVALUATE, ("--corpus-texts", "2"), "--corpus"),
    (_EVALUATE, ("--corpus-tokens", "2"), "--corpus"),
    (_EVALUATE, ("--tasks-dir", "x"), "--tasks"),
    (_EVALUATE, ("--task-limit", "2"), "--tasks"),
    (_EVALUATE, ("--judge-template", "prompt"), "--judge-url"),
    ((*_EVALUATE, "--judge", "{model}"), ("--judge-template", "prompt"), "--judge-url"),
    (_EVALUATE, ("--second-judge-template", "prompt"), "--second-judge-url"),
    (_EVALUATE, ("--judge-timeout", "2"), "--judge-url or --second-judge-url"),
    (_EVALUATE, ("--judge-retries", "2"), "--judge-url or --second-judge-url"),
    (("score", "x.jsonl"), ("--judge-concurrency", "2"), "--judge-url or --second-judge-url"),
    (("score", "x.jsonl"), ("--device", "cpu"), "--judge or --classifier"),
    (("score", "x.jsonl"), ("--classifier-input", "pair"), "--classifier"),
    (_VERIFY, ("--n-prompts", "2"), "--forward"),
    (_VERIFY, ("--harmful", "harmful"), "--forward"),
    (_VERIFY, ("--device", "cpu"), "--forward"),
    (_VERIFY, ("--offload",), "--forward"),
    (_VERIFY, ("--activation-memory", "1GB"), "--forward"),
    (_VERIFY, ("--revision", "main"), "--source"),
    (_CHAT, ("--position=-1",), "--direction"),
    (_CHAT, ("--interpolate", "linear"), "--direction"),
    (_CHAT, ("--seed", "1"), "--temperature"),
    (_RUN, ("--interpolate", "linear"), "--per-layer or --position"),
    (_RUN, ("--public",), "--push-to-hub"),
    (_EDIT, ("--public",), "--push-to-hub"),
]  # fmt: skip


@pytest.fixture
def place(tiny, tmp_path: Path) -> dict[str, str]:
    vector = tmp_path / "direction.safetensors"
    save_direction(vector, Direction(torch.linspace(-1, 2, 48).double(), -1, 2), "tiny")
    return {
        "{model}": str(tiny("llama")), "{vector}": str(vector), "{new}": str(tmp_path / "new"),
        "{tied}": str(tiny("qwen2")),
    }  # fmt: skip


def test_an_option_that_needs_another(place, fails) -> None:
    for command, option, needed in ALONE:
        line = fails(*(place.get(word, word) for word in (*command, *option)), code=2)
        name = option[0].partition("=")[0]
        assert name in line, (option, line)
        assert needed in line, (option, line)
        assert "has no effect without" in line or name == "--public", line
    assert not Path(place["{new}"]).exists()


def test_saved_scores_make_no_scores(place, fails) -> None:
    for option in (("--n-val", "3"), ("--per-layer",), ("--model", "m"), ("--device", "cpu"),
                   ("--no-filter",), ("--kl-on", "last"), ("--system", "s")):  # fmt: skip
        line = fails(*_SELECT, *option, code=2)
        assert f"{option[0].replace('no-', '')} has no effect with --scores" in line


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        ("{model}", ("--requantize",), "none of its tensors is stored as FP8"),
        ("{model}", ("--dequantize",), "none of its tensors is stored as FP8"),
        ("{model}", ("--dequantize", "--as-lora"), "none of its tensors is stored as FP8"),
        ("{model}", ("--tied-embeddings", "skip"), "no embedding of this model is its output"),
        ("{tied}", ("--tied-embeddings", "share", "--layers", "1-2"), "leave the embedding"),
        ("{tied}", ("--tied-embeddings", "skip", "--components", "mlp"), "leave the embedding"),
        ("{model}", ("--components", "mlp,expert"), "--components expert has no effect"),
    ],
)
def test_an_option_of_the_edit_that_the_model_has_no_use_for(
    model: str, options, why: str, place, fails
) -> None:
    words = (place.get(word, word) for word in ("orthogonalize", model, *_EDIT[2:], *options))
    line = fails(*words, code=2)
    assert "has no effect" in line
    assert why in line
    assert not Path(place["{new}"]).exists()


def test_a_file_of_settings_is_read_alike(place, fails, cli, tmp_path: Path) -> None:
    """But it may hold defaults, and what concerns other commands."""
    file = tmp_path / "settings.toml"
    file.write_text("[extract]\nwinsor_quantile = 0.1\n")
    line = fails(*(place.get(word, word) for word in _EXTRACT), "--config", file, code=2)
    assert f'{file}: [extract] winsor_quantile has no effect without robust = "winsor"' in line
    assert cli("score", "missing.jsonl", "--config", file).code == 3  # none of its settings
    file.write_text("[evaluate]\ncorpus_texts = 3\n")
    line = fails(*(place.get(word, word) for word in _RUN), "--config", file, code=2)
    assert "[evaluate] corpus_texts has no effect without corpus" in line
    file.write_text('[extract]\nwinsor_quantile = 0.1\nrobust = "winsor"\nharmful = "no such"\n')
    line = fails(*(place.get(word, word) for word in _EXTRACT), "--config", file, code=3)
    assert "no such" in line


def test_defaults_in_a_file_do_no_harm(tmp_path: Path) -> None:
    file, checked = tmp_path / "settings.toml", 0
    for table, section in sections_of(Settings).items():
        options = {table: dict.fromkeys(section.model_fields)}
        for key, field in section.model_fields.items():
            if (needs := needs_of(section, key)) is None:
                continue
            assert set(needs.settings) <= set(section.model_fields), flags_of(section, key)
            if field.default not in (None, ()):
                file.write_text(f"[{table}]\n{key} = {json.dumps(field.default)}\n")
                load_settings(file, options, every=True)
                checked += 1
    assert checked > 10


def test_a_word_behind_an_option_that_takes_few(place, cli, fails) -> None:
    """``--norm-preserve`` may stand alone, so that the word would be an argument too many."""
    for words in ((*_EDIT, "--norm-preserve", "diagonal"),
                  (_EDIT[0], "--norm-preserve", "diagonal", *_EDIT[1:])):  # fmt: skip
        line = fails(*(place.get(word, word) for word in words), code=2)
        assert "--norm-preserve takes rows or columns, or nothing" in line
        assert "'diagonal'" in line
    line = fails(*(place.get(word, word) for word in _EXTRACT), "--save-activations", "3", code=2)
    assert "write --save-activations=3" in line
    assert "extra argument" in cli("writers", "one", "two").err


def test_prompts_of_another_kind_are_told(place, cli, tmp_path: Path) -> None:
    """A null experiment may want them; but nobody gets them by mistake."""
    file = tmp_path / "p.txt"
    file.write_text("".join(f"Question number {n} about a town\n" for n in range(4)))
    base = ("evaluate", place["{model}"], "--n-test", "2", "--max-new-tokens", "1",
            "--refusal-token", "I", "-q")  # fmt: skip
    found = cli(*base, "--harmful", "harmless", "--harmful", file, "--harmless", file,
                "--borderline", "harmful")  # fmt: skip
    assert found.code == 0, found.err
    told = [line.removeprefix("warning: ") for line in found.err.splitlines() if "these" in line]
    assert told == [
        "--harmful harmless: these are harmless prompts",
        "--borderline harmful: these are harmful prompts, and to refuse those is no over-refusal",
    ]
    assert found.err.count(f"--harmful and --harmless are the same prompts: {file}") == 1
    usual = cli(*base, "--harmless", "borderline", "--borderline", "harmless")
    assert "prompts" not in usual.err


def test_known_kinds_by_whatever_name() -> None:
    from abliterate.prompts.source_kinds import known_kind, wrong_kinds

    assert known_kind("AdvBench") == known_kind("walledai/AdvBench@main:train[:40]") == "harmful"
    assert known_kind("JailbreakBench/JBB-Behaviors/behaviors:benign[Goal]") == "harmless"
    assert known_kind("JailbreakBench/JBB-Behaviors/behaviors:harmful[Behavior]") == "harmful"
    assert known_kind("someone/else") is known_kind("harmful.txt") is None
    assert wrong_kinds({"harmful": "tatsu-lab/alpaca", "harmless": "x/y"}) == [
        "--harmful tatsu-lab/alpaca: these are harmless prompts"
    ]
