"""What strangers write never reaches a terminal as it is, whatever prints it."""

from __future__ import annotations

import ast
import io
import json
import logging
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import pytest

import abliterate
from abliterate import console
from abliterate.console import redact, safe

EVIL = (
    "\x1b]0;owned\x07\x1b[2J\x9b2J\x7f\u202e\u2066\u200b\u2028\ufeff\U000e0041[red]x[/red]\r\nok\t."
)
SHOWN = (
    "\\x1b]0;owned\\x07\\x1b[2J\\x9b2J\\x7f\\u202e\\u2066\\u200b\\u2028\\ufeff\\U000e0041"
    "[red]x[/red]\\r\\nok\\t."
)

# Format characters that show: signs of Arabic, Syriac, Kaithi and Egyptian script.
VISIBLE = {*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD,
           *range(0x13430, 0x13440)}  # fmt: skip


@pytest.fixture(autouse=True)
def _set_up() -> None:
    console.set_up(quiet=False, debug=False)


def test_safe_shows_every_character_that_acts_or_hides() -> None:
    for code in range(sys.maxunicode + 1):
        acts = unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        if acts and code not in VISIBLE:
            assert safe(chr(code)).isascii(), hex(code)
            assert safe(chr(code)).isprintable(), hex(code)
    for text in ("plain äß 日本語 Ωμέγα", "👍🏽 ❤️", "100 % [ok] \\ `x`"):
        assert safe(text) == text


def test_safe_keeps_lines_only_where_they_are_wanted() -> None:
    assert safe("a\n\tb\r\x1b", lines=True) == "a\n\tb\\r\\x1b"
    assert safe("a\n\tb\r\x1b") == "a\\n\\tb\\r\\x1b"
    assert safe("x" * 50 + "y" * 50, limit=20) == "x" * 14 + "…" + "y" * 5
    assert safe("x" * 20, limit=20) == "x" * 20


def test_lines_and_tables_show_what_they_hold(capfd) -> None:
    console.print_line(f"a {EVIL}")
    console.print_command("next", "select", EVIL)
    console.print_table(f"title {EVIL}", ["x", EVIL], [[EVIL, "1"], ["[bold]", "[/]"]])
    out = capfd.readouterr().out
    assert out.splitlines()[0] == f"a {SHOWN}"
    assert out.count(SHOWN) == 5
    assert "[bold]" in out
    assert "[/]" in out
    assert _unsafe(out) == set()


def test_answers_keep_lines_whatever_the_pieces(capfd) -> None:
    for piece in ("one\n", "\x1b", "[2", "J", "\ttwo", "\u202e", "\ud83d"):
        console.print_text(piece)
    assert capfd.readouterr().out == "one\n\\x1b[2J\ttwo\\u202e\\ud83d"


def test_errors_notes_and_traces_cannot_pass_for_other_lines(capfd) -> None:
    console.print_error(f"{EVIL}\npassed")
    console.print_note(EVIL)
    try:
        raise ValueError(f"{EVIL}\npassed")
    except ValueError as error:
        console.print_traceback(error)
    err = capfd.readouterr().err
    assert _unsafe(err) == set()
    lines = err.splitlines()
    assert lines[0].startswith("error: \\x1b]0;owned")
    assert lines[0].endswith("passed")
    assert "| passed" in lines
    assert "passed" not in lines


@pytest.mark.parametrize("name", ["abliterate", "strange.library", "httpx"])
def test_logs_of_anyone_are_safe(capfd, monkeypatch, name: str) -> None:
    logger = logging.getLogger(name)
    monkeypatch.setattr(logger, "level", logging.WARNING)  # libraries quieten some for good
    monkeypatch.setattr(logger, "disabled", False)
    logger.manager._clear_cache()
    logger.warning("a %s", EVIL)
    try:
        raise ValueError(EVIL)
    except ValueError:
        logger.warning("b %s\npassed", EVIL, exc_info=True)
    err = capfd.readouterr().err
    assert "owned" in err
    assert _unsafe(err) == set()
    assert "passed" not in err.splitlines()


