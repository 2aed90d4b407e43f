"""The commands that a report prints, read by the real command line: for runs of every option."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from abliterate.cli.app import app
from abliterate.cli.evaluate_commands import name_checkpoints
from abliterate.cli.options import spell_out
from abliterate.report.collect import Run
from abliterate.report.reproduce import commands, notes
from abliterate.settings import Settings, load_settings

# Every setting with a value that is not its default; a new setting must find its place here.
EVERY: dict[str, dict[str, Any]] = {
    "model": {
        "revision": "v2", "device": "cuda:1", "device_map": '{"": 0}', "tensor_parallel": True,
        "dtype": "bfloat16", "batch_size": "4", "trust_remote_code": True, "seed": 7,
        "offload": True, "activation_memory": "8GB", "load_in": "4bit",
        "attn_implementation": "eager",
    },
    "chat": {
        "system": "-- 'quoted' & $HOME", "template_kwargs": {"enable_thinking": False, "n": [1]},
        "response_prefix": "-sure,\nhere", "template_args": ("enable_thinking=false", "x=-1"),
        "template": "{{ messages[0]['content'] }}\n", "date": "2025-02-03",
        "thinking": "skip", "max_thinking_tokens": 77,
    },
    "extract": {
        "harmful": "a b.csv[text]", "harmless": "-mine.txt", "n_train": 64,
        "positions": "-5,-1", "filter": False, "refusal_tokens": ("I", "-1"),
        "save_activations": "3,5-7", "activation_positions": "all",
        "robust": "winsor", "winsor_quantile": 0.125,
    },
    "select": {
        "harmful": "harmbench", "harmless": "alpaca", "n_val": 8, "filter": False,
        "kl_threshold": 1e9, "induce_threshold": -1e9, "prune_layers": 0.0,
        "search": "exhaustive", "all_layers": True, "kl_on": "response:4",
        "project_harmless": True, "project_first_token": True, "per_layer": True, "position": -2,
        "interpolate": "spherical:4,10",
    },
    "orthogonalize": {
        "overwrite": True, "allow_leak": 0.25, "layers": "10-25", "components": "mlp,attention",
        "scale": -1.5, "layer_scale": "-weights.toml", "norm_preserve": "columns",
        "tied_embeddings": "share", "requantize": True,
        "dequantize": True, "add": -2.0, "as_lora": True, "device": "cuda:0", "jobs": 3,
        "low_disk": True, "leave_behind": ("mtp.safetensors", "-draft*"),
    },
    "evaluate": {
        "harmful": ("jailbreakbench", "-mine.txt"), "harmless": ("-other.txt",), "n_test": 10,
        "borderline": "xstest", "controls": 2,
        "server": ("http://me:pass@host:8/v1?key=secret", "-m=https://host/v1"),
        "served_model": ("org/m", "-m=e"), "concurrency": 3, "server_timeout": 9.5,
        "server_retries": 1, "server_api": "chat",
        "max_new_tokens": 64, "stop_at_verdict": True,
        "corpus": ("own", "pile=-x.txt"), "corpus_texts": 10,
        "corpus_tokens": 99, "tasks": "mmlu,gsm8k", "tasks_dir": "-my tasks", "task_limit": 5,
        "refusal_phrases": "en,zh", "refusal_phrase": ("-no way", "nope"),
        "classifier": "org/clf@v1:REJECTION", "classifier_input": "pair",
        "judge": "org/guard", "judge_url": "https://me:pass@host:8/v1?key=secret",
        "judge_model": "guard", "judge_template": "prompt", "judge_timeout": 2.5,
        "judge_retries": 0, "judge_concurrency": 2,
        "second_judge": "org/guard-2", "second_judge_url": "https://me:pass@host:9/v1?key=secret",
        "second_judge_model": "guard-2", "second_judge_template": "prompt",
    },
}  # fmt: skip
ALL = load_settings(options=EVERY)
# What no command line gives back: placeholders, and what does not shape the result.
GRANTS: dict[str, Any] = {
    "judge_url": "JUDGE_URL", "second_judge_url": "SECOND_JUDGE_URL",
    "tasks_dir": "TASKS_DIR", "server": ("SERVER", "-m=SERVER"),
}  # fmt: skip
NAMES = {
    "template_kwargs": "chat_template_kwargs", "refusal_tokens": "refusal_token",
    "template_args": "template_arg",
}  # fmt: skip
MODEL = {"id": "org/model", "revision": "abc123"}
DIRECTION = {"sha256": "sha256:12", "position": -1, "layer": 3, "norm": 1.0}


def test_every_setting_is_tried() -> None:
    for table, field in Settings.model_fields.items():
        assert set(EVERY[table]) == set(type(field.default).model_fields), table
        for name, value in EVERY[table].items():
            assert value != getattr(field.default, name), name


def _settings(*tables: str) -> dict[str, Any]:
    """What a stage records, as it comes back from its file."""
    return dict(json.loads(ALL.model_dump_json(include=set(tables))))


def _run(folder: Path | str = "runs/my run", **records: Any) -> Run:
    return Run(Path(folder), **records)


def _stages() -> dict[str, Any]:
    options = EVERY["orthogonalize"] | {"quantized": "requantize"}
    for name in ("overwrite", "allow_leak", "requantize", "dequantize", "jobs", "low_disk"):
        del options[name]
    trace = {"harmful": "-a.txt", "harmless": "b.txt", "n_prompts": 3, "suffix": "-x", "n_heads": 4}
    return {
        "extract": {"model": MODEL, "settings": _settings("model", "chat", "extract")},
        "selection": {
            "model": MODEL, "settings": _settings("model", "chat", "extract", "select"),
            "outputs": {"direction.safetensors": "sha256:12"},
        },
        "edit": {"source": MODEL, "options": options, "leak_of_plan": 0.0402},
        "edit_folder": Path("-out"),
        "evaluation": {
            "model": MODEL, "direction": DIRECTION,
            "interventions": dict.fromkeys(("add", "mine", "-m", "subtract")),
            "checkpoints": {"mine": {"id": "x/model"}, "-m": {"id": "some/-m"}},
            "settings": _settings("model", "chat", "extract", "evaluate"),
        },
        "inspect": {"model": MODEL, "position": -2, "settings": _settings("model", "chat")},
        "trace": {
            "model": MODEL, "request": trace, "suffix": {"text": "-x y"},
            "settings": _settings("model", "chat"),
        },
    }  # fmt: skip


def _parse(line: str) -> tuple[str, dict[str, Any]]:
    """The command and its parameters, as the command line reads them; nothing runs."""
    program, name, *args = shlex.split(line)
    assert program == "abliterate"
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    params = command.make_context(name, spell_out(args)).params
    # Earlier releases of typer read texts and tuples, and convert them when they call the function.
    find = getattr(typer.main, "get_params_convertors_ctx_param_name_from_function", None)
    convert = {} if find is None else find(command.callback.__wrapped__)[1]
    return name, {k: convert[k](value) if k in convert else value for k, value in params.items()}


def test_an_optional_value_may_stand_behind_a_space() -> None:
    words = ["extract", "m", "--save-activations", "all", "-o", "x"]
    assert spell_out(words) == ["extract", "m", "--save-activations=all", "-o", "x"]
    words = ["extract", "--save-activations", "all-of-it", "-o", "x"]
    assert spell_out(words)[1:3] == ["--save-activations=all", "all-of-it"]


def _given(parsed: dict[str, Any], table: str) -> dict[str, Any]:
    """The settings of a table that a command was given, as the settings would hold them."""
    found = {}
    for key in EVERY[table]:
        value = parsed.get(NAMES.get(key, key))
        if value not in (None, ()):  # of a repeatable option
            found[key] = json.loads(value) if key == "template_kwargs" else value
    return {key: tuple(v) if isinstance(v, list) else v for key, v in found.items()}


def _expected(table: str, *without: str) -> dict[str, Any]:
    held = {key: value for key, value in EVERY[table].items() if key not in without}
    return {key: GRANTS.get(key, value) for key, value in held.items()}


def test_commands_of_a_run_with_every_option_are_read_as_they_were_given() -> None:
    parsed = dict(map(_parse, commands(_run(**_stages()), Path("-out"))))
    assert list(parsed) == [
        "extract", "select", "orthogonalize", "evaluate", "inspect", "trace", "report",
    ]  # fmt: skip
    recorded = ("seed", "dtype", "load_in", "attn_implementation")
    machine = _expected("model", "trust_remote_code", "revision", *recorded)
    extract = parsed["extract"]
    model = _expected("model", "trust_remote_code") | {"revision": "abc123"}
    assert _given(extract, "model") == model
    assert _given(extract, "chat") == EVERY["chat"]
    assert _given(extract, "extract") == EVERY["extract"]
    assert (extract["model"], extract["output"]) == ("org/model", Path("runs/my run"))
    # Later stages take from the record what names the experiment, and are told the rest.
    select = parsed["select"]
    assert _given(select, "model") == machine
    assert _given(select, "chat") == {}
    used_later = ("position", "interpolate")  # of what the direction is used for
    assert _given(select, "select") == _expected("select", *used_later)
    edit = parsed["orthogonalize"]
    assert (edit["model"], edit["revision"], edit["output"]) == (
        "org/model", "abc123", Path("./-out"),
    )  # fmt: skip
    shaped = _expected("orthogonalize", "overwrite", "dequantize", "jobs", "low_disk")
    assert _given(edit, "orthogonalize") == shaped | {"allow_leak": 0.041}
    evaluate = parsed["evaluate"]
    assert _given(evaluate, "evaluate") == _expected("evaluate")
    assert _given(evaluate, "model") == machine | {"revision": "abc123"}
    assert evaluate["direction"] == "runs/my run"
    assert evaluate["intervention"] == ["add", "checkpoint", "subtract"]
    assert evaluate["checkpoint"] == ["mine=x/model", "some/-m"]
    assert parsed["inspect"]["position"] == -2
    assert {"device": "cuda:1"}.items() <= parsed["inspect"].items()
    trace = parsed["trace"]
    assert [trace[key] for key in ("prompts", "harmless", "n_prompts", "suffix", "heads")] == [
        "-a.txt", "b.txt", 3, "-x y", 4,
    ]  # fmt: skip
    assert parsed["report"]["edited"] == Path("./-out")


@pytest.mark.parametrize("stage", ["selection", "edit", "evaluation", "inspect", "trace"])
def test_commands_of_one_record_alone_are_read(stage: str) -> None:
    """Without extract's record nothing is known to come from there."""
    held = {key: value for key, value in _stages().items() if key in (stage, "edit_folder")}
    (name, parsed), _ = map(_parse, commands(_run("-run", **held)))
    if stage == "selection":
        assert _given(parsed, "chat") == EVERY["chat"]
        assert _given(parsed, "model") == _expected("model", "trust_remote_code", "revision")
        assert parsed["run"] == Path("./-run")
    if stage == "evaluation":
        assert (parsed["direction"], parsed["output"]) == ("DIRECTION", Path("./-run"))
        assert _given(parsed, "chat") == EVERY["chat"]
        assert parsed["refusal_token"] == ["I", "-1"]
        assert any("sha256:12" in note for note in notes(_run("-run", **held)))
    assert name


