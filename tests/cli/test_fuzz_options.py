"""Option values at their bounds, for every command: a clear line or a result, never exit code 1.

The options are read from the command line itself, so that one that is added is covered. Each
example is a command that works on a tiny checkpoint, with one to three of its options given other
values. ``ABLITERATE_FUZZ=N`` runs N examples per command, drawn anew each time.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tempfile
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.models import OptionInfo

from abliterate.cli.app import app, main

_EXAMPLES = int(os.environ.get("ABLITERATE_FUZZ", "0"))

# What each command line starts from; names in braces are files and folders of the world below.
_QUIET = ("-q",)
_EXTRACT = ("--refusal-token", "I", "--no-filter", "--n-train", "4")
_PROMPTS = ("--harmful", "{harmful}", "--harmless", "{harmless}")
_LOOSE = ("--kl-threshold", "1e9", "--induce-threshold=-1e9", "--n-val", "4", "--no-filter")
_BASES: dict[str, tuple[str, ...]] = {
    "prompts": ("{harmful}",),
    "extract": ("{model}", "-o", "{new}", *_PROMPTS, *_EXTRACT),
    "select": ("{run}", *_LOOSE),
    "orthogonalize": ("{model}", "-o", "{new}", "--direction", "{run}"),
    "verify": ("{edited}", "--direction", "{run}"),
    "evaluate": (
        "{model}", "--direction", "{run}", "-o", "{new}", *_PROMPTS, "--n-test", "2",
        "--max-new-tokens", "2", "--refusal-token", "I", "--intervention", "ablate",
    ),
    "score": ("{answers}",),
    "run": (
        "{model}", "-o", "{new}", *_PROMPTS, *_EXTRACT, *_LOOSE[:-1], "--n-test", "2",
        "--max-new-tokens", "2",
    ),
    "writers": ("{model}",),
    "inspect": ("{run}",),
    "trace": ("{run}", "--prompts", "{harmful}", "--harmless", "{harmless}", "--n-prompts", "2"),
    "report": ("{run}",),
    "audit": ("{edited}",),
    "diff": ("{model}", "{edited}"),
    "fragility": (
        "{run}", *_PROMPTS, "--steps", "2", "--n-test", "2", "--max-new-tokens", "2",
        "--no-picture",
    ),
    "chat": ("{model}", "--direction", "{run}", "--max-new-tokens", "2"),
    "plan": ("{model}",),
    "export": ("{run}", "--to", "npz", "-o", "{new}.npz"),
    "methods": ("{run}",),
    "demo": ("-o", "{file}"),  # what would take half a minute is stopped by its output
}  # fmt: skip
# Commands that write into the folder they are given, so that it is a copy.
_OWN_RUN = {"select", "inspect", "trace", "report", "fragility", "export"}
# Few examples where one takes seconds.
_COUNTS = {"run": 4, "fragility": 6, "select": 8, "evaluate": 8, "audit": 5, "demo": 4}
_USUAL = 8

# Options that are not given other values: what they start is long, or not this test's.
_LEFT_ALONE = {"--debug", "--help"}
# The largest work that a value may ask for.
_AT_MOST = {
    "max_new_tokens": 3, "max_thinking_tokens": 3, "steps": 3, "controls": 1, "judge_retries": 1,
    "judge_timeout": 1, "judge_concurrency": 4,
    "corpus_texts": 4, "examples": 10**9, "jobs": 4, "batch_size": 10**9,
}  # fmt: skip
_INTS = ("0", "1", "2", "-1", "3", str(2**31), str(2**63), str(-(2**63) - 1), str(10**40))
_FLOATS = (
    "0", "-0.0", "1", "0.5", "0.999", "-1", "5e-324", "1e-30", "1e30", "1e308", "inf", "-inf",
    "nan",
)  # fmt: skip
_NO_NUMBERS = ("", " ", "x", "1e", "0x1", "1.5", "\u0661", "None", "1_0")
_TEXTS = (
    "", " ", "x", "0", "-1", "é", "\udcff", "a" * 300, "a/b", "..", "{}", "[]", "null", "'\"",
    "%s{}", "a,b", ",", "[bold]", "\n", "\x1b[31m", "-", "=", "auto", "all", "none",
)  # fmt: skip
_PATHS = (
    "", ".", "{file}", "{missing}", "{missing}/deep", "{file}/below", "{empty}", "{model}", "{run}",
    "{edited}", "{harmful}", "{answers}", "{config}", "{vector}", "a" * 300, "\udcff", "x.json",
)  # fmt: skip
# Where results go: never into the world that all examples share.
_OUTPUTS = (
    "", ".", "{file}", "{new}", "{new}/deep", "{file}/below", "{mine}", "a" * 300, "\udcff",
    "x.html",
)  # fmt: skip
# Values that a name promises to understand, beside those that its type gives.
_KNOWN: dict[str, tuple[str, ...]] = {
    "activation_memory": ("0", "1", "1KB", "1GB", "-1GB", "1e400GB", "nanGB", "0.0001MB", "infGB"),
    "add": ("0", "1", "-1", "nan", "inf", "1e39", "1e308", "5e-324"),
    "batch_size": ("auto", "0", "1", "-1", "1.5", str(10**40)),
    "chat_template_kwargs": ("{}", "[]", "1", '{"a": NaN}', '{"messages": 1}', '{"tokenize": 1}',
                             '{"add_generation_prompt": 1}', '{"": {}}', '{"chat_template": "x"}'),
    "checkpoint": ("{edited}", "x={edited}", "={edited}", "x=", "{model}", "a/b={edited}"),
    "components": ("attention", "mlp", "embedding", "all", "attention,mlp"),
    "corpus": ("own", "own=", "pile={answers}", "alpaca={answers}", "pile=", "x=y", "own,own"),
    "date": ("2026-01-31", "0001-01-01", "9999-12-31", "2026-02-30", "today"),
    "device": ("cpu", "auto", "cuda", "cuda:9", "cpu:0", "cpu:7", "meta", "mps", "cuda:-1", "xla"),
    "device_map": ("auto", '{"": "cpu"}', "{}", "[]", "1", '{"x": "cpu"}', '{"": "cuda:9"}',
                   '{"": "disk"}', '{"": null}', "balanced", "sequential"),
    "direction": ("{run}", "{vector}", "{zero}", "{nan}", "{short}", "{matrix}",
                  "{set}", "{edited}/abliterate.json", "{edited}/config.json"),
    "dtype": ("auto", "float32", "bfloat16", "float16", "float64", "int8", "float8_e4m3fn"),
    "form": ("md", "latex", "pdf", "MD"),
    "gpu_memory": ("0", "1", "80GB", "-1", "nan", "1e400GB"),
    "interpolate": ("linear", "spherical", "linear:0,2", "spherical:9", "linear:", "linear:3-1"),
    "image": ("gif", "PNG"),
    "intervention": ("baseline", "ablate", "add", "subtract", "checkpoint"),
    "judge": ("{model}", "{missing}", "{empty}"),
    "judge_model": ("guard", ""),
    "second_judge": ("{model}", "{missing}", "{empty}"),
    "second_judge_model": ("guard", ""),
    "second_judge_url": ("http://127.0.0.1:9", "ftp://127.0.0.1", "http://", "127.0.0.1:9"),
    "judge_url": ("http://127.0.0.1:9", "http://127.0.0.1:9/v1?key=1", "ftp://127.0.0.1", "http://",
                  "127.0.0.1:9", "http://[::1", "http://127.0.0.1:99999"),
    "kl_on": ("last", "response:0", "response:1", "response:3", f"response:{10**30}", "response:"),
    "layer_scale": ("{file}", "{config}", "{missing}", "{empty}", "{run}/extract.json", "{vector}"),
    "layers": ("0", "0-3", "3-0", "9", "0-999999", "1,1", ",", "0-"),
    "memory": ("0", "1", "80GB", "-1", "nan", "1e400GB"),
    "norm_preserve": ("rows", "columns", "True", "cells"),
    "to": ("gguf", "npz", "steering-vectors", "onnx"),
    "position": ("-1", "-5", "-999"),
    "push_to_hub": ("org/name", "name", "org/name@v1", "", "../x/y"),
    "positions": ("last", "post-instruction", "-1", "-1,-1", "-999", "0", "-1,-2", "1", "-9" * 20),
    "png": ("{mine}", "{file}"),
    "response_prefix": ("I", " ", "\n"),
    "refusal_token": ("I", "0", "511", "512", "505", str(10**20), "no such token", "llama-2"),
    "robust": ("winsor", "median", "none", "mode"),
    "winsor_quantile": ("0.1", "0.49", "0.001", "0", "0.5", "nan"),
    "save_activations": ("all", "0", "0-3", "9", "none"),
    "scores": ("{run}/selection.json", "{answers}", "{run}/extract.json"),
    "source": ("{model}", "{edited}", "{harmful}", "harmful", "advbench", "{harmful}[x]"),
    "served_model": ("m", "x=m", "", "="),
    "server": ("http://127.0.0.1:9", "http://127.0.0.1:9/v1?key=1", "x=http://127.0.0.1:9", "=",
               "ftp://127.0.0.1", "127.0.0.1:9", "http://[::1", "ablate=http://127.0.0.1:9"),
    "server_retries": ("0",),
    "suffix": ("x", "{file}", "{model}", "a b c"),
    "system": ("", "be kind", "{{ x }}"),
    "task_limit": ("1",),
    "tasks": ("", ","),
    "tasks_dir": ("{missing}", "{empty}"),
    "template": ("plain", "{{ messages[0].content }}", "{{", "{% x %}", "{file}", "{config}", "."),
    "template_arg": ("a=1", "tools=[]", "=", "messages=1", "tokenize=1", "a", "chat_template=x"),
    "thinking": ("answer", "skip", "whole", "off"),
    "tied_embeddings": ("untie", "share", "skip"),
    "harmful": ("harmful", "{harmful}[category]", "{harmful}[x]", "{empty}", "{answers}", "x/y:z"),
    "harmless": ("harmless", "{harmless}[prompt]", "{file}"),
    "prompts": ("harmful", "{harmful}[x]", "{empty}"),
}  # fmt: skip
# Only in long runs: what takes long to import, or seconds each.
_LONG: dict[str, tuple[str, ...]] = {
    "tasks": ("no_such_task", "x,,y"),
    "image": ("png", "svg"),
}


@dataclass(frozen=True)
class Parameter:
    """One option or argument of a command.

    Attributes:
        name: of the function's parameter.
        flags: the spellings that take a value, or the switch itself; none of an argument.
        kind: the type of its values.
        place: of an argument, its index among them.
    """

    name: str
    flags: tuple[str, ...]
    kind: type
    place: int | None = None


def _parameters() -> dict[str, list[Parameter]]:
    """Every command's parameters, as the application declares them."""
    commands: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found: dict[str, list[Parameter]] = {}
    for name, command in commands.items():
        registered = next(c for c in app.registered_commands if _named(c) == name)
        hints = typing.get_type_hints(registered.callback)
        arguments = 0
        found[name] = []
        for param in command.params:
            if param.name not in hints:
                continue
            kind = _plain(hints[param.name])
            if param.param_type_name == "argument":
                found[name].append(Parameter(param.name, (), kind, arguments))
                arguments += 1
            elif not _LEFT_ALONE & {*param.opts}:
                flags = (*param.opts, *param.secondary_opts) if kind is bool else param.opts[:1]
                found[name].append(Parameter(param.name, tuple(flags), kind))
    return found


