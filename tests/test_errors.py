"""A setting is an argument in the library's messages, and an option in the command line's."""

from __future__ import annotations

import logging
import typing

import pytest
import typer.main

import abliterate
from abliterate.cli.app import app
from abliterate.errors import (
    CheckpointError,
    InputError,
    UsageError,
    addressed,
    argument_name,
    speaking_of_options,
)
from abliterate.settings import Settings


def test_messages_speak_to_who_reads_them(caplog: pytest.LogCaptureFixture) -> None:
    error = UsageError("--n-train 3: pass --no-filter, or run `abliterate x --n-train 8`; a--b.txt")
    said = "n_train 3: pass filter=False, or run `abliterate x --n-train 8`; a--b.txt"
    assert str(error) == said
    with speaking_of_options():
        assert str(error).startswith("--n-train 3: pass --no-filter")
        with pytest.raises(ZeroDivisionError), speaking_of_options():
            _ = 1 / 0
        assert addressed("--seed") == "--seed"
    assert str(error) == said
    logging.getLogger("abliterate").warning("raise --max-new-tokens")
    assert "--max" not in caplog.text


@pytest.mark.parametrize(
    ("option", "argument"),
    [
        ("give --template plain (the text)", "give chat=ChatFormat(template='plain') (the text)"),
        ("with --template FILE, or", "with chat=ChatFormat(template=...), or"),
        ("check --system and --template-arg, or",
         "check chat=ChatFormat(system=...) and chat=ChatFormat(template_kwargs=...), or"),
        ("--template-arg lang: never read",
         "chat=ChatFormat(template_kwargs={'lang': ...}): never read"),
        ("give --template-arg tools=[]", "give chat=ChatFormat(template_kwargs={'tools': []})"),
        ("with --template-arg a=VALUE, or", "with chat=ChatFormat(template_kwargs={'a': ...}), or"),
        ("pass --thinking skip", "pass chat=ChatFormat(thinking='skip')"),
        ("give more (--n-train) or another --harmful source",
         "give more or another harmful source"),
        ("raise --judge-template or --n-train", "raise judge_template or n_train"),
    ],
)  # fmt: skip
def test_settings_are_named_as_they_are_passed(option: str, argument: str) -> None:
    assert addressed(option) == argument
    with speaking_of_options():
        assert addressed(option) == option


def test_library_errors_of_chat_and_counts_name_arguments(tiny) -> None:
    lm = abliterate.load(str(tiny("llama")), device="cpu")
    texts = [f"thing {number}" for number in range(9)]
    with pytest.raises(InputError) as few:
        abliterate.extract(lm, texts, texts[:8], refusal_tokens=[3])
    told = "give more or another harmful source, name the refusal tokens with refusal_tokens"
    assert told in str(few.value)
    lm.tokenizer.chat_template = None
    with pytest.raises(CheckpointError, match=r"give chat=ChatFormat\(template='plain'\) \("):
        abliterate.activations(lm, texts)
    plain = abliterate.ChatFormat(template="plain")
    wrapped = abliterate.wrap(lm.model, lm.tokenizer, chat=plain)
    assert len(abliterate.activations(wrapped, texts, layer=1)) == 9


def test_one_fault_reads_as_argument_and_as_option(fails, tiny, tmp_path) -> None:
    with pytest.raises(UsageError) as raised:
        abliterate.EditOptions(scale=0)
    run = abliterate.Direction(__import__("torch").ones(48)).save(tmp_path / "d.safetensors")
    line = fails(
        "orthogonalize", tiny("llama"), "--direction", run, "-o", tmp_path / "o", "--scale", "0",
        code=2,
    )  # fmt: skip
    assert str(raised.value) == "scale must be a number other than zero, not 0"
    assert line == "error: --scale must be a number other than zero, not 0.0"


def test_every_option_has_the_name_of_an_argument() -> None:
    """Catches an option whose argument is called otherwise and that errors.py does not know."""
    commands: typing.Any = typer.main.get_command(app)
    options = {
        name.removeprefix("--")
        for command in commands.commands.values()
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("--")
    }
    assert {"n-train", "no-filter", "refusal-token"} <= options
    names = {argument_name(option) for option in options}
    assert argument_name("system") == "chat=ChatFormat(system=...)"
    assert all("-" not in name.replace("--debug", "") for name in names), names
    fields = {
        field
        for section in Settings.model_fields
        for field in _fields(getattr(Settings(), section))
    }
    assert argument_name("n-train") in fields


def _fields(section: typing.Any) -> typing.Iterable[str]:
    return type(section).model_fields
