"""A run folder is data: what its records may decide for a later command, and what they may not."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from judge_server import endpoint

from abliterate.cli.app import main
from abliterate.errors import InputError, UsageError
from abliterate.settings import ModelSettings, Recorded, Settings, is_recorded, take_recorded

OPEN = ("--no-filter", "--n-val", "8", "--kl-threshold", "1e9", "--induce-threshold=-1e9")
SHORT = ("--n-test", "2", "--max-new-tokens", "2")
# What names an experiment. A change of this list is a decision: see abliterate.settings.
RECORDED = {
    "model": {"revision", "attn_implementation", "dtype", "load_in", "seed"},
    "chat": {
        "system",
        "template_kwargs",
        "template_args",
        "template",
        "date",
        "response_prefix",
        "thinking",
        "max_thinking_tokens",
    },
    "extract": {"harmful", "harmless", "n_train", "positions", "filter", "refusal_tokens"},
}


@pytest.fixture(scope="module")
def finished_run(tiny, tmp_path_factory) -> Path:
    """A run folder after extract and select."""
    run = tmp_path_factory.mktemp("records") / "run"
    train = ("--no-filter", "--refusal-token", "I", "--n-train", "8", "--positions", "last")
    assert main(["extract", str(tiny("llama")), "-o", str(run), *train, "-q"]) == 0
    assert main(["select", str(run), *OPEN, "-q"]) == 0
    return run


@pytest.fixture
def tampered(finished_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the run folder with a record changed by a function, or replaced by a text."""

    def change(how: Callable[[dict[str, Any]], object] | str, name: str = "extract.json") -> Path:
        run = tmp_path / "tampered"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished_run, run)
        if isinstance(how, str):
            (run / name).write_text(how)
        else:
            record = json.loads((run / name).read_text())
            how(record)
            (run / name).write_text(json.dumps(record))
        return run

    return change


def test_a_new_setting_is_not_taken_from_a_record_until_it_is_marked() -> None:
    class FurtherModel(ModelSettings):
        plain: str = ""
        bounded: int = 0
        marked: Annotated[str, Recorded()] = ""

    class Further(Settings):
        model: FurtherModel = FurtherModel()

    held = {"model": {"plain": "x", "bounded": 3, "marked": "y", "seed": 4}}
    assert take_recorded(held, "a record", Further)["model"] == {"marked": "y", "seed": 4}
    with pytest.raises(InputError, match=r"a record: \[model\] plain"):
        take_recorded({"model": {"plain": 3}}, "a record", Further)


def test_the_settings_that_a_record_may_decide_are_these() -> None:
    found = {
        table: {name for name in type(field.default).model_fields
                if is_recorded(type(field.default), name)}
        for table, field in Settings.model_fields.items()
    }  # fmt: skip
    assert {table: names for table, names in found.items() if names} == RECORDED


def test_what_names_the_experiment_is_taken_and_what_grants_is_not(tampered, cli, tmp_path) -> None:
    def change(record: dict[str, Any]) -> None:
        settings = record["settings"]
        del record["rendering"]  # which is of the settings as they were
        settings["chat"] |= {"system": "Be brief.", "response_prefix": "Well, "}
        settings["model"] |= {"seed": 5, "dtype": "float64", "batch_size": 2, "device": "meta"}
        settings["model"] |= {"offload": True, "activation_memory": "1MB", "device_map": "auto"}
        settings["select"] = {"n_val": 9, "filter": False}
        settings["orthogonalize"] = {"overwrite": True}

    run = tampered(change)
    result = cli("select", run, *OPEN, "--json")
    assert result.code == 0, result.err
    held = result.json["settings"]
    assert held["chat"]["system"] == "Be brief."
    assert held["chat"]["response_prefix"] == "Well, "
    assert (held["model"]["seed"], held["model"]["dtype"]) == (5, "float64")
    defaults = Settings().model.model_dump()
    for name in ("batch_size", "device", "offload", "activation_memory", "device_map"):
        assert held["model"][name] == defaults[name]
    assert held["select"]["n_val"] == 8


def test_a_record_sends_no_answer_and_no_key_anywhere(
    tampered, tiny, cli, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tasks / "evil.yaml").write_text("task: evil\ndataset_path: json\nclass: !function evil.f\n")
    with endpoint(lambda body: "safe") as judge:

        def change(record: dict[str, Any]) -> None:
            record["settings"]["evaluate"] = {
                "judge_url": judge.url, "judge_model": "m", "tasks": "evil",
                "second_judge_url": judge.url, "second_judge_model": "n",
                "tasks_dir": str(tasks), "judge": None, "corpus": ["own"],
            }  # fmt: skip

        run = tampered(change)
        result = cli("evaluate", tiny("llama"), "--direction", run, *SHORT, "--json")
        assert result.code == 0, result.err
        assert judge.requests == []
        assert result.json["judge"] is None
        assert result.json["task_settings"] is None
        assert result.json["corpora"] == {}
        assert result.json["settings"]["evaluate"]["judge_url"] is None
        assert result.json["settings"]["evaluate"]["second_judge_url"] is None
        assert not (tmp_path / "ran").exists()
        # The command line's own judge is asked, and no other.
        own = ("--judge-url", judge.url, "--judge-model", "mine")
        assert cli("evaluate", tiny("llama"), "--direction", run, *SHORT, *own).code == 0
        assert {body["model"] for body in judge.requests} == {"mine"}


