"""What is rendered is what was asked: templates that lose text, arguments that nothing reads, plain
prompts, the record of the rendering and the date, through the command line."""

from __future__ import annotations

import datetime
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from abliterate.prompts.chat_template import ChatFormat, encode, render

TRAIN = ("--no-filter", "--refusal-token", "I", "--n-train", "4")
OPEN = ("--no-filter", "--n-val", "4", "--kl-threshold", "1e9", "--induce-threshold=-1e9")
SHORT = ("--n-test", "2", "--max-new-tokens", "2", "--controls", "0")
TURN = "<|start|>{{ m.role }}\n%s<|end|>\n"
OPENING = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"


def each(content: str = "{{ m.content }}", messages: str = "messages") -> str:
    """A template that writes each message's content in this way."""
    return f"{{% for m in {messages} %}}{TURN % content}{{% endfor %}}{OPENING}"


PARTS = each("{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
             "{% endfor %}")  # fmt: skip
NO_SYSTEM = each(messages="messages if m.role != 'system'")
HERMES = "{% if tools|length > 0 %}<tools>{{ tools }}{% endif %}" + each()
DATED = "Today: {{ strftime_now('%Y-%m-%d') }} {{ date_string }}\n" + each()


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A tiny checkpoint with this template, or with none."""

    def make(template: str | None, name: str = "model") -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny("llama"), folder)
        path = folder / "chat_template.jinja"
        path.unlink() if template is None else path.write_text(template)
        return folder

    return make


@pytest.fixture
def extracted(cli: Any, tmp_path: Path) -> Callable[..., Any]:
    """The record of an extraction into ``tmp_path / 'run'``."""

    def run(model: Path, *options: str | Path, into: str = "run") -> Any:
        result = cli("extract", model, "-o", tmp_path / into, *TRAIN, *options, "--json")
        assert result.code == 0, result.err
        return result.json

    return run


def test_content_as_parts_is_given_where_the_template_wants_it(
    model: Any, extracted: Any, cli: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    folder = model(PARTS)
    record = extracted(folder, "--system", "Be brief.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [("system", "Be brief."), ("user", "How do I bake bread?")]
    parts = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in turns]
    assert record["rendering"]["prompt"] == tokenizer.apply_chat_template(
        parts, tokenize=False, add_generation_prompt=True
    )
    means = load_file(tmp_path / "run" / "directions.safetensors")
    assert not torch.equal(means["mean_harmful"], means["mean_harmless"])
    lines = ["How do I bake bread?", "/reset", "Name a river in France.", "And one in Spain?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    said = cli("chat", folder, "--max-new-tokens", "12", "--json")
    assert said.code == 0, said.err
    answers = [turn["answer"] for turn in said.json["turns"]]
    assert len(set(answers)) == 3


@pytest.mark.parametrize("role", ["user", "system"])
def test_one_role_alone_may_be_read_as_parts(role: str, model: Any, extracted: Any) -> None:
    text = (
        f"{{% if m.role == '{role}' %}}{{{{ m.content[0].text }}}}{{% else %}}{{{{ m.content }}}}"
    )
    record = extracted(model(each(text + "{% endif %}")), "--system", "Be brief.")
    usual = extracted(model(each(), "usual"), "--system", "Be brief.", into="usual run")
    assert record["rendering"]["prompt"] == usual["rendering"]["prompt"]


LOSING: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "all": ("<|start|>user\n<|end|>\n" + OPENING, (), ("same for every prompt", "--template")),
    "the role": (NO_SYSTEM, ("--system", "Be brief."), ("leaves the system message out",)),
    "the rest": (each(messages="messages[:1]"), ("--system", "x y"),
                 ("loses the user's text behind a system message", "leave --system out")),
    "the end": (each("{{ m.content[:100] }}"), (), ("cuts the user's text off after some 100",)),
    "capitals": (each("{{ m.content|upper }}"), (), ("changes capital letters",)),
    "quotes": (each("{{ m.content|e }}"), (), ("loses or changes part of the prompt",)),
    "a word": (each("{{ m.content|replace('a', '') }}"), (), ("loses the user's text",)),
    "nothing, but raises": (
        each() + "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}"
        "{% endif %}", ("--system", "x"), ("takes no system message (No system role)",)),
    "nothing, but wants a system message": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('Say who') }}{% endif %}" + each(),
        (), ("fails without a system message (Say who)", "--system TEXT")),
    "nothing, but wants tools": (HERMES, (), ("--template-arg tools=[]", "fails")),
    "nothing, but wants a name": ("{{ name.upper() }}" + each(), (),
                                  ("'name' is undefined", "--template-arg name=VALUE")),
    "nothing, but is broken": ("\n{% if %}", (), ("fails (", "in line 2)", "--template FILE")),
}  # fmt: skip


@pytest.mark.parametrize("what", LOSING)
def test_a_template_that_loses_text_is_refused(
    what: str, model: Any, fails: Any, tmp_path: Path
) -> None:
    template, options, needles = LOSING[what]
    folder = model(template)
    line = fails("extract", folder, "-o", tmp_path / "run", *TRAIN, *options, code=4)
    assert str(folder) in line
    for needle in needles:
        assert needle in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["{{ m.content|trim }}", "{{ m.content.split()|join(' ') }}",
                                     "  {{ m.content|indent(4) }}\n\n"])  # fmt: skip
def test_a_template_may_trim(content: str, model: Any, extracted: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"  How   to {word} this? \n" for word in "abcdefgh"))
    record = extracted(model(each(content)), "--harmless", prompts, "--system", " Be\n brief. ")
    assert "How do I bake bread?" in record["rendering"]["prompt"]


def test_the_end_of_a_long_prompt_and_marked_prompts_do_not_get_lost(
    model: Any, fails: Any, extracted: Any, tmp_path: Path
) -> None:
    """What no probe shows is found in the prompts themselves."""
    out, prompts = ("-o", tmp_path / "out"), tmp_path / "prompts.txt"
    usual = [f"How to {word} this?" for word in "abcdefgh"]
    for template, prompt in (
        (each("{{ m.content[:9000] }}"), "word " * 2000 + "end"),
        (each("{{ m.content.split('</think>')[-1] }}"), "Plan this.</think> Go."),
    ):
        folder = model(template, f"model{len(prompt)}")
        prompts.write_text("\n".join([*usual, prompt]))
        line = fails(
            "extract", folder, *out, *TRAIN[:3], "--n-train", "9", "--harmful", prompts, code=4
        )
        assert f"loses or changes part of the prompt '{prompt[:20]}" in line
    # A switch for the model's thinking is no text.
    prompts.write_text("\n".join([*usual, "Go there. /no_think"]))
    switch = model(each("{{ m.content|replace('/no_think', '') }}"), "switch")
    extracted(switch, "--harmful", prompts, "--n-train", "9")


def test_a_system_message_that_a_template_reads_as_a_switch_passes(
    model: Any, extracted: Any, fails: Any, tmp_path: Path
) -> None:
    """As SmolLM3's: the words do what they say, and are not written."""
    template = (
        "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
        "{{ '<quick>' if 'QUICK' in s else '<slow>' }}{{ s|replace('QUICK', '') }}\n"
        + each(messages="messages if m.role != 'system'")
    )
    folder = model(template)
    assert extracted(folder, "--system", "QUICK")["rendering"]["prompt"].startswith("<quick>\n")
    usual = model(each(messages="messages if m.content != '/think'"), "usual")
    extracted(usual, "--system", "/think")  # a switch to what is so anyhow
    mute = model(each("{{ m.content|replace('QUICK', '') }}", "messages if m.content != 'QUICK'"),
                 "mute")  # fmt: skip
    line = fails("extract", mute, "-o", tmp_path / "r", *TRAIN, "--system", "QUICK", code=4)
    assert "leaves this system message out" in line