def test_logs_of_a_library_with_a_handler_of_its_own_are_safe(capfd) -> None:
    logger = logging.getLogger("proud.library")
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        logger.error("c %s", EVIL)
    finally:
        logger.removeHandler(handler)
    err = capfd.readouterr().err
    assert err.startswith("c \\x1b")
    assert _unsafe(err) == set()


def test_log_is_safe_without_the_command_line() -> None:
    """As in a notebook: nobody has set up anything."""
    code = "from abliterate.console import log; log.warning('a %s', '\\x1b[2J\\npassed')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stderr.decode() == "a \\x1b[2J passed\n"


def test_warnings_are_safe(capfd) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        console.set_up(quiet=False, debug=True)
        warnings.simplefilter("always")
        warnings.warn(f"{EVIL}\npassed", stacklevel=1)
        logging.captureWarnings(False)
    err = capfd.readouterr().err
    assert "owned" in err
    assert _unsafe(err) == set()
    assert "passed" not in err.splitlines()


def test_progress_is_safe(capfd, monkeypatch) -> None:
    monkeypatch.setattr(console, "bars_hidden", lambda: False)
    bar = console._bar()(total=2, desc=EVIL, file=sys.stderr)
    bar.set_postfix_str(EVIL)
    bar.set_description(EVIL)
    bar.update(2)
    bar.close()
    err = capfd.readouterr().err
    assert "owned" in err
    assert _unsafe(err.replace("\r", "").replace("\x1b[A", "")) == set()


def test_json_is_exact_and_does_nothing_to_a_terminal(capfd) -> None:
    document = {EVIL: [EVIL, "\ud800", "äß 👍🏽"]}
    console.print_json(document)
    out = capfd.readouterr().out
    assert json.loads(out) == document
    assert _unsafe(out) == set()
    assert "äß 👍🏽" in out


def test_streams_of_small_encodings_get_escapes(monkeypatch) -> None:
    import io

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    console.print_line("ä→")
    console.print_table("t→", ["x"], [["→"]])
    console.print_text("→\n")
    console.print_json({"a": "→"})
    sys.stdout.flush()
    text = raw.getvalue().decode("latin-1")
    assert text.startswith("ä\\u2192\n")
    assert '"\\u2192"' in text


def test_secrets_are_redacted(capfd, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    console.hide("pw", "long-secret")
    assert redact("pw: long-secrets, pwd, hf_abcdef") == "***: ***s, pwd, ***"
    console.print_line("long-secret")
    console.print_table("long-secret", ["a"], [["long-secret"]])
    console.print_error("https://u:x@h/a@b and socks5://u:x@h, not hf://datasets/a/b@main")
    console.log.warning("long-secret %s", "hf_abcdef")
    found = capfd.readouterr()
    assert "secret" not in found.out + found.err
    assert "hf_" not in found.err
    assert "https://***@b and socks5://***@h, not hf://datasets/a/b@main" in found.err
    console.set_up(quiet=False, debug=False)
    assert redact("long-secret") == "long-secret"


# What may stand outside console.py: where a stream is looked at or put aside, never written to.
ALLOWED = {
    ("cli/chat.py", "sys.stdout.isatty"),
    ("distributed/rank_process.py", "sys.stdout.flush"),
    ("distributed/rank_process.py", "sys.stderr.flush"),
    ("distributed/rank_process.py", "sys.stdout"),  # of ranks that say nothing: to /dev/null
    ("prompts/template_worker.py", "sys.stdout"),  # the pipe of a process of its own
    ("prompts/template_worker.py", "sys.stderr"),
    ("cli/options.py", "rich.markup"),  # of help texts, which are ours
    # Arranges cells that the console has made safe, and hands them back to it.
    *(
        ("table_layout.py", f"rich.{part}")
        for part in ("console", "measure", "padding", "table", "text")
    ),
}
SINKS = {
    "typer.echo", "typer.secho", "typer.confirm", "typer.prompt", "logging.StreamHandler",
    "logging.basicConfig", "logging.lastResort", "warnings.showwarning", "traceback.print_exc",
    "traceback.print_exception", "sys.displayhook", "sys.excepthook",
}  # fmt: skip
WRITERS = {"rich", "tqdm", "click", "getpass", "pprint", "curses"}


def test_nothing_but_the_console_writes() -> None:
    package = Path(abliterate.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        if name != "console.py":
            found |= {(name, what) for what in _sinks(ast.parse(path.read_text()))}
    assert found == ALLOWED


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _sinks(tree: ast.Module) -> set[str]:
    found = set()
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            dotted = _dotted(node)
            if dotted.startswith(("sys.stdout", "sys.stderr", "sys.__std")) or dotted in SINKS:
                found.add(dotted)
        if isinstance(node, ast.Name) and node.id in ("print", "breakpoint"):
            found.add(node.id)
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.partition(".")[0] in WRITERS}
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in WRITERS:
            found.add(str(node.module))
    return found


def test_the_search_for_sinks_finds_them() -> None:
    code = "import sys, rich\nprint(1)\nsys.stderr.write('x')\nfrom tqdm import tqdm\ntyper.echo(2)"
    assert _sinks(ast.parse(code)) == {"rich", "print", "sys.stderr.write", "tqdm", "typer.echo"}


def _unsafe(text: str) -> set[str]:
    """The characters that a terminal would act on, or that hide."""
    return {
        hex(ord(c))
        for c in text
        if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    }


def _records(name: str) -> list[dict[str, Any]]:
    return [{"prompt": "p", "response": "I cannot", "category": f"c{EVIL}"}]


def test_command_line_shows_strange_texts(cli, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps([f"plain {EVIL}"]))
    (tmp_path / "a.json").write_text(json.dumps(_records("a")))
    (tmp_path / "c.toml").write_text('[model]\n"dev\\u001b[2J\\u202e" = 1\n')
    (tmp_path / "v.toml").write_text('[model]\ndevice = "\\u001b[2J\\u202e"\nseed = "\\u001b"\n')
    (tmp_path / f"n{EVIL.replace('/', '')}.json").write_text("[")
    for command in (
        ("prompts", tmp_path / "p.json"),
        ("score", tmp_path / "a.json"),
        ("score", tmp_path / f"n{EVIL.replace('/', '')}.json"),
        ("score", f"none{EVIL}.json"),
        ("score", tmp_path / "a.json", "--config", tmp_path / "c.toml"),
        ("score", tmp_path / "a.json", "--config", tmp_path / "v.toml"),
        ("score", f"--no{EVIL}"),
        ("score", "a", f"more{EVIL}"),
        (f"command{EVIL}",),
        ("chat", f"./model{EVIL}", "--debug"),
    ):
        found = cli(*command)
        text = found.out + found.err
        assert _unsafe(text) == set(), command
        assert "\\x1b" in text, command
    assert f"- plain {SHOWN}" in cli("prompts", tmp_path / "p.json").out
    listed = cli("prompts", tmp_path / "p.json", "--json")
    assert listed.json["examples"][0]["text"] == f"plain {EVIL}"
    assert _unsafe(listed.out) == set()


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_color_leaves_no_escape_codes_at_a_terminal(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer import rich_utils

    answers = tmp_path / "a.json"
    answers.write_text(json.dumps([{"prompt": "p", "response": "I cannot"}]))
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color"), ("COLUMNS", "100")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rich_utils, "COLOR_SYSTEM", "auto")
    for wanted in (True, False):
        if not wanted:
            monkeypatch.setenv("NO_COLOR", "1")
        for words in (("prompts", "harmful"), ("score", answers), ("score", "--help"), ("--help",)):
            shown = cli(*words)
            assert shown.code == 0
            assert ("\x1b" in shown.out + shown.err) is wanted, words
        with monkeypatch.context() as patch:
            stdout = _Terminal()
            patch.setattr(sys, "stdout", stdout)
            console.print_thought("hm")
        assert (stdout.getvalue() == "hm") is not wanted