def test_prompts_of_a_stages_own_configuration_are_in_its_command() -> None:
    for stage, table in (("selection", "select"), ("evaluation", "evaluate")):
        stages = _stages()
        stages[stage]["settings"][table] |= {"harmful": None, "harmless": None}
        stages[stage]["settings"]["extract"]["harmful"] = "other.txt"
        held = {key: stages[key] for key in ("extract", "selection", stage)}
        parsed = dict(map(_parse, commands(_run(**held))))[table]
        found = parsed["harmful"]  # of evaluate a list: it takes several
        assert ([found] if isinstance(found, str) else found, parsed["harmless"] or None) == (
            ["other.txt"], None,
        )  # fmt: skip


def test_a_filter_that_was_not_extracts_is_in_the_command() -> None:
    """Without the option select would filter as extract did."""
    for extracts, selects in ((False, True), (True, False), (False, False), (True, True)):
        stages = _stages()
        settings = stages["selection"]["settings"]
        settings["extract"]["filter"], settings["select"]["filter"] = extracts, selects
        held = {key: stages[key] for key in ("extract", "selection")}
        given = dict(map(_parse, commands(_run(**held))))["select"]["filter"]
        assert given == (None if extracts and selects else selects)


def test_what_grants_is_a_placeholder_and_a_note_and_secrets_are_nowhere() -> None:
    run = _run(**_stages())
    lines, said = commands(run), " ".join(notes(run))
    text = "\n".join([*lines, said])
    assert "--trust-remote-code" not in "\n".join(lines)
    for secret in ("pass", "secret", "me:"):
        assert secret not in text
    assert "JUDGE_URL: https://host:8/v1, by the record." in said
    assert "TASKS_DIR: -my tasks, by the record." in said
    assert "Add --trust-remote-code yourself" in said
    plain = _stages()["extract"] | {"settings": Settings().model_dump()}
    assert notes(_run(extract=plain)) == []
    assert commands(_run(extract=plain))[0].endswith("--revision abc123 -o 'runs/my run'")


def test_a_record_with_settings_of_another_version_prints_no_unknown_option() -> None:
    record = _stages()["extract"]
    record["settings"]["model"]["of_tomorrow"] = "x"
    record["settings"]["tomorrow"] = {"x": 1}
    assert "tomorrow" not in commands(_run(extract=record))[0]


def test_the_rows_of_an_evaluation_keep_their_names() -> None:
    """What the report prints names the same rows when evaluate reads it."""
    places = {
        "orthogonalized": "runs/x/model", "model": "runs/x/model", "a=b": "c/a=b", "plain": "plain",
        "org-name": "org/name",
    }  # fmt: skip
    record = _stages()["evaluation"] | {
        "interventions": dict.fromkeys(("baseline", "ablate", "add", *places)),
        "checkpoints": {name: {"id": place} for name, place in places.items()},
    }
    line = next(line for line in commands(_run(evaluation=record)) if " evaluate " in line)
    _, parsed = _parse(line)
    assert not parsed["intervention"]
    assert name_checkpoints(parsed["checkpoint"]) == places
