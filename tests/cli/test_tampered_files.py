"""Every file that a command reads, replaced by something else: one line, and never exit code 1.

Each file gets two damages before one command, the same each time; ``ABLITERATE_FUZZ=N`` gives it N
others before all commands.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abliterate.cli.app import main

DEEP = 10_000
# Whatever the file was, this is it now.
CONTENTS: dict[str, bytes] = {
    "brackets": b"[" * DEEP + b"]" * DEEP,
    "list": b"[]",
    "null": b"null",
    "object": b"{}",
    "number": b"7",
    "text": b'"x"',
    "nan": b"NaN",
    "objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "some brackets": b"[" * 400 + b"]" * 400,
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "empty": b"",
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "twice": b'{"versions": {"abliterate": "1"}, "versions": 3}',
    "list of lists": b"[[], [null]]",
}
# What a field may hold instead.
VALUES: list[Any] = [None, [], {}, "x", -1, 10**400, float("inf"), True, [[]], {"x": [None]}, [7]]

SMALL = ("--n-test", "2", "--max-new-tokens", "3", "--refusal-token", "I")
RUN, OUT, MODEL = "run", "out", "model"
LOOSE = ["--kl-threshold", "1e9", "--induce-threshold=-1e9", "--n-val", "2", "--no-filter"]
CHAIN = ["run", MODEL, "-o", "chain", *LOOSE, "--n-train", "4", *SMALL]
# Which commands read which file, in the folder that ``made`` prepares.
READ: dict[str, list[list[str]]] = {
    "run/extract.json": [
        ["select", RUN, "--n-val", "2", "--no-filter"],
        ["inspect", RUN],
        ["trace", RUN],
        ["fragility", RUN, "--steps", "2", "--n-test", "2", "--max-new-tokens", "2"],
        ["evaluate", MODEL, "--direction", RUN, *SMALL],
        ["report", RUN],
    ],
    "run/directions.safetensors": [
        ["select", RUN, "--n-val", "2", "--no-filter"],
        ["inspect", RUN],
        ["report", RUN],
    ],
    "run/activations.safetensors": [["inspect", RUN], ["report", RUN]],
    "run/selection.json": [
        ["select", "--scores", "run/selection.json"],
        ["inspect", RUN],
        ["trace", RUN],
        ["evaluate", MODEL, "--direction", RUN, *SMALL],
        ["report", RUN],
        ["select", RUN, "--n-val", "2", "--no-filter"],
    ],
    "run/scores.safetensors": [["select", RUN, "--n-val", "2", "--no-filter"]],
    "run/direction.safetensors": [
        ["orthogonalize", MODEL, "--direction", RUN, "-o", "new"],
        ["verify", OUT, "--direction", RUN],
        ["audit", OUT, "--direction", RUN],
        ["evaluate", MODEL, "--direction", RUN, *SMALL],
        ["report", RUN],
    ],
    "run/inspect.json": [["inspect", RUN], ["report", RUN]],
    "run/trace.json": [["trace", RUN], ["report", RUN]],
    "run/fragility.json": [
        ["report", RUN],
        ["fragility", RUN, "--steps", "2", "--n-test", "2", "--max-new-tokens", "2"],
    ],
    "run/evaluation.json": [
        ["report", RUN],
        ["evaluate", MODEL, "--direction", RUN, *SMALL],
    ],
    "run/completions/manifest.json": [
        ["evaluate", MODEL, "--direction", RUN, *SMALL],
        ["report", RUN],
    ],
    "run/completions/measured.json": [["evaluate", MODEL, "--direction", RUN, *SMALL]],
    "run/completions/baseline-harmful.jsonl": [
        ["evaluate", MODEL, "--direction", RUN, *SMALL],
        ["report", RUN],
    ],
    "out/abliterate.json": [
        ["verify", OUT, "--direction", RUN],
        ["verify", OUT, "--source", MODEL, "--direction", RUN],
        ["audit", OUT],
        ["audit", OUT, "--base", MODEL],
        ["orthogonalize", MODEL, "--direction", RUN, "-o", OUT, "--overwrite"],
    ],
    "out/config.json": [
        ["verify", OUT, "--source", MODEL, "--direction", RUN],
        ["diff", OUT, MODEL],
        ["audit", OUT],
        ["plan", OUT],
        ["writers", OUT],
    ],
    "out/generation_config.json": [
        ["verify", OUT, "--source", MODEL, "--direction", RUN],
        ["evaluate", OUT, *SMALL],
    ],
    "out/tokenizer_config.json": [["extract", OUT, "-o", "r2", "--n-train", "2", "--no-filter"]],
    "out/tokenizer.json": [["extract", OUT, "-o", "r2", "--n-train", "2", "--no-filter"]],
    "out/chat_template.jinja": [["extract", OUT, "-o", "r2", "--n-train", "2", "--no-filter"]],
    "out/model.safetensors": [
        ["verify", OUT, "--direction", RUN],
        ["diff", OUT, MODEL],
        ["audit", OUT],
        ["extract", OUT, "-o", "r2", "--n-train", "2", "--no-filter"],
        ["orthogonalize", OUT, "--direction", RUN, "-o", "new"],
    ],
    "out/model.safetensors.index.json": [
        ["verify", OUT, "--direction", RUN],
        ["writers", OUT],
        ["extract", OUT, "-o", "r2", "--n-train", "2", "--no-filter"],
    ],
    "out/adapter_config.json": [
        ["verify", OUT, "--direction", RUN],
        ["extract", OUT, "-o", "r2", "--n-train", "2", "--no-filter"],
    ],
    "chain/extract.json": [CHAIN],
    "chain/selection.json": [CHAIN],
    "chain/evaluation.json": [CHAIN],
    "chain/model/abliterate.json": [CHAIN],
    "new.partial/journal.jsonl": [["orthogonalize", MODEL, "--direction", RUN, "-o", "new"]],
    "answers.json": [["score", "answers.json"]],
    "answers.jsonl": [["score", "answers.jsonl"], ["prompts", "answers.jsonl"]],
    "scored.jsonl": [["score", "answers.json", "-o", "scored.jsonl"]],
    "prompts.json": [["prompts", "prompts.json"]],
    "run.lock": [["report", RUN]],
}
_MORE = int(os.environ.get("ABLITERATE_FUZZ", "0"))


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a run of it, an edited checkpoint and scored answers."""
    home = tmp_path_factory.mktemp("tampered")
    shutil.copytree(tiny("llama"), home / MODEL)
    kept = ["--save-activations=all", "--n-train", "4", "--no-filter", "--refusal-token", "I"]
    direction = ["--direction", RUN]
    (home / "answers.json").write_text(json.dumps([{"prompt": "How?", "response": "I cannot."}]))
    (home / "answers.jsonl").write_text(json.dumps({"prompt": "How?", "response": "No."}) + "\n")
    (home / "prompts.json").write_text(json.dumps([{"prompt": "How?", "category": "c"}]))
    before = Path.cwd()
    os.chdir(home)
    try:
        for command in (
            ["extract", MODEL, "-o", RUN, *kept],
            ["select", RUN, *LOOSE],
            ["inspect", RUN],
            ["trace", RUN, "--n-prompts", "2"],
            ["orthogonalize", MODEL, *direction, "-o", OUT],
            ["evaluate", MODEL, *direction, *SMALL],
            ["fragility", RUN, "--steps", "2", "--n-test", "2", "--max-new-tokens", "2",
             "--no-picture"],
            ["score", "answers.json", "-o", "scored.jsonl"],
            CHAIN,
        ):  # fmt: skip
            assert main([*command, "-q"]) == 0, command
    finally:
        os.chdir(before)
    return home


