"""Tables fit the width that COLUMNS names, and lose nothing; help says no types of flags."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from abliterate.cli.app import main
from abliterate.table_layout import laid_out

WIDTH = 60
TRAIN = ("--no-filter", "--refusal-token", "I", "--n-train", "6", "--save-activations")
FREE = ("--kl-threshold", "1e9", "--induce-threshold=-1e9", "--no-filter", "--n-val", "3")
SHORT = ("--n-test", "2", "--max-new-tokens", "2")


@dataclass(frozen=True)
class Laid:
    """What a table was made of."""

    title: Text
    columns: list[Text]
    rows: list[list[Text]]
    left: int


@pytest.fixture(scope="module")
def tables() -> list[Laid]:
    """Every table that was printed for :func:`shown`."""
    return []


@pytest.fixture(scope="module")
def shown(tiny, tmp_path_factory, tables: list[Laid]) -> dict[str, str]:
    """By command, its stdout with COLUMNS=60."""

    def noted(console: Console, *given: Any) -> Any:
        tables.append(Laid(*given))
        return laid_out(console, *given)

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
        patch.setattr("abliterate.table_layout.laid_out", noted)
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
    return [
        line for line in text.splitlines() if set("┏┃┡│└┌") & set(line) or line.startswith("  ")
    ]


def test_tables_fit_columns(shown: dict[str, str]) -> None:
    for name, text in shown.items():
        lines = _of_tables(text)
        assert lines, name
        assert [line for line in lines if len(line) > WIDTH] == [], name
        assert not any("…" in line for line in lines), name


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_every_table_fits_and_keeps_its_numbers_whole(
    shown: dict[str, str], tables: list[Laid], width: int
) -> None:
    assert len(tables) > 15
    for table in tables:
        console = Console(file=io.StringIO(), width=width, highlight=False)
        console.print(laid_out(console, table.title, table.columns, table.rows, table.left))
        text = console.file.getvalue()
        assert [line for line in text.splitlines() if len(line.rstrip()) > width] == []
        assert "\x1b" not in text
        for cell in (cell.plain for row in table.rows for cell in row):
            numbers = re.findall(r"(?<![\w./-])[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?(?![\w./-])", cell)
            assert [number for number in numbers if number not in text] == [], cell


def test_a_list_of_facts_has_no_empty_headings(shown: dict[str, str]) -> None:
    lines = shown["audit"].splitlines()
    at = next(at for at, line in enumerate(lines) if line.startswith("│ decided by"))
    assert lines[at - 1].startswith("┌")


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
    for word in ("bypass", "induce", "(log-odds)", "KL", "(nats)"):
        assert word in told("select"), word
    # At layer 0 the template's eight tokens have no direction; the last of four layers is pruned.
    assert "(dropped: 8 not finite, 8 in the last layers); means over" in told("select")
    for word in ("harmful log-odds", "harmless KL (nats)", " pp ("):
        assert word in told("evaluate"), word


def test_no_help_tells_the_type_of_a_flag(cli) -> None:
    commands = ("extract", "select", "run", "evaluate", "report", "audit", "chat", "demo")
    for words in ((), *((name,) for name in commands)):
        result = cli(*words, "--help")
        assert result.code == 0
        assert "--help" in result.out
        assert "bool" not in result.out.lower(), words


@pytest.mark.parametrize("width", [40, 80])
def test_help_is_whole_however_narrow(width: int, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for name in ("", "fragility", "audit"):
        text = cli(*([name] if name else []), "-h").out
        assert "…" not in text, name
        assert "\\[" not in text, name
        assert width < 80 or max(map(len, text.splitlines())) <= width
    narrow = cli("fragility", "-h").out
    for option in ("--max-new-tokens", "--attn-implementation", "--trust-remote-code"):
        assert option in narrow
    assert "List what writes to the residual stream" in " ".join(cli("-h").out.split())


def test_what_rounds_to_zero_has_no_sign(capsys: pytest.CaptureFixture[str]) -> None:
    """In the table of controls, in those of evaluate and inspect, and in the report's numbers."""
    from abliterate.cli.control_tables import show_controls
    from abliterate.cli.evaluation_tables import _with_change
    from abliterate.report.facts import number

    figures = dict.fromkeys(("harmful_score", "harmless_score", "kl_divergence"), -0.0004)
    family = {"members": [figures, figures]}
    show_controls({"rows": {"ablate": {"selected": figures, "families": {"layers": family}}}})
    shown = capsys.readouterr().out
    assert "0.000 (0.000 to 0.000)" in shown
    assert "-0.000" not in shown
    assert _with_change(-0.0004, -0.0004, ".3f") == "0.000 +0.000"
    assert [number(-1e-9, form) for form in ("+.2f", ".3f", ".0%")] == ["+0.00", "0.000", "0%"]
    assert number(-0.0012, "+.3f") == "-0.001"


def test_tables_in_a_pipe_fold_nothing_unless_columns_says_so(tiny, tmp_path: Path) -> None:
    """Neither cells nor a title that is wider than its table."""
    model = tmp_path / ("a-rather-long-name-of-a-model-" * 5)
    model.symlink_to(tiny("llama"))

    def shown(columns: str | None) -> list[str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("COLUMNS", raising=False)
            if columns is not None:
                patch.setenv("COLUMNS", columns)
            return _stdout(tmp_path / "out", "plan", model, "--machine", "24GB").splitlines()

    assert shown(None)[0] == f"{model} (llama)"
    narrow = shown("70")
    assert str(model) in "".join(narrow[:8])
    assert max(map(len, narrow[:8])) <= 70
