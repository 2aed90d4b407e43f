"""What a run folder holds, whoever made it, never makes a command write outside it or over what is
not the tool's own; and one process at a time writes to it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from abliterate import run_stage
from abliterate.cli.app import main

SMALL = (
    "--no-filter", "--refusal-token", "I", "--n-train", "4", "--n-val", "4", "--positions", "last",
    "--kl-threshold", "1e9", "--induce-threshold=-1e9",
)  # fmt: skip
ANSWERS = ("--n-test", "2", "--max-new-tokens", "2", "--controls", "1")
Made = tuple[Path, Path]


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> Made:
    """The model, and a run folder of it with everything but the edited checkpoint."""
    model, run = tiny("llama"), tmp_path_factory.mktemp("made") / "run"
    assert main(["run", str(model), "-o", str(run), *SMALL, *ANSWERS, "-q"]) == 0
    assert main(["report", str(run), "-q"]) == 0
    return model, run


@pytest.fixture
def run(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "run"))


def command(name: str, model: Path, run: Path) -> tuple[str | Path, ...]:
    """A command as a user types it, that writes to the run folder."""
    return {
        "extract": ("extract", model, "-o", run, *SMALL[:5]),
        "select": ("select", run, "--no-filter", *SMALL[5:7], *SMALL[9:]),
        "evaluate": ("evaluate", model, "--direction", run, *ANSWERS),
        "inspect": ("inspect", run),
        "trace": ("trace", run, "--n-prompts", "2"),
        "fragility": ("fragility", run, "--steps", "2", "--n-test", "2", "--max-new-tokens", "2"),
        "report": ("report", run),
        "run": ("run", model, "-o", run, *SMALL, *ANSWERS, "--seed", "3"),
    }[name]


WRITTEN = {
    "extract": ("extract.json", "directions.safetensors", "activations.safetensors"),
    "select": ("selection.json", "direction.safetensors", "scores.safetensors"),
    "evaluate": (
        "evaluation.json", "completions", "completions/baseline-harmful.jsonl",
        "completions/add-harmless.jsonl", "completions/manifest.json", "completions/measured.json",
    ),
    "inspect": ("inspect.json",),
    "trace": ("trace.json",),
    "fragility": ("fragility.json", "fragility.html"),
    "report": ("report.html",),
    "run": ("extract.json", "selection.json", "evaluation.json"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["link", "fifo"])
@pytest.mark.parametrize("name", WRITTEN)
def test_no_command_writes_through_a_link(
    name: str, kind: str, made: Made, run: Path, fails, tmp_path: Path
) -> None:
    victims = tmp_path / "victims"
    for target in WRITTEN[name]:
        if kind == "fifo" and target in ("extract.json", "completions") and name != "run":
            continue  # read before it is written
        path, saved = run / target, tmp_path / "saved"
        shutil.rmtree(victims, ignore_errors=True)
        victims.mkdir()
        if there := os.path.lexists(path):
            path.rename(saved)
        if kind == "fifo":
            os.mkfifo(path)
        elif there:
            shutil.copytree(saved, victims / "v") if saved.is_dir() else shutil.copy(
                saved, victims / "v"
            )
            path.symlink_to(victims / "v")
        else:
            (victims / "v").write_text("precious")
            path.symlink_to(victims / "v")
        before = {p: p.read_bytes() for p in victims.rglob("*") if p.is_file()}
        line = fails(*command(name, made[0], run), code=3)
        assert str(path) in line
        assert {p: p.read_bytes() for p in victims.rglob("*") if p.is_file()} == before
        path.unlink()
        if there:
            saved.rename(path)
        assert not list(run.rglob(".*"))  # neither locks nor temporaries


def test_a_completions_file_with_a_second_name_is_not_added_to(
    made: Made, run: Path, fails, tmp_path: Path
) -> None:
    path = run / "completions" / "baseline-harmful.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    os.link(path, tmp_path / "victim")
    before = (tmp_path / "victim").read_bytes()
    line = fails(*command("evaluate", made[0], run), code=3)
    assert "hard link" in line
    assert str(path) in line
    assert (tmp_path / "victim").read_bytes() == before


def test_the_run_folder_itself_may_be_a_link(made: Made, run: Path, cli, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    assert cli("report", tmp_path / "link").code == 0
    assert cli(*command("select", made[0], tmp_path / "link")).code == 0
    assert (tmp_path / "link").is_symlink()


def test_foreign_files_of_our_names_are_refused_and_others_stay(
    made: Made, run: Path, fails, cli, tmp_path: Path
) -> None:
    model, fresh = made[0], tmp_path / "fresh"
    for name, text in (("extract.json", '{"mine": 1}'), ("directions.safetensors", "mine"),
                       ("activations.safetensors", "mine")):  # fmt: skip
        fresh.mkdir()
        (fresh / name).write_text(text)
        assert name in fails(*command("extract", model, fresh), code=3)
        assert (fresh / name).read_text() == text
        assert os.listdir(fresh) == [name]
        shutil.rmtree(fresh)
    for name, text, stage in (
        ("selection.json", "[]", "select"),
        ("evaluation.json", '{"rouge": 1}', "evaluate"),
        ("completions/manifest.json", '{"files": []}', "evaluate"),
        ("completions/baseline-harmful.jsonl", '{"text": "mine"}\n', "evaluate"),
        ("fragility.html", "<html>", "fragility"),
    ):
        other = Path(shutil.copytree(run, tmp_path / "other"))
        (other / name).write_text(text)
        assert name in fails(*command(stage, model, other), code=3)
        assert (other / name).read_text() == text
        shutil.rmtree(other)
    (run / "notes.txt").write_text("mine")
    (run / "selection.json").write_text("{torn")
    assert cli(*command("select", model, run)).code == 0
    assert json.loads((run / "selection.json").read_text())["winner"]
    assert (run / "notes.txt").read_text() == "mine"


def test_output_files_replace_their_own_kind_alone(
    run: Path, made: Made, fails, cli, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    assert cli("report", run, "-o", page).code == 0
    assert cli("report", run, "-o", page, "--no-completions").code == 0
    for name, text in (("prompts.txt", "mine"), ("thesis.html", "<html><head></head></html>")):
        (tmp_path / name).write_text(text)
        assert name in fails("report", run, "-o", tmp_path / name, code=2)
        assert (tmp_path / name).read_text() == text
    record = (run / "extract.json").read_bytes()
    fails("report", run, "-o", run / "extract.json", code=2)
    assert (run / "extract.json").read_bytes() == record
    chosen = (run / "direction.safetensors").read_bytes()
    line = fails("audit", made[0], "-o", run / "direction.safetensors", code=2)
    assert "audit -o" in line
    assert (run / "direction.safetensors").read_bytes() == chosen
    (tmp_path / "link").symlink_to(page)
    assert "symbolic link" in fails("report", run, "-o", tmp_path / "link", code=3)


@pytest.mark.parametrize("kind", ["foreign", "fake", "notes", "link", "file"])
def test_run_replaces_no_foreign_model(
    kind: str, made: Made, run: Path, fails, tmp_path: Path
) -> None:
    model = run / "model"
    kept = model / "thesis.txt"
    if kind != "notes":
        record = json.loads((model / "abliterate.json").read_text())
        shutil.rmtree(model)
    if kind == "file":
        kept = model
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        model.symlink_to(tmp_path / "elsewhere")
    elif kind != "notes":
        model.mkdir()
        text = "{}" if kind == "foreign" else json.dumps(record)
        (model / "abliterate.json").write_text(text)
    kept.write_text("mine")
    before = (run / "extract.json").read_bytes()
    line = fails(*command("run", made[0], run), code=2)
    assert str(model) in line
    if kind in ("fake", "notes"):
        assert str(kept) in line
    assert kept.read_text() == "mine"
    assert (run / "extract.json").read_bytes() == before  # seen before any work


def hold(run: Path) -> FileLock:
    """The lock as another process holds it."""
    lock = FileLock(run / ".abliterate.lock")
    lock.acquire()
    who = {"pid": 77, "host": "there", "command": "evaluate", "started": "2024-01-02T03:04:05Z"}
    (run / ".abliterate.holder.json").write_text(json.dumps(who))
    return lock


def test_a_second_writer_is_refused_and_readers_go_on(
    made: Made, run: Path, fails: Callable[..., str], cli
) -> None:
    lock = hold(run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for name in ("extract", "select", "evaluate", "run"):
        line = fails(*command(name, made[0], run), code=3)
        assert f"{run} is in use by another process: `abliterate evaluate`, pid 77 on there" in line
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    for beside in (
        command("report", made[0], run),
        command("inspect", made[0], run),
        command("trace", made[0], run),
        ("verify", run / "model", "--direction", run),
        ("orthogonalize", made[0], "--direction", run, "-o", run.parent / "out"),
    ):
        result = cli(*beside)
        assert result.code == 0, result.err
    lock.release()
    assert cli(*command("select", made[0], run)).code == 0


@pytest.mark.parametrize("name", ["inspect", "trace", "fragility"])
def test_two_of_one_analysis_are_one_too_many(name: str, made: Made, run: Path, fails) -> None:
    with FileLock(run / f".abliterate-{name}.lock"):
        line = fails(*command(name, made[0], run), code=3)
    assert f"{run / name} is in use by another process" in line


def test_demo_holds_its_folder_and_spares_a_foreign_model(fails, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("mine")
    assert "not made by" in fails("demo", "-o", tmp_path, code=2)
    assert (tmp_path / "model" / "thesis.txt").read_text() == "mine"
    shutil.rmtree(tmp_path / "model")
    lock = hold(tmp_path)
    assert "in use" in fails("demo", "-o", tmp_path, code=3)
    lock.release()


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_full_disk_behind_the_output_is_named(more: tuple[str, ...], monkeypatch, capfd) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115 (closing it fails, too)
    monkeypatch.setattr(sys, "stdout", full)
    assert main(["prompts", "harmful", *more]) == 3
    assert capfd.readouterr().err == "error: standard output: No space left on device\n"
    with contextlib.suppress(OSError):
        full.close()


def test_a_disk_that_is_full_at_the_record_leaves_nothing_without_one(
    tiny, cli, tmp_path: Path, monkeypatch
) -> None:
    command = ("extract", tiny("llama"), "-o", tmp_path / "run", "--n-train", "4", "--no-filter",
               "--refusal-token", "5", "--positions=-1")  # fmt: skip
    honest = run_stage.write_json

    def full(path: Path, document: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(run_stage, "write_json", full)
    result = cli(*command)
    assert result.code == 3
    line = result.err.splitlines()[-1]
    assert line.endswith(
        "extract.json: No space left on device: make room there, or choose another folder"
    )
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(run_stage, "write_json", honest)
    assert cli(*command).code == 0