def test_what_is_odd_in_a_template_is_said_and_done(model: Any, cli: Any, tmp_path: Path) -> None:
    twice = cli("extract", model(each("{{ m.content }} {{ m.content }}"), "twice"), "-o",
                tmp_path / "a", *TRAIN)  # fmt: skip
    assert twice.code == 0, twice.err
    assert "writes the user's text 2 times" in " ".join(twice.err.split())
    closed = each().replace(OPENING, "")
    silent = cli("extract", model(closed, "closed"), "-o", tmp_path / "b", *TRAIN)
    assert silent.code == 0, silent.err
    said = " ".join(silent.err.split())
    assert "ignores add_generation_prompt" in said
    assert "assistant" in said
    # Llama 2's way needs none: the mark of the end is the start of the answer.
    inst = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} {% endif %}{% endfor %}"
    )
    fine = cli("extract", model(inst, "inst"), "-o", tmp_path / "c", *TRAIN)
    assert fine.code == 0, fine.err
    assert "add_generation_prompt" not in fine.err


@pytest.mark.parametrize(
    ("messages", "needle"),
    [
        ("messages[:1]", "loses the answer before, the last turn"),
        ("messages if loop.index < 3", "loses the last turn"),
        ("messages[-1:]", "loses the first turn, the answer before"),
        ("messages if m.role == 'user'", "loses the answer before"),
    ],
)
def test_chat_needs_all_turns(
    messages: str, needle: str, model: Any, cli: Any, fails: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    template = each(messages=messages)
    if "loop" in messages:
        template = each("{% if loop.index < 3 %}{{ m.content }}{% endif %}")
    folder = model(template)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert needle in fails("chat", folder, "--max-new-tokens", "2", code=4)
    assert cli("extract", folder, "-o", tmp_path / "run", *TRAIN).code == 0  # has one turn


def test_an_argument_that_the_template_never_reads_is_refused(
    model: Any, fails: Any, extracted: Any, tmp_path: Path
) -> None:
    reading = (
        "{% macro mood(m) %}{{ tone|default(m) }}{% endmacro %}{{ mood('calm') }}"
        "{% if enable_thinking is defined and enable_thinking is false %}<quick>{% endif %}"
        "{{ bos_token }}" + each()
    )
    folder, out = model(reading), ("-o", tmp_path / "out", *TRAIN)
    for option in (
        ("--template-arg", "enable_thinkng=false"),
        ("--chat-template-kwargs", '{"enable_thinkng": false}'),
        ("--template-arg", "tools=[]"),
        ("--template-arg", "m=1"),
    ):
        line = fails("extract", folder, *out, *option, code=2)
        assert "never reads it (it reads: enable_thinking, tone)" in line
    for value, quick in (("False", True), ("no", False)):
        record = extracted(folder, "--template-arg", f"enable_thinking={value}")
        assert ("<quick>" in record["rendering"]["prompt"]) == quick
    whole = ("--thinking", "whole")
    tone = extracted(folder, "--template-arg", "tone=a=b", "--template-arg", "bos_token=B", *whole)
    assert tone["rendering"]["prompt"].startswith("a=bB")
    for reserved in ("messages", "tokenize", "conversation"):
        line = fails("extract", folder, *out, "--template-arg", f"{reserved}=[]", code=2)
        assert f"--template-arg {reserved}: the prompts decide" in line
    for wrong in ("enable_thinking", "=1", "a b=1", ""):
        assert "NAME=VALUE" in fails("extract", folder, *out, "--template-arg", wrong, code=2)
    assert "it reads: none" in fails("extract", model(each(), "bare"), *out, "--template-arg",
                                     "x=1", code=2)  # fmt: skip


def test_of_several_templates_the_chosen_one_is_checked(
    model: Any, extracted: Any, fails: Any, tmp_path: Path
) -> None:
    folder = model(None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": each() + "{{ a }}", "tool_use": each() + "{{ tools }}",
                               "lossy": "{{ b }}"}  # fmt: skip
    tokenizer.save_pretrained(folder)
    assert extracted(folder, "--template-arg", "a=1")["rendering"]["prompt"].endswith("1")
    record = extracted(folder, "--template-arg", "tools=[]")
    assert record["rendering"]["prompt"].endswith("[]")
    out = ("-o", tmp_path / "out", *TRAIN)
    assert "it reads: a)" in fails("extract", folder, *out, "--template-arg", "b=1", code=2)
    lossy = ("--template-arg", "b=1", "--template-arg", "chat_template=lossy")
    assert "same for every prompt" in fails("extract", folder, *out, *lossy, code=4)
    assert extracted(model(HERMES, "hermes"), "--template-arg", "tools=[]", into="h")


def test_a_base_model_goes_through_every_stage_with_plain_prompts(
    model: Any, extracted: Any, cli: Any, fails: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    folder, run, plain = model(None), tmp_path / "run", ("--template", "plain")
    line = fails("extract", folder, "-o", run, *TRAIN, code=4)
    assert "no chat template" in line
    assert "--template plain" in line
    assert "--template FILE" in line
    record = extracted(folder, *plain)
    assert record["positions"] == [{"position": -1, "token": "(text)"}]
    assert record["rendering"]["prompt"] == "How do I bake bread?"
    assert extracted(folder, *plain, "--positions=-2,-1", into="two")["positions"][0] == {
        "position": -2, "token": "(text)",
    }  # fmt: skip
    # Later stages know it from the record, and take the option too.
    for command in (
        ("select", run, *OPEN),
        ("evaluate", folder, "--direction", run, *SHORT),
        ("inspect", run),
        ("trace", run, "--n-prompts", "2", *plain),
        ("fragility", run, "--steps", "2", "--n-test", "2", "--max-new-tokens", "2",
         "--no-picture", *plain),
    ):  # fmt: skip
        result = cli(*command, "--json")
        assert result.code == 0, result.err
    edited = tmp_path / "edited"
    assert cli("orthogonalize", folder, "--direction", run, "-o", edited).code == 0
    forward = ("--direction", run, "--forward", "--n-prompts", "2", "--json")
    verified = cli("verify", edited, *forward)
    assert verified.code == 0, verified.err
    assert verified.json["leak"] < 1e-4
    assert cli("verify", folder, *forward).code == 6
    assert cli("writers", folder).code == 0
    assert cli("plan", folder).code == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("One\nTwo\n"))
    said = cli("chat", folder, "--direction", run, "--max-new-tokens", "2", "--json")
    assert said.code == 0, said.err
    for options, needle in (
        (("--system", "x"), "writes no system message"),
        (("--template-arg", "x=1"), "reads no arguments"),
        (("--thinking", "skip"), "says nothing of thoughts"),
        (("--thinking", "answer"), "says nothing of thoughts"),
        (("--date", "2024-01-01"), "asks for no date"),
    ):
        line = fails("extract", folder, "-o", tmp_path / "x", *TRAIN, *plain, *options, code=2)
        assert needle in line


def test_verify_says_when_the_template_cannot_be_used(
    model: Any, extracted: Any, cli: Any, tmp_path: Path
) -> None:
    folder = model(each())
    extracted(folder)
    assert cli("select", tmp_path / "run", *OPEN).code == 0
    (folder / "chat_template.jinja").write_text(HERMES)
    found = cli("verify", folder, "--direction", tmp_path / "run", "--forward", "--n-prompts", "2")
    assert found.code == 6
    assert "the texts are taken as they are" in " ".join(found.err.split())


def test_plain_prompts_have_what_the_tokenizer_puts_before_a_text_and_not_after(
    tokenizer_dir: Path,
) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    plain = ChatFormat(template="plain")
    bare = tokenizer("Hello there")["input_ids"]
    assert encode(tokenizer, ["Hello there"], plain) == [bare]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A <|end|> <|end|>", special_tokens=[("<|start|>", 1), ("<|end|>", 2)]
    )
    assert encode(tokenizer, ["Hello there", "Hello there"], plain) == [[1, *bare]] * 2
    # Of a template nothing is added to.
    text = render(tokenizer, "Hello", ChatFormat())
    assert encode(tokenizer, ["Hello"], ChatFormat()) == [
        tokenizer(text, add_special_tokens=False)["input_ids"]
    ]


