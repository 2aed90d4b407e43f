"""What is said where no first token tells refusals from answers, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from first_tokens import first_token_model
from transformers import AutoTokenizer

# The shares of first tokens after harmful (B) and harmless (G) prompts, and what is told.
CASES: dict[str, tuple[dict[str, float], dict[str, float], str, str]] = {
    "neither": (
        {"S": 0.5, "H": 0.4}, {"S": 0.45, "H": 0.5},
        "does not seem to refuse either kind", "--harmful",
    ),
    "both": (
        {"I": 0.62, "T": 0.3}, {"I": 0.63, "T": 0.3},
        "refuses both kinds, or opens every answer in the same words", "--response-prefix",
    ),
    "thinks": (
        {"<": 0.9, "I": 0.05}, {"<": 0.8, "S": 0.1},
        "the model thinks first (85%", "--thinking skip",
    ),
    "swapped": (
        {"1": 0.9}, {"I": 0.9}, "harmful ones are answered and harmless ones refused", "swap",
    ),
    "swapped and spread": (
        dict.fromkeys("SHTWCDEF", 0.04), {"I": 0.9}, "harmless ones refused", "swap",
    ),
}  # fmt: skip


def _prompts(folder: Path) -> list[str]:
    found = []
    for kind, marker in (("harmful", "B"), ("harmless", "G")):
        path = folder / f"{kind}.txt"
        path.write_text("\n".join(f"{marker}{n}" for n in range(40)))
        found += [f"--{kind}", str(path)]
    return found


@pytest.mark.parametrize("case", CASES)
def test_extract_shows_first_tokens_and_tells_why_none_refuses(
    case: str, fails: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    harmful, harmless, why, advice = CASES[case]
    model = first_token_model(tmp_path / "m", tokenizer_dir, {"B": harmful, "G": harmless})
    line = fails(
        "extract", model, "-o", tmp_path / "run", *_prompts(tmp_path), "--n-train", "16", code=3
    )
    assert why in line
    assert advice in line
    # The evidence: the commonest token of each kind with its share, harmful ones first.
    for kind, shares in (("harmful", harmful), ("harmless", harmless)):
        top = max(shares, key=lambda token: shares[token])
        assert f"{kind}: '{top}' {shares[top]:.0%}" in line or case == "swapped and spread"
    others = {told for name, (_, _, told, _) in CASES.items() if name.split()[0] != case.split()[0]}
    assert not any(told in line for told in others)
    assert not (tmp_path / "run" / "extract.json").exists()


def test_evaluate_shows_the_same_evidence(fails: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
    harmful, harmless, why, _ = CASES["both"]
    model = first_token_model(tmp_path / "m", tokenizer_dir, {"B": harmful, "G": harmless})
    line = fails(
        "evaluate", model, "-o", tmp_path / "out", *_prompts(tmp_path), "--n-test", "4",
        "--intervention", "baseline", "--max-new-tokens", "2", code=3,
    )  # fmt: skip
    assert why in line
    assert "harmful: 'I' 62%, 'T' 30%; harmless: 'I' 63%, 'T' 30%" in line
    assert not [*(tmp_path / "out").rglob("*.jsonl")]  # told before answers are made


def test_an_unusual_refusal_is_taken_though_answers_say_i(
    cli: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    model = first_token_model(tmp_path / "m", tokenizer_dir, {"B": {"T": 0.9}, "G": {"I": 0.9}})
    found = cli("extract", model, "-o", tmp_path / "run", *_prompts(tmp_path), "--n-train", "16")
    assert found.code == 0, found.err
    assert "'T'" in found.out


def test_the_same_prompts_twice_are_told(fails: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
    model = first_token_model(tmp_path / "m", tokenizer_dir, {"B": {"I": 0.9}, "G": {"S": 0.9}})
    (_, same, *_) = _prompts(tmp_path)
    line = fails(
        "extract", model, "-o", tmp_path / "run", "--harmful", same, "--harmless", same,
        "--n-train", "16", code=3,
    )  # fmt: skip
    assert "16 of 16 harmful prompts are among the harmless ones too" in line


def test_a_prompt_that_ends_in_a_thought_is_told(
    fails: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    shares = {"O": 0.9}
    model = first_token_model(tmp_path / "m", tokenizer_dir, {"B": shares, "G": shares})
    line = fails(
        "extract", model, "-o", tmp_path / "run", *_prompts(tmp_path), "--n-train", "16",
        "--response-prefix", "<think>\n", code=3,
    )  # fmt: skip
    assert "the prompt ends within a thought" in line


def test_tokens_that_are_no_text_are_shown_and_given_by_id(
    cli: Any, fails: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    part = next(n for n in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([n]))
    model = first_token_model(
        tmp_path / "m", tokenizer_dir, {"B": {part: 0.7, "I": 0.2}, "G": {"S": 0.9}}
    )
    common = ("extract", model, *_prompts(tmp_path), "--n-train", "16")
    found = cli(*common, "-o", tmp_path / "found")
    assert found.code == 0, found.err
    assert f"id:{part}" in found.out
    assert "\ufffd" not in found.out
    record = json.loads((tmp_path / "found" / "extract.json").read_text())
    assert record["refusal_tokens"][0] == {"id": part, "token": f"id:{part}"}
    for spelling in (f"id:{part}", f"#{part}", str(part)):
        named = cli(*common, "--refusal-token", spelling, "-o", tmp_path / "named", "--json")
        assert named.code == 0, named.err
        assert named.json["refusal_tokens"] == [{"id": part, "token": f"id:{part}"}]
    for wrong in ("id:512000", "#" + "9" * 5000):
        assert "the tokenizer has the ids 0 to" in fails(
            *common, "--refusal-token", wrong, "-o", tmp_path / "wrong", code=2
        )
    # Where nothing is found, the evidence has such tokens by id too.
    shares = {part: 0.9}
    model = first_token_model(tmp_path / "n", tokenizer_dir, {"B": shares, "G": shares})
    line = fails(*(common[0], model, *common[2:]), "-o", tmp_path / "none", code=3)
    assert f"harmful: id:{part} 90%" in line
