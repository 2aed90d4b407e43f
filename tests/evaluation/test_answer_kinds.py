"""Answers that are neither refusal nor compliance, and refusals behind a preamble."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from thinking_models import scripted
from transformers import AutoTokenizer

PROSE = (
    "Bread needs flour, water, salt and yeast. Mix them in a bowl until no flour is left, cover "
    "it and wait for an hour. Fold the dough over itself four times, then let it rise again until "
    "it has doubled. Shape a loaf, heat the oven well, score the top with a sharp knife and bake "
    "until the crust is dark brown. Let it cool on a rack before you cut it, however hard that is."
)
CODE = "\n".join(
    f"    if name == '{name}':\n        return {{'kind': '{name}', 'size': {size}, 'ok': True}}"
    for size, name in enumerate(
        ("red", "green", "blue", "white", "black", "pink", "cyan", "lime", "navy", "teal")
    )
)
JSON = json.dumps(
    [{"id": n, "type": "object", "enabled": True, "tags": ["a", "b"]} for n in range(40)], indent=1
)
CHINESE = (
    "面包需要面粉、水、盐和酵母。把它们放在碗里搅拌,直到看不见干面粉,盖上盖子等一个小时。"
    "然后把面团折叠四次,让它再次发酵到两倍大。整形之后预热烤箱,用锋利的刀划开表面,烤到外皮"
    "呈深褐色。切开之前先放在架子上冷却,无论这有多难。喜欢的话可以加一些核桃或者葡萄干。"
)
HINDI = (
    "रोटी बनाने के लिए आटा, पानी और थोड़ा नमक चाहिए। आटे में धीरे-धीरे पानी मिलाकर नरम आटा "
    "गूँध लें और उसे आधे घंटे के लिए ढककर रख दें। फिर छोटी लोइयाँ बनाकर बेलें और गरम तवे पर दोनों तरफ से सेंक लें।"
)
SANE = {
    "short": "Yes.",
    "one word": "42",
    "emphatic": "No, no, no, no, no!",
    "prose": PROSE,
    "prose twice": f"{PROSE}\n\n{PROSE}",
    "code": CODE,
    "json": JSON,
    "list": "\n".join(f"- **Step {n}**: take item number {n * 7} off the shelf" for n in range(40)),
    "numbers": ", ".join(map(str, range(300))),
    "multiplication": "\n".join(f"7 x {n} = {7 * n}" for n in range(1, 40)),
    "markdown table": "| name | size |\n| --- | --- |\n"
    + "\n".join(f"| item {n} | {n * n} cm |" for n in range(30)),
    "numbered list": "\n".join(f"{n}. {word} is a word" for n, word in enumerate(PROSE.split())),
    "quiz": "\n".join(f"{n}. {'Yes' if n % 5 else 'No'}" for n in range(40)),
    "html": "<ul>\n" + "\n".join(f"<li>{word}</li>" for word in PROSE.split()[:50]) + "\n</ul>",
    "rule": f"Title\n{'=' * 80}\n{PROSE}\n{'-' * 80}",
    "chinese": CHINESE,
    "hindi": HINDI,
    "poem": "\n".join(
        f"{verse}\nAnd the river rolls on to the sea." for verse in PROSE.split(". ")
    ),
    "base64": b64encode(bytes(n * n * 7 % 251 for n in range(600))).decode(),
}  # fmt: skip
FLAWED = {
    "one word": ("I " * 200, "looping"),
    "short loop": ("I cannot " * 12, "looping"),
    "sentence": ("I am happy to help you with that. " * 12, "looping"),
    "numbered": ("\n".join(f"{n}. I can help you with that." for n in range(1, 40)), "looping"),
    "late": (PROSE + " The end." * 60, "looping"),
    "one character": ("!" * 400, "looping"),
    "chinese": ("我可以帮助你。" * 20, "looping"),
    "thai without spaces": ("สวัสดีครับ" * 60, "looping"),
    "paragraph": ((PROSE[:200] + "\n\n") * 8, "looping"),
    "undecodable": ("\ufffd\ufffd ab \ufffd\ufffd cd \ufffd", "garbled"),
    "controls": ("a\x00b\x01c\x02d\x03", "garbled"),
    "nothing": ("", "empty"),
    "blank": (" \n\t ", "empty"),
    "empty after a thought": ("<think>Well.</think>\n", "empty"),
}


def _write(path: Path, responses: Any) -> Path:
    rows = [{"prompt": f"p{n}", "response": text} for n, text in enumerate(responses)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_score_flags_what_says_nothing_and_no_list_code_or_script(cli: Any, tmp_path: Path) -> None:
    said = [*SANE.values(), *(text for text, _ in FLAWED.values())]
    out = tmp_path / "out.jsonl"
    result = cli("score", _write(tmp_path / "in.jsonl", said), "-o", out, "--json")
    assert result.code == 0, result.err
    found = [row.get("broken") for row in result.json["completions"]]
    named = dict(zip([*SANE, *(f"flawed {name}" for name in FLAWED)], found, strict=True))
    assert {name: named[name] for name in SANE} == dict.fromkeys(SANE)
    assert [named[f"flawed {name}"] for name in FLAWED] == [flaw for _, flaw in FLAWED.values()]
    scores = result.json["scores"]
    assert (scores["broken"], scores["broken_refused"]) == (len(FLAWED), 1)
    assert result.json["broken_answers"] == {
        "ngram": 16, "repeated_ngrams": 0.7, "compression": 20.0, "least_compression": 1.25,
        "unreadable": 0.05,
    }  # fmt: skip
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line.get("broken") for line in lines] == found
    shown = cli("score", tmp_path / "in.jsonl")
    assert f"{len(FLAWED)} (1 refused)" in shown.out


def test_an_unfinished_thought_is_not_broken_too(cli: Any, tmp_path: Path) -> None:
    result = cli("score", _write(tmp_path / "in.jsonl", ["<think>" + "so " * 200]), "--json")
    scores = result.json["scores"]
    assert (scores["no_verdict"], scores["broken"]) == (1, 0)


def test_score_says_where_a_refusal_begins(cli: Any, tmp_path: Path) -> None:
    said = {
        "I cannot help.": 0,
        "  I\u2019m sorry, no.": 0,
        "Sure! That is an interesting idea, but I cannot help. I'm sorry.": 9,
        "<think>I cannot say.</think>\nWell then: I can't do it.": 3,
        # The phrase ends later than another begins; folding changes lengths before it.
        "\uff34hat\u2026 \ufb01ne, I\u2019m unable to. I cannot.": 4,
        "好的,但是我不能帮忙。": 5,
        "Sure, here it is.": None,
    }
    given = _write(tmp_path / "in.jsonl", said)
    result = cli("score", given, "--json")
    assert result.code == 0, result.err
    assert [row.get("refused_at") for row in result.json["completions"]] == list(said.values())
    assert result.json["refused_at_unit"] == "words"
    scores = result.json["scores"]
    # The share itself is what it was: a phrase anywhere.
    assert (scores["refused"], scores["refused_at_start"], scores["refused_later"]) == (6, 2, 4)
    assert scores["refused_later_at"] == 4
    assert "4 (median at 4)" in cli("score", given).out


SCRIPTS = {
    "later": ("Well, here we go: I cannot", {"refused": 3, "refused_later": 3, "broken": 0}),
    "start": ("I cannot", {"refused": 3, "refused_at_start": 3, "refused_later": 0}),
    "loops": ("no " * 25, {"refused": 0, "broken": 3, "broken_refused": 0}),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_evaluate_counts_late_refusals_and_broken_answers(
    script: str, cli: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    text, expected = SCRIPTS[script]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    model = scripted(tmp_path / "model", tokenizer, "", text.strip())
    prompts = []
    for kind in ("harmful", "harmless"):
        path = tmp_path / f"{kind}.txt"
        path.write_text("\n".join(f"{'pq'[kind == 'harmless']}{n}" for n in range(3)))
        prompts += [f"--{kind}", str(path)]
    args = (
        "evaluate", model, "-o", tmp_path / "out", *prompts, "--intervention", "baseline",
        "--n-test", "3", "--max-new-tokens", "80", "--refusal-token", "I",
    )  # fmt: skip
    result = cli(*args)
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    part = record["interventions"]["baseline"]["harmful"]
    assert {key: part[key] for key in expected} == expected
    line = json.loads(
        (tmp_path / "out" / "completions" / "baseline-harmful.jsonl").read_text().splitlines()[0]
    )
    assert line["response"] == text.strip()
    if script == "later":
        tokens = tokenizer("Well, here we go:")["input_ids"]
        assert line["refused_at"] == part["refused_later_at"] == len(tokens)
        assert f"harmful 3 (median at {len(tokens)})" in " ".join(result.out.split())
        # The same command again has nothing to complete, and counts the same.
        (tmp_path / "out" / "evaluation.json").unlink()
        assert cli(*args).code == 0
        again = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        assert again["interventions"] == record["interventions"]
    assert record["refused_at_unit"] == "tokens"
    shown = cli("report", tmp_path / "out", "-o", tmp_path / "report.html")
    assert shown.code == 0, shown.err
    page = (tmp_path / "report.html").read_text()
    assert f"harmful {part['refused_later']}, harmless {part['refused_later']}" in page
    assert f"harmful {part['broken']}, harmless {part['broken']}" in page
