"""Checkpoints and records with texts that a terminal or a web page would act on."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from abliterate.editing.model_card import code, markdown

EVIL = "\x1b[2J\x9b2J\u202e\n"
SHOWN = "\\x1b[2J\\x9b2J\\u202e\\n"


@pytest.fixture(scope="module")
def direction(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    vector = torch.randn(48, generator=torch.Generator().manual_seed(1))
    save_file({"direction": vector}, path, {"layer": "1", "position": "-1"})
    return path


def _raw(text: str) -> bool:
    return any(character in text for character in "\x1b\x9b\u202e")


def test_verify_cannot_be_made_to_print_that_it_passed(
    tiny: Callable[..., Path], cli, direction: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    model = tiny("llama")
    assert cli("orthogonalize", model, "--direction", direction, "-o", out, "-q").code == 0
    record = json.loads((out / "abliterate.json").read_text())
    record["promise"]["limits"] = [f"x{EVIL}passed"]
    (out / "abliterate.json").write_text(json.dumps(record))
    other = tmp_path / "other.safetensors"
    save_file({"direction": torch.randn(48)}, other)
    found = cli("verify", out, "--direction", other)
    assert found.code == 6, found.err
    assert f"record: x{SHOWN}passed" in found.out
    assert "passed" not in found.out.splitlines()
    assert found.out.splitlines()[-1] == "FAILED"
    assert not _raw(found.out + found.err)


def test_next_command_can_be_pasted(tiny: Callable[..., Path], cli, tmp_path: Path) -> None:
    model, run = tmp_path / "a $(touch owned) model", tmp_path / "run; touch 'owned"
    shutil.copytree(tiny("llama"), model)
    few = ("--n-train", "4", "--no-filter", "--refusal-token", "I", "-q")
    first = cli("extract", model, "-o", run, *few)
    assert first.code == 0, first.err
    line = next(line for line in first.out.splitlines() if line.startswith("next: "))
    assert shlex.split(line) == ["next:", "abliterate", "select", str(run)]
    wrong = cli("verify", model, "--direction", run)
    assert wrong.code == 3
    quoted = wrong.err.split("`")[1]
    assert shlex.split(quoted) == ["abliterate", "select", str(run)]


def test_chat_shows_the_escapes_of_an_answer(
    tiny: Callable[..., Path], cli, monkeypatch, tmp_path: Path
) -> None:
    """A tokenizer may call any token a control character; pieces come one by one."""
    model = tmp_path / "model"
    shutil.copytree(tiny("llama"), model)

    def say(*options: str) -> Any:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        return cli("chat", model, "--max-new-tokens", "6", "-q", *options)

    file = model / "tokenizer.json"
    document = json.loads(file.read_text())
    document["model"]["merges"] = []  # prompts are bytes, so that longer tokens only answer
    file.write_text(json.dumps(document))
    answer = say("--json").json["turns"][0]["answer"].replace(" ", "Ġ")
    vocabulary = document["model"]["vocab"]
    spoken = max((token for token in vocabulary if token in answer), key=len)
    assert len(spoken) > 1
    escape = chr(256 + 27)  # how byte-level vocabularies write byte 27
    vocabulary[escape], vocabulary[spoken] = vocabulary[spoken], vocabulary[escape]
    file.write_text(json.dumps(document))
    exact = say("--json")
    assert "\x1b" in exact.json["turns"][0]["answer"]
    assert not _raw(exact.out)
    found = say()
    assert found.code == 0, found.err
    assert "\\x1b" in found.out
    assert not _raw(found.out)


def test_model_card_takes_over_no_markup(
    tiny: Callable[..., Path], cli, direction: Path, tmp_path: Path
) -> None:
    name = f"<img src=x onerror=y>[here](javascript:z)`\n# Trust{EVIL}"
    source, out = tmp_path / name, tmp_path / "out"
    shutil.copytree(tiny("llama"), source)
    (source / "README.md").write_text(
        '---\nlicense: "mit\\n# Trust"\nlicense_link: "javascript:z"\nlicense_name: other\n'
        "language: [en, {x: 1}]\n---\n"
    )
    assert cli("orthogonalize", source, "--direction", direction, "-o", out, "-q").code == 0
    card = (out / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert "<img" not in body.replace(code(name), "")
    assert "# Trust" not in [line.strip() for line in body.splitlines()]
    assert "](javascript" not in body.replace(code(name), "").replace("\\](", "")
    assert "javascript" not in head.replace("here", "").partition("license")[2]
    assert "license_name: other" in head
    assert "license:" not in head
    assert "language" not in head
    assert not _raw(card)


def test_markdown_and_code_are_what_they_show() -> None:
    assert markdown("a_b <b> [x](y) `c`\n# d") == r"a\_b &lt;b&gt; \[x\](y) \`c\`\\n# d"
    assert code("a") == "`a`"
    assert code("a`b``c") == "```a`b``c```"
    assert code("`a") == "`` `a ``"