def test_a_template_file_serves_instead_of_the_checkpoints_and_is_kept(
    model: Any, extracted: Any, cli: Any, fails: Any, tmp_path: Path
) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(each("{{ m.content|trim }}"), encoding="utf-8-sig")  # as some editors do
    text, run = each("{{ m.content|trim }}"), tmp_path / "run"
    record = extracted(model(None), "--template", file)
    extracted(model(text, "own"), into="own run")
    mine, own = (tmp_path / name / "directions.safetensors" for name in ("run", "own run"))
    assert torch.equal(load_file(mine)["mean_harmful"], load_file(own)["mean_harmful"])
    assert record["settings"]["chat"]["template"] == text
    file.unlink()
    assert cli("select", run, *OPEN).code == 0
    trace = cli("trace", run, "--n-prompts", "2", "--json")
    assert trace.code == 0, trace.err
    held = tmp_path / "chat_template.json"
    held.write_text(json.dumps({"chat_template": each()}))
    for wrong, needle in (
        ("no-such-file", "plain or the file of a chat template (there is none of this name)"),
        (str(tmp_path), "plain or the file of a chat template (this is no file)"),
        (str(tmp_path / "model" / "config.json"), "must be a chat template, which writes"),
        (str(mine), "UTF-8"),
        (str(held), "no JSON"),
    ):
        line = fails("extract", tmp_path / "model", "-o", tmp_path / "x", "--template", wrong,
                     code=2)  # fmt: skip
        assert "--template" in line
        assert needle in line
    # A record names no file to read.
    changed = json.loads((run / "extract.json").read_text())
    changed["settings"]["chat"]["template"] = str(tmp_path / "secret.jinja")
    (tmp_path / "secret.jinja").write_text("{{ secret }}")
    (run / "extract.json").write_text(json.dumps(changed))
    assert "[chat] template" in fails("select", run, *OPEN, code=3)