@pytest.fixture
def remote_model(tiny, tmp_path: Path, monkeypatch) -> Path:
    """A checkpoint with Python code of its own, which leaves a file ``ran`` beside it."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "remote"
    shutil.copytree(tiny("llama"), folder)
    (folder / "modeling_own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own-llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own-llama", "architectures": ["OwnModel"]}
    config["auto_map"] = {
        "AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    yield folder
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def test_remote_code_runs_on_the_command_lines_word_alone(
    remote_model: Path, tampered, cli, fails, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"

    def change(record: dict[str, Any]) -> None:
        record["model"]["id"] = str(remote_model)
        record["settings"]["model"]["trust_remote_code"] = True

    run = tampered(change)
    for command in (
        ("select", run), ("evaluate", remote_model, "--direction", run), ("inspect", run),
        ("trace", run), ("fragility", run, "--no-picture"),
    ):  # fmt: skip
        line = fails(*command, code=4)
        assert f"made with the code of {remote_model}" in line
        assert "give --trust-remote-code yourself" in line
    assert cli("report", run).code == 0
    assert not ran.exists()
    # A record that hides it changes nothing: the loader asks for the flag.
    hidden = tampered(lambda record: record["model"].update(id=str(remote_model)))
    assert "--trust-remote-code" in fails("select", hidden, code=4)
    assert not ran.exists()
    result = cli("select", tampered(change), *OPEN, "--trust-remote-code", "--json")
    assert result.code == 0, result.err
    assert ran.exists()


def test_a_configuration_file_may_answer_about_remote_code(
    tampered, cli, fails, tmp_path: Path
) -> None:
    run = tampered(lambda record: record["settings"]["model"].update(trust_remote_code=True))
    config = tmp_path / "no.toml"
    config.write_text("[model]\ntrust_remote_code = false\n")
    assert "--trust-remote-code" in fails("select", run, *OPEN, code=4)
    assert cli("select", run, *OPEN, "--config", config).code == 0


def test_a_records_revision_is_no_code_of_a_model_that_the_user_trusts(
    tampered, fails, tmp_path: Path
) -> None:
    """Anybody can open a pull request, whose files the hub gives under a revision."""

    def change(record: dict[str, Any]) -> None:
        record["model"] = {"id": "org/model", "revision": "0" * 40}
        record["settings"]["model"]["revision"] = "refs/pr/7"

    run = tampered(change)
    asked = ("evaluate", "org/model", "--direction", run, "--trust-remote-code")
    assert "give --revision yourself" in fails(*asked, code=2)
    # Named, or of another repository, it is no more than a model that is not here.
    assert "org/model" in fails(*asked, "--revision", "main", code=4)
    other = ("evaluate", "org/other", "--direction", run, "--trust-remote-code")
    assert "org/other" in fails(*other, code=4)


def _set(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        held: Any = record
        for key in path[:-1]:
            held = held[key]
        held[path[-1]] = value

    return change


def _without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda record: record.pop(name)


MALFORMED: dict[str, Any] = {
    "list": "[]",
    "torn": '{"model": ',
    "deep": "[" * 100_000,
    "digits": '{"n_layers": ' + "9" * 5000 + "}",
    "no settings": _without("settings"),
    "no model": _without("model"),
    "no prompts": _without("prompts"),
    "model no object": _set("model", value="x"),
    "model id a list": _set("model", "id", value=["x"]),
    "model id with NUL": _set("model", "id", value="a\0b"),
    "model id half a character": _set("model", "id", value="\ud800"),
    "model id empty": _set("model", "id", value=" "),
    "model id huge": _set("model", "id", value="x" * 100_000),
    "settings a list": _set("settings", value=[]),
    "table a list": _set("settings", "model", value=[1]),
    "unknown table": _set("settings", "modle", value={}),
    "unknown setting": _set("settings", "model", "run_this", value="x"),
    "seed a text": _set("settings", "model", "seed", value="1"),
    "seed negative": _set("settings", "model", "seed", value=-1),
    "seed huge": _set("settings", "model", "seed", value=10**30),
    "seed true": _set("settings", "model", "seed", value=True),
    "dtype unknown": _set("settings", "model", "dtype", value="float7"),
    "revision a path": _set("settings", "model", "revision", value="../../x"),
    "revision an option": _set("settings", "model", "revision", value="--x"),
    "kwargs a list": _set("settings", "chat", "template_kwargs", value=[1]),
    "system a number": _set("settings", "chat", "system", value=3),
    "harmful null": _set("settings", "extract", "harmful", value=None),
    "surrogate": _set("settings", "chat", "system", value="\ud800"),
    "ignored, wrong type": _set("settings", "model", "device", value=3),
    "refusal tokens none": _set("refusal_tokens", value=[]),
    "refusal token a text": _set("refusal_tokens", 0, "id", value="I"),
    "refusal token huge": _set("refusal_tokens", 0, "id", value=10**12),
    "refusal token beyond": _set("refusal_tokens", 0, "id", value=10**6),
    "position first": _set("positions", 0, "position", value=0),
    "positions more": lambda record: record["positions"].append(record["positions"][0]),
    "layers more": _set("n_layers", value=9),
    "prompts numbers": _set("prompts", "harmful", value=[1]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_record_is_one_line(name: str, tampered, fails) -> None:
    run = tampered(MALFORMED[name])
    assert "extract.json" in fails("select", run, *OPEN, code=3)


def test_other_records_that_are_malformed_are_one_line(tampered, tiny, fails) -> None:
    run = tampered(_set("prompts", value=[]), "selection.json")
    for command in (("trace", run), ("fragility", run, "--no-picture"),
                    ("evaluate", tiny("llama"), "--direction", run, *SHORT)):  # fmt: skip
        assert "selection.json" in fails(*command, code=3)
    run = tampered(lambda record: record["outputs"].update(x=3))
    assert "outputs.x" in fails("inspect", run, code=3)
    (run / "extract.json").unlink()
    (run / "extract.json").mkdir()
    assert "no regular file" in fails("inspect", run, code=3)

    def far(record: dict[str, Any]) -> None:
        record["settings"]["extract"]["refusal_tokens"] = []
        record["refusal_tokens"][0]["id"] = 10**6

    command = ("evaluate", tiny("llama"), "--direction", tampered(far), *SHORT)
    assert "1000000" in fails(*command, code=2)


def test_a_local_model_of_a_record_is_used_and_its_prompts_are_read(
    tampered, tiny, cli, tmp_path: Path
) -> None:
    prompts = tmp_path / "mine.txt"
    prompts.write_text("".join(f"word {number}\n" for number in range(40)))

    def change(record: dict[str, Any]) -> None:
        record["settings"]["extract"] |= {"harmful": str(prompts), "harmless": str(prompts)}

    result = cli("select", tampered(change), *OPEN, "--json")
    assert result.code == 0, result.err
    assert result.json["model"]["id"] == str(tiny("llama"))


def test_prompts_of_a_record_that_never_end_are_not_read(tampered, fails, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for place in ("/dev/zero", str(tmp_path / "pipe.txt")):
        run = tampered(_set("settings", "extract", "harmful", value=place))
        assert place in fails("select", run, *OPEN, code=3)


def test_a_record_of_an_edit_that_is_malformed_is_one_line(
    finished_run: Path, tiny, cli, fails, tmp_path: Path
) -> None:
    out = tmp_path / "edited"
    command = ("orthogonalize", tiny("llama"), "--direction", finished_run, "-o", out)
    assert cli(*command).code == 0
    file = out / "abliterate.json"
    record = json.loads(file.read_text())
    file.write_text("[]")
    assert "abliterate.json is no record" in fails("audit", out, code=3)
    assert "abliterate.json is no record" in fails(
        "verify", out, "--direction", finished_run, code=3
    )
    for change in (
        {"source": []}, {"source": {"files": 3}}, {"tensors": [3]},
        {"tensors": [record["tensors"][0] | {"before": 1e200}]},
        {"tensors": [record["tensors"][0] | {"region": [[1]]}]},
    ):  # fmt: skip
        file.write_text(json.dumps(record | change))
        assert "is no record of an edit" in fails("audit", out, code=3)
    # What verify shows of a record is a note: no form of it changes the verdict.
    for promise in ({}, {"limits": 3}, [1]):
        file.write_text(json.dumps(record | {"promise": promise}))
        assert cli("verify", out, "--direction", finished_run).code == 0


def test_refusal_tokens_of_the_command_line_win_over_the_records(
    finished_run: Path, tiny, cli, tmp_path: Path
) -> None:
    command = ("evaluate", tiny("llama"), "--direction", finished_run, "-o", tmp_path, *SHORT)
    assert [t["token"] for t in cli(*command, "--json").json["refusal_tokens"]] == ["I"]
    named = cli(*command, "--refusal-token", "77", "--json").json
    assert [t["id"] for t in named["refusal_tokens"]] == [77]


def test_the_revision_of_a_model_is_a_name() -> None:
    from abliterate.settings import load_settings

    for good in ("main", "refs/pr/3", "v1.0", "0" * 40, "größer"):
        assert load_settings(options={"model": {"revision": good}}).model.revision == good
    for bad in ("", "a b", "../x", "a..b", "/x", "-x", "a\nb", "x" * 300):
        with pytest.raises(UsageError, match="revision"):
            load_settings(options={"model": {"revision": bad}})
