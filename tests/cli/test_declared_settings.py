"""A setting is declared once, as a field; its option, its TOML key and its record follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from abliterate.cli import options as opt
from abliterate.cli.app import app
from abliterate.errors import InputError, UsageError
from abliterate.settings import (
    ExtractSettings,
    Option,
    Recorded,
    Settings,
    load_settings,
    options_of,
    sections_of,
    take_recorded,
)


class WiderExtract(ExtractSettings):
    """One field more, and nothing else."""

    share: Annotated[
        float, Recorded(), Option("Share of the prompts [all].", "Prompts", ("extract",))
    ] = Field(0.5, gt=0, le=1)
    sorted: Annotated[
        bool, Option("In their order.", "Method", ("extract",), "--sorted/--no-sorted")
    ] = True
    tags: Annotated[tuple[str, ...], Option("Repeatable.", None, ("extract",), "--tag")] = ()


class WiderSettings(Settings):
    """All settings, with that section."""

    extract: WiderExtract = WiderExtract()


def _run(*argv: str) -> Any:
    """A command ``extract`` of its own that shows the settings that it was given."""
    wider = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="rich")

    @wider.command()
    @opt.command(schema=WiderSettings)
    def extract(given: opt.Given, config: opt.Config = None) -> None:
        settings = load_settings(config, given, schema=WiderSettings)
        typer.echo(settings.model_dump_json())

    return CliRunner().invoke(wider, [*argv, "-q"], env={"COLUMNS": "200"})


def test_a_field_more_is_an_option_more_in_help() -> None:
    shown = _run("--help").output
    lines = shown.splitlines()
    share, rows = (
        next(line for line in lines if flag in line) for flag in ("--share", "--no-sorted")
    )
    assert "Share of the prompts [all]." in share
    assert "[default: (0.5)]" in share
    assert "float" in share.lower()  # an older typer: FLOAT
    assert "[default: (True)]" in rows
    assert "--tag" in shown
    # Under its heading, and behind the section's own fields.
    headings = [index for index, line in enumerate(lines) if line.startswith("╭")]
    heading = max(index for index in headings if index < lines.index(share))
    assert "Prompts" in lines[heading]
    assert lines.index(share) > next(i for i, line in enumerate(lines) if "--n-train" in line)


def test_a_field_more_is_read_from_options_and_toml_and_bounded(tmp_path: Path) -> None:
    def extract(*argv: str) -> Any:
        found = _run(*argv)
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            raise found.exception
        return json.loads(found.output)["extract"]

    assert extract()["share"] == 0.5
    given = extract("--share", "0.25", "--no-sorted", "--tag", "a", "--tag", "b")
    assert (given["share"], given["sorted"], given["tags"]) == (0.25, False, ["a", "b"])
    file = tmp_path / "mine.toml"
    file.write_text("[extract]\nshare = 0.75\nsorted = false\n")
    assert extract("--config", str(file))["share"] == 0.75
    assert extract("--config", str(file))["sorted"] is False
    assert extract("--config", str(file), "--share", "1")["share"] == 1.0
    with pytest.raises(UsageError, match=r"^share: must be at most 1, not 2"):
        extract("--share", "2")
    with pytest.raises(UsageError, match=r"^tag: not valid Unicode text"):
        load_settings(options={"extract": {"tags": ["\ud83d"]}}, schema=WiderSettings)
    file.write_text("[extract]\nshare = 0\n")
    with pytest.raises(UsageError, match=r"toml: \[extract\] share: must be more than 0, not 0"):
        extract("--config", str(file))
    file.write_text("[extract]\nshar = 1\n")
    with pytest.raises(UsageError, match="did you mean 'share'"):
        extract("--config", str(file))


def test_a_field_more_is_in_the_record_and_taken_from_it_as_marked() -> None:
    given = {"extract": {"share": 0.25, "sorted": False}}
    record = json.loads(load_settings(options=given, schema=WiderSettings).model_dump_json())
    assert record["extract"]["share"] == 0.25
    taken = take_recorded(record, "a record", WiderSettings)
    assert taken["extract"]["share"] == 0.25
    assert "sorted" not in taken["extract"]
    record["extract"]["share"] = 3.0
    with pytest.raises(InputError, match=r"a record: \[extract\] share"):
        take_recorded(record, "a record", WiderSettings)


def test_every_setting_is_an_option_of_the_commands_that_it_names() -> None:
    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for table, section in sections_of(Settings).items():
        for key in section.model_fields:
            declared = options_of(section, key)
            assert declared, f"[{table}] {key}"
            for option in declared:
                for command in option.commands:
                    shown = [p for p in commands[command].params if p.name in _names(key, option)]
                    assert len(shown) == 1, (table, key, command)
                    assert shown[0].default is None, "only what was given overrides a file"


def _names(key: str, option: Option) -> set[str]:
    flag = (option.flags or key).partition("/")[0]
    return {flag.removeprefix("--").replace("-", "_")}


def test_a_command_without_room_for_its_settings_is_no_command() -> None:
    def writers(model: opt.Model) -> None:
        raise AssertionError(model)

    with pytest.raises(TypeError, match="given"):
        opt.command()(writers)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("--thinking=maybe", "--thinking: must be answer, skip or whole, not 'maybe'"),
        ("--n-train=0", "--n-train: must be at least 1, not 0"),
        ("--winsor-quantile=2", "--winsor-quantile: must be below 0.5, not 2.0"),
        ("n_train = 'many'", "[extract] n_train: must be an integer, not 'many'"),
        ("filter = 'maybe'", "[extract] filter: must be true or false, not 'maybe'"),
        ("harmful = 3", "[extract] harmful: must be text, not 3"),
        ("winsor_quantile = nan", "[extract] winsor_quantile: must be below 0.5, not nan"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_the_words_of_the_house(
    cli, tmp_path, given: str, line: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("" if given.startswith("-") else f"[extract]\n{given}\n")
    options = [given] if given.startswith("-") else []
    refused = cli("extract", "no-model", "-o", tmp_path / "run", "--config", file, *options)
    assert refused.code == 2
    assert refused.err.strip().endswith(line)