def test_a_later_stage_that_would_render_otherwise_stops(
    model: Any, extracted: Any, cli: Any, fails: Any, tmp_path: Path
) -> None:
    folder, run = model(each() + "{{ mood }}"), tmp_path / "run"
    record = extracted(folder, "--template-arg", "mood=calm", "--system", "Be brief.")
    assert "Be brief." in record["rendering"]["prompt"]
    assert cli("select", run, *OPEN).code == 0
    evaluate = ("evaluate", folder, "--direction", run, *SHORT)
    assert cli(*evaluate, "--template-arg", "mood=calm").code == 0
    for options, needle in (
        (("--system", "Be kind."), "--system was 'Be brief.' and is 'Be kind.'"),
        (("--template-arg", "mood=wild"), "--template-arg mood was 'calm' and is 'wild'"),
        (("--response-prefix", "Well"), "--response-prefix was '' and is 'Well'"),
        (("--template", each("- {{ m.content }}") + "{{ mood }}"), "--template was not given and"),
    ):
        for command in (("select", run, *OPEN), evaluate):
            assert needle in fails(*command, *options, code=3)
    # A file of the direction alone is bound to nothing.
    alone = ("evaluate", folder, "--direction", run / "direction.safetensors", *SHORT)
    assert cli(*alone, "-o", tmp_path / "e", "--template-arg", "mood=wild",
               "--refusal-token", "I").code == 0  # fmt: skip
    (folder / "chat_template.jinja").write_text(each() + "{{ mood }}!")
    for command in (("select", run, *OPEN), evaluate, ("inspect", run), ("trace", run),
                    ("fragility", run, "--no-picture")):  # fmt: skip
        line = fails(*command, code=3)
        assert "another chat template now" in line
        assert "--template FILE" in line
    # With extract's own template given, all is as it was.
    (tmp_path / "before.jinja").write_text(each() + "{{ mood }}")
    again = cli(*evaluate, "--template", tmp_path / "before.jinja")
    assert again.code == 0, again.err
    # A record that holds another prompt than its own settings give is no base.
    (folder / "chat_template.jinja").write_text(each() + "{{ mood }}")
    held = json.loads((run / "extract.json").read_text())
    held["rendering"]["prompt"] += "!"
    (run / "extract.json").write_text(json.dumps(held))
    assert "another prompt than it holds" in fails("select", run, *OPEN, code=3)
    held["rendering"] = [1]
    (run / "extract.json").write_text(json.dumps(held))
    assert "rendering" in fails("select", run, *OPEN, code=3)


