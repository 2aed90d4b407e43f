"""Tables fit the width that COLUMNS names, and lose nothing; help says no types of flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from abliterate.cli.app import main

WIDTH = 60
TRAIN = ("--no-filter", "--refusal-token", "I", "--n-train", "6", "--save-activations")
FREE = ("--kl-threshold", "1e9", "--induce-threshold=-1e9", "--no-filter", "--n-val", "3")
SHORT = ("--n-test", "2", "--max-new-tokens", "2")


@pytest.fixture(scope="module")
def shown(tiny, tmp_path_factory) -> dict[str, str]:
    """By command, its stdout with COLUMNS=60."""
    place, model = tmp_path_factory.mktemp("narrow"), tiny("llama")
    run, out = place / "run", place / "out"
    chain: dict[str, tuple[object, ...]] = {
        "extract": (model, "-o", run, *TRAIN),
        "select": (run, *FREE),
        "orthogonalize": (model, "--direction", run, "-o", out),
        "verify": (out, "--source", model, "--direction", run),
        "evaluate": (model, "--direction", run, "--checkpoint", out, *SHORT, "--controls", "2"),
        "inspect": (run,),
        "trace": (run, "--n-prompts", "2", "--suffix", "please do"),
        "fragility": (run, "--steps", "2", *SHORT, "--no-picture"),
        "writers": (model,),
        "plan": (model,),
        "audit": (out, "--base", model, "--tensors"),
        "diff": (out, model),
        "prompts": ("harmful",),
    }
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(WIDTH))
        for name, words in chain.items():
            found[name] = _stdout(place / name, name, *words)
    return found


def _stdout(path: Path, *words: object) -> str:
    """What a command writes to stdout; audit ends with a code of its own."""
    from contextlib import redirect_stdout

    with path.open("w", encoding="utf-8") as file, redirect_stdout(file):
        assert main([*map(str, words), "--quiet"]) in (0, 7), words
    return path.read_text("utf-8")


def _of_tables(text: str) -> list[str]:
    """The lines of tables: drawn, or a row's lines below its name."""
    return [line for line in text.splitlines() if set("┏┃┡│└") & set(line) or line.startswith("  ")]


def test_tables_fit_columns(shown: dict[str, str]) -> None:
    for name, text in shown.items():
        lines = _of_tables(text)
        assert lines, name
        assert [line for line in lines if len(line) > WIDTH] == [], name
        assert not any("…" in line for line in lines), name


def test_a_narrow_table_has_every_row_and_cell(shown: dict[str, str], tiny, cli) -> None:
    wide = cli("writers", tiny("llama")).out
    rows = [line for line in wide.splitlines() if line.startswith("│")]
    assert len(rows) > 6
    assert max(map(len, rows)) > WIDTH
    narrow = shown["writers"].splitlines()
    blocks = [narrow[at + 1 : at + 6] for at, line in enumerate(narrow) if line.startswith("block")]
    found = [[cell.split(maxsplit=1)[1].strip() for cell in block] for block in blocks]
    assert found == [[cell.strip() for cell in row.split("│")[2:-1]] for row in rows]


def test_tables_name_their_units(shown: dict[str, str]) -> None:
    def told(name: str) -> str:
        return " ".join(shown[name].split())

    # A heading may be folded between its words.
    for word in ("bypass", "induce", "(log-odds)", "KL", "(nats)", "not finite"):
        assert word in told("select"), word
    for word in ("harmful log-odds", "harmless KL (nats)", " pp ("):
        assert word in told("evaluate"), word


def test_no_help_tells_the_type_of_a_flag(cli) -> None:
    commands = ("extract", "select", "run", "evaluate", "report", "audit", "chat", "demo")
    for words in ((), *((name,) for name in commands)):
        result = cli(*words, "--help")
        assert result.code == 0
        assert "--help" in result.out
        assert "bool" not in result.out.lower(), words
