"""``run`` end to end on a random model: stages, configuration, output streams, exit codes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from commands import Commands
from huggingface_hub import constants

from abliterate.errors import UsageError
from abliterate.resources import config_dir
from abliterate.settings import load_settings

SMALL = (
    "--no-filter", "--refusal-token", "I", "--n-train", "8", "--n-val", "8", "--n-test", "8",
    "--positions", "last", "--max-new-tokens", "3", "--kl-threshold", "1e9",
    "--induce-threshold=-1e9", "--controls", "1",
)  # fmt: skip


def _times(run: Path) -> dict[str, int]:
    names = ("extract.json", "selection.json", "model/abliterate.json", "evaluation.json")
    return {name: (run / name).stat().st_mtime_ns for name in names}


def test_finished_stages_are_skipped_and_stale_ones_redone(tiny, cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = cli("run", tiny("llama"), "-o", run, *SMALL, "--json")
    assert first.code == 0, first.err
    assert set(first.json) == {"extract", "select", "orthogonalize", "evaluate", "hash"}
    made = _times(run)

    again = cli("run", tiny("llama"), "-o", run, *SMALL, "--json")
    assert again.code == 0
    assert again.json == first.json
    assert again.err.count("is up to date") == 4
    assert "loaded" not in again.err  # not even the model
    assert _times(run) == made

    # Another test setting redoes the evaluation alone.
    more = cli(
        "run", tiny("llama"), "-o", run, *SMALL, "--max-new-tokens", "4",
        "--borderline", "borderline", "--json",
    )  # fmt: skip
    assert more.code == 0, more.err
    evaluation = more.json["evaluate"]
    assert list(evaluation["n_prompts"].items())[-1] == ("borderline", 8)
    assert all(r["borderline"]["n"] == 8 for r in evaluation["interventions"].values())
    now = _times(run)
    assert {name for name in now if now[name] != made[name]} == {"evaluation.json"}

    # A damaged direction is noticed by its hash, and selected again to the same bytes.
    good = (run / "direction.safetensors").read_bytes()
    (run / "direction.safetensors").write_bytes(good[:-1] + b"\x00")
    assert cli("run", tiny("llama"), "-o", run, *SMALL, "--max-new-tokens", "4").code == 0
    assert (run / "direction.safetensors").read_bytes() == good

    # Another seed draws other prompts: everything is redone.
    before = _times(run)
    assert cli("run", tiny("llama"), "-o", run, *SMALL, "--seed", "5").code == 0
    assert all(before[name] != value for name, value in _times(run).items())


def test_run_records_one_hash_of_all_that_decides_the_result(tiny, cli, tmp_path: Path) -> None:
    def hash_of(name: str, *options: str) -> str:
        result = cli("run", tiny("llama"), "-o", tmp_path / name, *SMALL, *options, "--json")
        assert result.code == 0, result.err
        record = json.loads((tmp_path / name / "run.json").read_text())
        assert record["hash"] == result.json["hash"]
        return str(record["hash"])

    first = hash_of("one")
    again = hash_of("two")
    directions = [(tmp_path / name / "directions.safetensors") for name in ("one", "two")]
    assert directions[0].read_bytes() == directions[1].read_bytes()
    assert again == first
    assert hash_of("one") == first  # of stages that were skipped
    # What decides the answers, or the last bits alone, changes it.
    others = {
        hash_of("one", "--max-new-tokens", "4"),
        hash_of("three", "--batch-size", "3"),
    }
    assert len(others | {first}) == 3


def test_run_equals_its_four_commands(tiny, cli, tmp_path: Path) -> None:
    model, one, four = tiny("qwen2"), tmp_path / "one", tmp_path / "four"
    result = cli("run", model, "-o", one, *SMALL)
    assert result.code == 0, result.err
    train = ("--no-filter", "--refusal-token", "I", "--n-train", "8", "--positions", "last")
    assert cli("extract", model, "-o", four, *train).code == 0
    opened = ("--kl-threshold", "1e9", "--induce-threshold=-1e9")
    assert cli("select", four, "--no-filter", "--n-val", "8", *opened).code == 0
    edited = tmp_path / "orthogonalized"
    assert cli("orthogonalize", model, "--direction", four, "-o", edited).code == 0
    result = cli(
        "evaluate", model, "--direction", four, "--checkpoint", edited, "--n-test", "8",
        "--max-new-tokens", "3", "--controls", "1", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    for name in ("directions.safetensors", "direction.safetensors"):
        assert (one / name).read_bytes() == (four / name).read_bytes()
    for path in sorted((one / "model").glob("*.safetensors")):
        assert path.read_bytes() == (edited / path.name).read_bytes()
    expected = json.loads((one / "evaluation.json").read_text())["interventions"]
    assert result.json["interventions"] == expected
    assert set(expected) == {"baseline", "ablate", "add", "orthogonalized"}
    assert expected["baseline"]["kl_divergence"] == 0.0
    hooked, baked = expected["ablate"], expected["orthogonalized"]
    assert hooked["kl_divergence"] == pytest.approx(baked["kl_divergence"], abs=1e-4)
    assert (one / "completions" / "baseline-harmful.jsonl").read_text().count("\n") == 8


def test_completions_do_not_depend_on_padding(tiny, cli, tmp_path: Path) -> None:
    texts = {}
    for size in ("1", "8"):
        out = tmp_path / size
        assert cli("evaluate", tiny("llama"), "-o", out, "--refusal-token", "I", "--n-test", "8",
                   "--max-new-tokens", "12", "--batch-size", size).code == 0  # fmt: skip
        lines = (out / "completions" / "baseline-harmless.jsonl").read_text().splitlines()
        texts[size] = [json.loads(line)["response"] for line in lines]
    assert texts["1"] == texts["8"]
    assert len(set(texts["1"])) > 1


def test_evaluate_refuses_what_it_cannot_do(tiny, fails, tmp_path: Path) -> None:
    base = ("evaluate", tiny("llama"), "--refusal-token", "I", "--n-test", "4")
    assert "needs --direction" in fails(*base, "--intervention", "ablate", code=2)
    assert "'erase'" in fails(*base, "--intervention", "erase", code=2)
    assert "nothing-here" in fails(*base, "--checkpoint", "./nothing-here", code=4)
    assert "lower --n-test" in fails(*base[:-1], "5000", code=3)


def test_outputs_that_cannot_be_made_are_refused_before_the_work(
    tiny, fails, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    for out, reason in ((taken, "is a file"), (taken / "run", f"{taken} is no folder")):
        assert reason in fails("extract", tiny("llama"), "-o", out, code=2)
        assert reason in fails("run", tiny("llama"), "-o", out, *SMALL, code=2)
        base = ("evaluate", tiny("llama"), "--refusal-token", "I", "--n-test", "4")
        assert reason in fails(*base, "-o", out, code=2)


def test_an_output_that_is_read_only_is_told_from_one_that_cannot_be_made(
    tiny, fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = tmp_path / "held"
    held.mkdir()
    held.chmod(0o555)
    real = os.access

    def by_mode(path: Any, mode: int) -> bool:
        """As for a user whom permissions stop, which root is not."""
        return real(path, mode) and (Path(path) != held or not mode & os.W_OK)

    monkeypatch.setattr(os, "access", by_mode)
    scored = tmp_path / "answers.json"
    scored.write_text('[{"prompt": "a", "response": "b"}]')
    mend = "change its permissions, or choose another folder"
    for words in (
        ("extract", tiny("llama"), "-o", held),
        ("run", tiny("llama"), "-o", held),
        ("score", scored, "-o", held / "scored.jsonl"),
    ):
        line = fails(*words, code=2)
        assert f"output {held} exists and cannot be written to: {mend}" in line
        assert "cannot be made" not in line
    line = fails("extract", tiny("llama"), "-o", held / "run", code=2)
    assert f"output {held / 'run'} cannot be made: {held} cannot be written to" in line
    assert list(held.iterdir()) == []
    held.chmod(0o755)


def test_configuration_file_with_options_on_top(tiny, cli, fails, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        '[extract]\nn_train = 9\npositions = [-3, "-1"]\nfilter = false\nrefusal_tokens = ["I"]\n'
    )
    run = tmp_path / "run"
    result = cli("extract", tiny("llama"), "-o", run, "--config", config, "--json")
    assert result.json["counts"]["harmful"]["given"] == 9
    assert [p["position"] for p in result.json["positions"]] == [-3, -1]
    result = cli(
        "extract", tiny("llama"), "-o", run, "--config", config, "--n-train", "10", "--json"
    )
    assert result.json["counts"]["harmful"]["given"] == 10

    def bad(text: str) -> str:
        config.write_text(text)
        return fails("extract", tiny("llama"), "-o", tmp_path / "x", "--config", config, code=2)

    assert "unknown key 'n_trian' in [extract], did you mean 'n_train'?" in bad(
        "[extract]\nn_trian = 3"
    )
    assert "unknown table [extrakt], did you mean 'extract'?" in bad("[extrakt]\n")
    assert "[extract] n_train" in bad('[extract]\nn_train = "many"')
    assert "[select] kl_threshold" in bad("[select]\nkl_threshold = -1.0")
    assert "must be a table" in bad("extract = 3")
    # What is no switch is no number either, and a key says where it belongs.
    assert "[select] kl_threshold: must be a number, not true" in bad(
        "[select]\nkl_threshold = true"
    )
    assert "[select] prune_layers: must be a number" in bad("[select]\nprune_layers = false")
    assert "[extract] filter: must be true or false, not 'no'" in bad('[extract]\nfilter = "no"')
    assert "[chat] template: must be text, not true" in bad("[chat]\ntemplate = true")
    assert "'n_train' must stand under [extract]" in bad("n_train = 16")
    assert "'batch_size' in [evaluate]: it belongs under [model]" in bad(
        "[evaluate]\nbatch_size = 3"
    )
    assert "did you mean" not in bad("[evaluate]\nintervention = 3")
    assert "not readable TOML" in bad("[extract")
    assert "does not exist" in fails(
        "extract", tiny("llama"), "-o", tmp_path / "x", "--config", tmp_path / "no.toml", code=2
    )
    assert not (tmp_path / "x").exists()


def test_shipped_configurations_are_valid_and_the_papers_is_the_default() -> None:
    for name in ("paper", "quick", "demo"):
        load_settings(config_dir() / f"{name}.toml")
    paper, default = load_settings(config_dir() / "paper.toml"), load_settings()
    assert paper.select.model_copy(update={"harmful": None}) == default.select
    changed = {"harmful": "harmful", "harmless": "harmless"}
    assert paper.extract.model_copy(update=changed) == default.extract
    with pytest.raises(UsageError, match="n_train"):
        load_settings(options={"extract": {"n_train": -4}})


def test_a_bundled_configuration_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = load_settings(config_dir() / "quick.toml")
    assert load_settings(Path("quick")) == quick != load_settings()
    # A file that the user has there wins.
    (tmp_path / "quick").write_text("[extract]\nn_train = 3\n")
    assert load_settings(Path("quick")).extract.n_train == 3
    line = fails("extract", "model", "-o", tmp_path / "x", "--config", "papr", code=2)
    assert "papr does not exist, and is none of the bundled demo, paper, quick" in line


def test_streams_of_the_installed_command(tiny, commands: Commands, tmp_path: Path) -> None:
    """As a pipeline sees it: one document on stdout, no colour or bars, logs on stderr."""
    train = ("--no-filter", "--refusal-token", "I", "--n-train", "8", "--config", "quick")
    out = tmp_path / "run"
    done = commands("extract", tiny("llama"), "-o", out, *train, "--json")
    assert done.code == 0, done.err
    # The bundled configuration says which positions, the option how many prompts.
    assert [row["position"] for row in done.json["positions"]] == [-1]
    assert done.json["counts"]["harmful"]["given"] == 8
    assert "loaded" in done.err
    assert "\x1b" not in done.out + done.err
    assert "\r" not in done.err
    quiet = commands("extract", tiny("llama"), "-o", out, *train, "--quiet")
    assert quiet.err == ""
    assert "Candidate directions" in quiet.out
    assert "\x1b" not in quiet.out
    broken = commands("extract", "./nowhere", "-o", out)
    assert broken.code == 4
    assert broken.err == "error: model './nowhere' is neither an existing folder nor a hub id\n"
    assert "Traceback" in commands("extract", "./nowhere", "-o", out, "--debug").err


def test_help_version_and_unknown_commands(cli, fails) -> None:
    assert cli("--version").out.startswith("abliterate ")
    assert cli("--help").out == cli("-h").out
    for command in ("prompts", "extract", "select", "orthogonalize", "evaluate", "run", "demo"):
        assert command in cli("-h").out
        result = cli(command, "-h")
        assert result.code == 0
        assert "--json" in result.out
    assert "'n-vala'" not in cli("select", "-h").out
    assert "No such command 'abliterat'" in fails("abliterat", code=2)
    assert cli().code == 2


def test_hub_ids_are_resolved_through_the_local_cache(
    tiny, cli, monkeypatch, tmp_path: Path
) -> None:
    """A hub id needs no network once its snapshot is in the cache; the commit is recorded."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub = tmp_path / "hub" / "models--org--tiny"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text(commit)
    snapshot = hub / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in tiny("llama").iterdir():
        os.link(file, snapshot / file.name)
    # What the library makes of HF_HUB_CACHE when it is imported; the tests are offline anyway.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    train = ("--no-filter", "--refusal-token", "I", "--n-train", "8")
    done = cli("extract", "org/tiny", "-o", tmp_path / "run", *train, "--json")
    assert done.code == 0, done.err
    assert done.json["model"] == {"id": "org/tiny", "revision": commit}