def test_the_runs_date_is_told_in_every_stage(
    model: Any, extracted: Any, cli: Any, fails: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    folder, run = model(DATED), tmp_path / "run"
    today = datetime.date.today()
    record = extracted(folder, into="today")
    assert record["settings"]["chat"]["date"] == record["rendering"]["date"] == today.isoformat()
    assert record["rendering"]["prompt"].startswith(f"Today: {today} {today:%d %b %Y}\n")
    record = extracted(folder, "--date", "2020-02-03")
    assert record["rendering"]["prompt"].startswith("Today: 2020-02-03 03 Feb 2020\n")
    # Each of these would stop, were it told another date than the record's.
    for command in (("select", run, *OPEN), ("evaluate", folder, "--direction", run, *SHORT),
                    ("trace", run, "--n-prompts", "2")):  # fmt: skip
        result = cli(*command, "--json")
        assert result.code == 0, result.err
        assert result.json["settings"]["chat"]["date"] == "2020-02-03"
    line = fails("select", run, *OPEN, "--date", "2021-01-01", code=3)
    assert "--date was '2020-02-03' and is '2021-01-01'" in line
    for asking in (
        "{{ strftime_now('%d.%m.%y') }}",
        "{% if date_string %}{{ date_string }}{% endif %}",
    ):
        record = extracted(
            model(asking + each(), str(len(asking))), "--date", "2020-02-03", into="one"
        )
        assert record["rendering"]["prompt"][:11] in ("03.02.20<|s", "03 Feb 2020")
    told = extracted(folder, "--template-arg", "date_string=May 1")["rendering"]["prompt"]
    assert told.startswith(f"Today: {today} May 1\n")
    for wrong in ("2020-2-3", "20200203", "today", "2020-13-01"):
        out = ("-o", tmp_path / "x", *TRAIN)
        assert "such as 2026-01-31" in fails("extract", folder, *out, "--date", wrong, code=2)
    # Without a date in the template none is kept, so that tomorrow's run is the same.
    timeless = extracted(model(each(), "timeless"), into="timeless run")
    assert timeless["settings"]["chat"]["date"] is timeless["rendering"]["date"] is None
    line = fails("extract", tmp_path / "timeless-x", "-o", tmp_path / "x", code=4)
    assert "timeless-x" in line


def test_a_configuration_may_write_days_and_ids_as_toml_does(
    model: Any, cli: Any, fails: Any, tmp_path: Path
) -> None:
    folder, config = model(DATED), tmp_path / "c.toml"
    given = ("-o", tmp_path / "run", "--n-train", "4", "--no-filter", "--config", config)
    config.write_text(
        "[chat]\ndate = 2024-07-26\ntemplate_kwargs = {date_string = 'x'}\n"
        "[extract]\nrefusal_tokens = [40, '41']\n"
    )
    result = cli("extract", folder, *given, "--json")
    assert result.code == 0, result.err
    assert result.json["rendering"]["date"] == "2024-07-26"
    assert "Today: 2024-07-26 x" in result.json["rendering"]["prompt"]
    assert [token["id"] for token in result.json["refusal_tokens"]] == [40, 41]
    config.write_text("[extract]\nrefusal_tokens = 'I'\n")
    line = fails("extract", folder, *given, code=2)
    assert "[extract] refusal_tokens: must be a list, such as [\"I\"], not 'I'" in line
    config.write_text("[chat]\ndate = 2024-07-26T10:00:00\n")
    assert "[chat] date: " in fails("extract", folder, *given, code=2)


def test_a_run_that_goes_on_tomorrow_keeps_its_date(
    model: Any, cli: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    import abliterate.run_rendering as run_rendering

    class Clock(datetime.date):
        day = 1

        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2030, 1, cls.day)

    monkeypatch.setattr(run_rendering.datetime, "date", Clock)
    command = ("run", model(DATED), "-o", tmp_path / "run", "--no-filter", "--n-train", "4",
               *OPEN[1:], *SHORT, "--json")  # fmt: skip
    config = tmp_path / "config.toml"
    config.write_text('[extract]\nrefusal_tokens = ["I"]\n')
    first = cli(*command, "--config", config)
    assert first.code == 0, first.err
    assert first.json["extract"]["rendering"]["date"] == "2030-01-01"
    Clock.day = 2
    second = cli(*command, "--config", config)
    assert second.code == 0, second.err
    assert second.json == first.json
