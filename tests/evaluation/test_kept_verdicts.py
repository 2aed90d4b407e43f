"""Verdicts cost money: score and evaluate keep what earlier ones found."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from judge_server import endpoint


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, *pairs: tuple[str, str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs))
    return path


@pytest.fixture
def scored(cli, tmp_path: Path) -> tuple[Path, Path]:
    """Completions, and what a judge said of them."""
    given = write(tmp_path / "in.jsonl", ("p1", "r1"), ("p2", "I cannot"))
    out = tmp_path / "out.jsonl"
    with endpoint(lambda body: "safe") as server:
        judge = ("--judge-url", server.url, "--judge-model", "m")
        assert cli("score", given, *judge, "-o", out).code == 0
    assert [line["safe"] for line in lines(out)] == [True, True]
    return given, out


def test_scoring_again_without_a_judge_keeps_the_verdicts(cli, scored, tmp_path: Path) -> None:
    given, out = scored
    before = out.read_bytes()
    result = cli("score", given, "-o", out, "--json")
    assert result.code == 0
    assert out.read_bytes() == before
    assert result.json["scores"]["safety_score"] is None  # no judge was asked this time
    write(given, ("p0", "new"), ("p2", "I cannot"), ("p1", "r1"))
    assert cli("score", given, "-o", out).code == 0
    assert [line.get("safe") for line in lines(out)] == [None, True, True]
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("asked", [False, True])
def test_verdicts_that_no_longer_belong_there_are_copied(
    asked: bool, cli, scored, tmp_path: Path
) -> None:
    given, out = scored
    before, more = out.read_bytes(), tuple[str, ...]()
    if asked:  # another judge, which cannot be reached
        more = (
            "--judge-url",
            "http://127.0.0.1:1/v1",
            "--judge-model",
            "o",
            "--judge-retries",
            "0",
        )
    else:  # other answers
        write(given, ("p1", "another answer"))
    for _ in range(2):
        result = cli("score", given, *more, "-o", out)
        assert result.code == (4 if asked else 0), result.err
    (copy,) = tmp_path.glob("out.*.jsonl")
    assert copy.read_bytes() == before
    assert not any(line.get("safe") for line in lines(out))


def test_score_writes_over_nothing_else(cli, fails, scored, tmp_path: Path) -> None:
    given, out = scored
    for name, text in (("notes.jsonl", '{"my": "notes"}\n'), ("prompts.txt", "mine"),
                       ("other.jsonl", '{"prompt": "p", "response": "r"}\n')):  # fmt: skip
        (tmp_path / name).write_text(text)
        assert name in fails("score", given, "-o", tmp_path / name, code=2)
        assert (tmp_path / name).read_text() == text
    before = out.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(out)
    assert "symbolic link" in fails("score", given, "-o", tmp_path / "link.jsonl", code=3)
    os.link(out, tmp_path / "second.jsonl")
    with endpoint(lambda body: "unsafe") as server:
        judge = ("--judge-url", server.url, "--judge-model", "n")
        assert cli("score", given, *judge, "-o", out).code == 0  # replaced, so no longer the same
    assert (tmp_path / "second.jsonl").read_bytes() == before
    with FileLock(tmp_path / ".out.jsonl.lock"):
        assert "in use by another process" in fails("score", given, "-o", out, code=3)


def test_evaluate_keeps_the_verdicts_of_another_judge(tiny, cli, tmp_path: Path) -> None:
    base = ("evaluate", tiny("llama"), "-o", tmp_path / "e", "--refusal-token", "I", "--n-test",
            "2", "--max-new-tokens", "2", "--intervention", "baseline")  # fmt: skip
    with endpoint(lambda body: "safe" if body["model"] == "one" else "unsafe") as server:
        judge = ("--judge-url", server.url, "--judge-model")
        assert cli(*base, *judge, "one").code == 0
        answers = tmp_path / "e" / "completions"
        before = (answers / "baseline-harmful.jsonl").read_bytes()
        assert cli(*base).code == 0
        assert (answers / "baseline-harmful.jsonl").read_bytes() == before
        assert not list(answers.glob("baseline-harmful.*.jsonl"))
        assert cli(*base, *judge, "two").code == 0
    (copy,) = answers.glob("baseline-harmful.*.jsonl")
    assert copy.read_bytes() == before
    assert cli(*base, "--max-new-tokens", "3").code == 0  # other answers
    assert len(list(answers.glob("baseline-harmful.*.jsonl"))) == 2