def _named(command: Any) -> str:
    return command.name or command.callback.__name__.replace("_", "-")


def _plain(hint: Any) -> type:
    """``int`` of ``int | None``, ``str`` of ``list[str] | None``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is list:
        hint = typing.get_args(hint)[0]
    return hint if isinstance(hint, type) else str


def _values(command: str, parameter: Parameter) -> tuple[str, ...]:
    """What is tried for a parameter."""
    name, kind = parameter.name, parameter.kind
    known = _KNOWN.get(name, ()) + (_LONG.get(name, ()) if _EXAMPLES else ())
    if name in ("output", "png"):
        return _OUTPUTS if command != "demo" else ("{file}", "{file}/below", "a" * 300)
    if kind in (int, float):
        numbers = _INTS if kind is int else _FLOATS
        if name in _AT_MOST:
            numbers = tuple(n for n in numbers if not float(n) > _AT_MOST[name])
        return known + numbers + _NO_NUMBERS
    if kind is Path or parameter.place is not None:
        return known + _PATHS + (_TEXTS if kind is str else ())
    return known + _TEXTS


_PARAMETERS = _parameters()


def test_every_command_is_fuzzed() -> None:
    assert set(_PARAMETERS) == set(_BASES)
    flags = {flag for found in _PARAMETERS.values() for p in found for flag in p.flags}
    assert {"--kl-threshold", "--no-filter", "--judge-url", "--temperature"} <= flags
    assert OptionInfo  # the declarations these come from


@dataclass(frozen=True)
class World:
    """Files and folders that command lines name."""

    places: dict[str, Path]

    def fill(self, text: str, here: Path) -> str:
        for name, place in self.places.items():
            text = text.replace("{" + name + "}", str(place))
        for name in ("new", "missing"):
            text = text.replace("{" + name + "}", str(here / name))
        return text.replace("{mine}", str(here / "mine.txt"))


@pytest.fixture(scope="module")
def world(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("world")
    places = {name: folder / name for name in ("run", "edited", "empty", "file")}
    places["model"] = tiny("llama")
    places["empty"].mkdir()
    places["file"].write_text("some text\n")
    for kind in ("harmful", "harmless"):
        rows = [{"prompt": f"{kind} number {i} of it", "category": "ab"[i % 2]} for i in range(14)]
        places[kind] = folder / f"{kind}.json"
        places[kind].write_text(json.dumps(rows))
    places["answers"] = folder / "answers.jsonl"
    rows = [{"prompt": f"p {i}", "response": "I cannot", "text": f"t {i} u v"} for i in range(4)]
    places["answers"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    places["config"] = folder / "config.toml"
    places["config"].write_text("[evaluate]\nn_test = 2\n")
    vectors = {"vector": torch.randn(48), "zero": torch.zeros(48), "short": torch.ones(7),
               "nan": torch.full((48,), float("nan")), "matrix": torch.ones(2, 48)}  # fmt: skip
    places["set"] = folder / "set.safetensors"
    save_file({"directions": torch.randn(4, 48)}, places["set"])
    for name, vector in vectors.items():
        places[name] = folder / f"{name}.safetensors"
        save_file({"direction": vector}, places[name], {"layer": "99"})
    made = World(places)
    for command in ("extract", "select", "orthogonalize"):
        base = [made.fill(part, folder) for part in _BASES[command]]
        swapped = {"extract": "run", "orthogonalize": "edited"}.get(command, "")
        base = [str(places[swapped]) if part == str(folder / "new") else part for part in base]
        assert main([command, *base, "-q"]) == 0
    return made


@st.composite
def _command_lines(draw: st.DrawFn, command: str) -> list[str]:
    """A command line that works, with one to three values changed."""
    parts = list(_BASES[command])
    chosen = draw(
        st.lists(
            st.sampled_from(_PARAMETERS[command]),
            min_size=1,
            max_size=3,
            unique_by=lambda p: p.name,
        )
    )
    for parameter in chosen:
        flag = draw(st.sampled_from(parameter.flags)) if parameter.flags else ""
        if parameter.kind is bool:
            parts.append(flag)
            continue
        value = draw(st.sampled_from(_values(command, parameter)))
        if parameter.place is not None:
            parts[parameter.place] = value
        elif flag.startswith("--"):
            parts.append(f"{flag}={value}")  # the later one counts, and a leading minus is a value
        else:
            parts += [flag, value]
    return [command, *parts]


@pytest.mark.parametrize("command", [*_BASES])
def test_no_value_of_an_option_ends_in_an_unexpected_error(
    command: str, world: World, capfd, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    before, failures = _listing(world), dict[str, str]()

    @settings(
        max_examples=_EXAMPLES or _COUNTS.get(command, _USUAL),
        derandomize=not _EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=[*HealthCheck],
        print_blob=bool(_EXAMPLES),
    )
    @given(line=_command_lines(command))
    def check(line: list[str]) -> None:
        here = Path(tempfile.mkdtemp(dir=tmp_path))
        monkeypatch.chdir(here)
        (here / "mine.txt").write_text("mine\n")
        places = dict(world.places)
        if command in _OWN_RUN:
            places["run"] = here / "run"
            shutil.copytree(world.places["run"], places["run"])
        argv = [World(places).fill(part, here) for part in line]
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/add 2\nagain\n"))
        capfd.readouterr()
        code = main([*argv, "-q"])
        said = capfd.readouterr().err
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(here)
        errors = [row for row in said.splitlines() if row.startswith("error: ")]
        as_it_should = (
            code in (0, 2, 3, 4, 5, 6, 7, 8)
            and "Traceback" not in said
            and len(errors) == (0 if code in (0, 6, 7, 8) else 1)
        )
        if not as_it_should and _EXAMPLES:  # a long run goes on, and tells of all
            failures.setdefault(said[-200:], f"exit {code}: {argv}\n{said[-2000:]}")
        else:
            assert as_it_should, (code, argv, said)

    check()
    assert not failures, "\n\n".join(failures.values())
    assert _listing(world) == before, "something was written into files that no one named"


def _listing(world: World) -> dict[str, tuple[int, int]]:
    files = [p for place in world.places.values() for p in [place, *place.rglob("*")]]
    return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()}
