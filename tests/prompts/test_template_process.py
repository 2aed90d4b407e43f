"""Chat templates run elsewhere: as the library renders them, and never beyond their bounds."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from abliterate.errors import CheckpointError
from abliterate.prompts import template_process
from abliterate.prompts.chat_template import ChatFormat, encode, end_of_turn_ids, render_turns
from abliterate.prompts.template_process import TemplateError, render_conversations
from abliterate.resources import demo_model_dir


@pytest.fixture
def tokenizer(tokenizer_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_dir)


_LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
_TURNS = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": " zwölf 'quotes' <b>&amp;</b> 😀\n", "name": None},
    {"role": "assistant", "content": "yes", "reasoning": "because", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"x": [1, 2.5, None]}}}]},
    {"role": "user", "content": [{"type": "text", "text": "parts"}, {"type": "image"}]},
]  # fmt: skip
_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
_EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "special tokens": ("{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}", {}),
    "own variables": ("{{ a }}{{ b.c[0] }}{{ d is defined }}", {"a": 1.5, "b": {"c": [True]}}),
    "overridden token": ("{{ eos_token }}", {"eos_token": "<other>"}),
    "tools": ("{{ tools|tojson }}{{ tools|tojson(indent=2) }}", {"tools": _TOOLS}),
    "documents": ("{{ documents[0].title }}", {"documents": [{"title": "T", "text": "t"}]}),
    "none": ("{{ tools is none }}{{ documents is none }}{{ messages[1].name is defined }}", {}),
    "tojson": ("{{ messages|tojson }}", {}),
    "reasoning": ("{{ messages[2].reasoning_content }}{{ messages[2].thinking }}", {}),
    "whitespace": ("  {% if true %}\n  x\n  {%- endif %}\n\n{{ 1 }}\n", {}),
    "generation": ("{% generation %}{{ messages[0].content }}{% endgeneration %}", {}),
    "loop controls": ("{% for i in range(9) %}{% if i > 3 %}{% break %}{% endif %}{{ i }}"
                      "{% endfor %}", {}),
    "namespace": ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
                  "{% endfor %}{{ ns.n }}", {}),
    "dict": ("{{ dict(a=1)|tojson }}", {}),
    "strftime": ("{{ strftime_now('%Y') }}", {}),
    "macros and filters": ("{% macro m(x) %}[{{ x|trim|upper }}]{% endmacro %}"
                           "{{ m(messages[1].content) }}{{ messages|map(attribute='role')|join }}",
                           {}),
    "named template": ("{{ 'kept' }}", {"chat_template": "{{ 'given' }}{{ messages|length }}"}),
    "continued": ("{% for m in messages %}{{ m.content }}<end>{% endfor %}",
                  {"continue_final_message": True, "add_generation_prompt": False}),
    "prompt": ("{{ add_generation_prompt }}", {}),
    "surrogate": ("{{ messages[0].content }}{{ x }}", {"x": "\ud800"}),
    "raises": ("{{ raise_exception('only user and assistant') }}", {}),
    "undefined": ("{{ nothing.at.all }}", {}),
    "syntax": ("{% if %}", {}),
    "sandbox": ("{{ ''.__class__.__mro__ }}", {}),
    "twice": ("x", {"tokenize": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", _EXACT)
def test_rendering_is_what_the_library_gives(name: str, tokenizer: Any) -> None:
    template, options = _EXACT[name]
    tokenizer.chat_template = template
    turns = _TURNS[:3] if name == "continued" else _TURNS
    # A key without a value is no key: so says the library itself, but for its older releases.
    told = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
    expected = failure = None
    try:
        named = {"add_generation_prompt": True} | options
        expected = tokenizer.apply_chat_template(told, tokenize=False, **named)
    except Exception as error:
        failure = error
    if failure is None:
        assert render_conversations(tokenizer, [turns, turns], True, options) == [expected] * 2
        return
    with pytest.raises(TemplateError) as caught:
        render_conversations(tokenizer, [turns], True, options)
    if not isinstance(failure, TypeError):  # which names the function that was called
        place = f" in line {failure.lineno}" if hasattr(failure, "lineno") else ""
        assert str(caught.value) == (" ".join(str(failure).split()) + place)[:300]


def test_the_bundled_model_renders_as_the_library_does() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir())
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    for chat in (turns[:1], turns):
        for prompt in (True, False):
            expected = tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=prompt
            )
            assert render_conversations(tokenizer, [chat], prompt, {}) == [expected]


def test_a_tokenizer_with_code_of_its_own_keeps_it(tokenizer: Any) -> None:
    class Own(type(tokenizer)):
        def apply_chat_template(self, conversation: Any, **options: Any) -> str:
            return f"own {conversation[0]['content']} {options['add_generation_prompt']}"

    tokenizer.__class__ = Own
    turns = [{"role": "user", "content": "hi"}]
    assert render_conversations(tokenizer, [turns], True, {}) == ["own hi True"]


_ENDLESS = {
    "nested loops": _LOOP,
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "one call": "{{ '%1999999999d' % 1 }}",
    "power": "{{ (10 ** (9 ** 9)) % 7 }}",
}  # fmt: skip
_HUGE = {
    "repeated": "{{ messages[0].content * 10**10 }}",
    "centred": "{{ messages[0].content|center(10**10) }}",
    "doubled": "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "a constant": "{{ 'a' * 10**10 }}",
    "long": "{{ messages[0].content * 1000000 }}",
}


@pytest.mark.parametrize("name", _ENDLESS)
def test_a_template_that_does_not_end_is_refused(name: str, tokenizer: Any, monkeypatch) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 1.0)
    tokenizer.chat_template = _ENDLESS[name]
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=r"the chat template of .* (end|take)"):
        encode(tokenizer, ["hello"] * 4, ChatFormat())
    assert time.monotonic() - begun < 30
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert encode(tokenizer, ["hello"], ChatFormat()) == [tokenizer.encode("hello")]


@pytest.mark.parametrize("name", _HUGE)
def test_a_template_that_writes_without_end_is_refused(name: str, tokenizer: Any) -> None:
    tokenizer.chat_template = _HUGE[name]
    with pytest.raises(CheckpointError, match=r"memory|characters"):
        encode(tokenizer, ["hello"], ChatFormat())


def test_a_template_may_only_loop_for_some_texts(tokenizer: Any, monkeypatch) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 1.0)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if 'é' in m.content or m.role == 'assistant' %}"
        + _LOOP
        + "{% endif %}{% endfor %}"
    )
    assert len(encode(tokenizer, ["a", "b"], ChatFormat())) == 2
    with pytest.raises(CheckpointError, match="does not end"):
        encode(tokenizer, ["a", "bé"], ChatFormat())
    with pytest.raises(CheckpointError, match="does not end"):
        end_of_turn_ids(tokenizer, ChatFormat())


def test_all_conversations_together_are_bounded(tokenizer: Any, monkeypatch) -> None:
    """Each just within its time, a hundred would still take minutes."""
    monkeypatch.setattr(template_process, "SECONDS", 1.0)
    monkeypatch.setattr(template_process, "MORE_SECONDS", 0.001)
    monkeypatch.setattr(template_process, "_GRACE", 0.5)
    template_process._rendering.close()
    tokenizer.chat_template = (
        "{% for i in range(300) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
        "{{ messages[0].content }}"
    )
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match="does not end"):
        encode(tokenizer, ["a"] * 100, ChatFormat())
    assert time.monotonic() - begun < 30
    template_process._rendering.close()


def test_long_conversations_are_rendered_whole(tokenizer: Any) -> None:
    text = "word " * 500_000
    turns = [{"role": "user", "content": text}]
    assert text in render_turns(tokenizer, turns, ChatFormat())


def test_threads_take_turns(tokenizer: Any) -> None:
    found: dict[int, list[str]] = {}

    def run(number: int) -> None:
        turns = [[{"role": "user", "content": f"{number} {i}"}] for i in range(20)]
        found[number] = render_conversations(tokenizer, turns, True, {})

    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(f"{n} {i}<|end|>" in found[n][i] for n in range(4) for i in range(20))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_renders_on_its_own(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "before"}]
    before = render_conversations(tokenizer, [turns], True, {})
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = int(render_conversations(tokenizer, [turns], True, {}) != before)
            template_process._rendering.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert render_conversations(tokenizer, [turns], True, {}) == before


@pytest.mark.parametrize("template", [_LOOP, _HUGE["repeated"]], ids=["loop", "memory"])
def test_extract_refuses_a_template_that_never_ends(
    template: str, tiny: Callable[..., Path], fails, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 1.0)
    model = tmp_path / "model"
    shutil.copytree(tiny("llama"), model)
    (model / "chat_template.jinja").write_text(template)
    line = fails("extract", model, "-o", tmp_path / "run", "--n-train", 4, code=4)
    assert f"the chat template of {model}" in line
    assert "chat_template.jinja" in line
    assert not list((tmp_path / "run").glob("*.safetensors"))