def _damages(file: Path) -> dict[str, bytes]:
    """Names of damages, and what the file holds then."""
    # As a chat template thousands of brackets are thousands of tokens, and take minutes to run.
    longest = 1000 if file.suffix == ".jinja" else sys.maxsize
    found = {name: content for name, content in CONTENTS.items() if len(content) <= longest}
    if file.name == "tokenizer.json" or file.suffix not in (".json", ".jsonl"):
        return found
    if not file.is_file():
        return found
    text = file.read_text()
    whole = json.loads(text.partition("\n")[0] if file.suffix == ".jsonl" else text)
    first: tuple[Any, ...] = (0,) if isinstance(whole, list) else ()
    tables = [(first, whole[0] if first else whole)]
    tables += [((*at, k), v) for at, t in tables for k, v in t.items() if isinstance(v, dict)]
    for at, table in tables:
        for key in table:
            for value in (*VALUES, ...):
                changed = json.loads(json.dumps(whole))
                place = changed
                for step in at:
                    place = place[step]
                if value is ...:
                    del place[key]
                else:
                    place[key] = value
                name = ".".join(map(str, (*at, key)))
                found[f"{name} = {str(value)[:12]}"] = json.dumps(changed).encode() + b"\n"
    return found


def _codes(
    made: Path, work: Path, file: str, damage: bytes, commands: list[list[str]]
) -> list[tuple[list[str], int]]:
    found = []
    for command in commands:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(made, work)
        (work / file).parent.mkdir(exist_ok=True)
        (work / file).write_bytes(damage)
        before = Path.cwd()
        os.chdir(work)
        try:
            found.append((command, main([*command, "-q"])))
        finally:
            os.chdir(before)
    return found


@pytest.mark.parametrize("file", READ)
def test_a_damaged_file_gives_no_unexpected_error(
    file: str, made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damages = list(_damages(made / file).items())
    # Others for each file, so that all kinds have their turn somewhere.
    draw = random.Random(f"{file} {_MORE}")
    damages = damages[:1] + draw.sample(damages[1:], min(_MORE or 1, len(damages) - 1))
    wrong = []
    for name, damage in damages:
        capfd.readouterr()
        # The suite has no time for more than one command each.
        commands = READ[file] if _MORE else [draw.choice(READ[file])]
        for command, code in _codes(made, tmp_path / "work", file, damage, commands):
            said = capfd.readouterr().err
            if code == 1 or "unexpected" in said:
                wrong.append((name, command, said[-300:]))
    assert not wrong, "\n".join(map(str, wrong))
