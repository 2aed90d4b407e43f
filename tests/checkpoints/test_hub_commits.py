"""One experiment, one commit: through the real client, from a hub on loopback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import Commands
from hub_server import Branches, Hub
from safetensors.torch import load_file, save_file

A, B = "a" * 40, "b" * 40
SMALL = ("--no-filter", "--refusal-token", "I", "--n-train", "4", "--positions", "last", "-q")
OPEN = ("--no-filter", "--n-val", "4", "--kl-threshold", "1e9", "--induce-threshold=-1e9", "-q")
SHORT = ("--n-test", "2", "--max-new-tokens", "2", "-q")


@pytest.fixture(scope="module")
def commits(tiny, tmp_path_factory) -> dict[str, Path]:
    """Two commits of one model: the second has other weights."""
    first = tiny("llama")
    second = tmp_path_factory.mktemp("moved") / "model"
    shutil.copytree(first, second)
    weights = load_file(first / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            weights[name] = tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
    save_file(weights, second / "model.safetensors", {"format": "pt"})
    return {A: first, B: second}


def _rows(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True)
    lines = (json.dumps({"goal": text}) + "\n" for text in texts)
    (folder / "train.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, Path]:
    """Two commits of one data set."""
    root = tmp_path_factory.mktemp("rows")
    return {
        A: _rows(root / "a", [f"Request number {n} of the first" for n in range(40)]),
        B: _rows(root / "b", [f"Request number {n} of the second" for n in range(30)]),
    }


@pytest.fixture
def hub(hub_place, commits, rows) -> Iterator[Hub]:
    hub, _, cache = hub_place
    hub.clear()
    hub.branches = {
        "org/moving": Branches({"main": A, "next": B}, dict(commits)),
        "datasets/org/rows": Branches({"main": A, "v2": B}, dict(rows)),
    }
    yield hub
    for folder in cache.iterdir():
        shutil.rmtree(folder)


@pytest.fixture
def run(hub_place) -> Commands:
    return hub_place[1]


def _move(hub: Hub) -> None:
    hub.branches["org/moving"].refs["main"] = B
    hub.branches["datasets/org/rows"].refs["main"] = B


def _record(path: Path) -> dict:
    return json.loads(path.read_text())


def test_every_stage_keeps_the_commit_that_extract_took(
    hub: Hub, run: Commands, tmp_path: Path
) -> None:
    folder, out = tmp_path / "run", tmp_path / "out"
    done = run("extract", "org/moving", "-o", folder, "--harmful", "org/rows", *SMALL)
    assert done.code == 0, done.err
    extracted = _record(folder / "extract.json")
    assert extracted["model"] == {"id": "org/moving", "revision": A}
    assert extracted["datasets"] == {"org/rows": A}
    _move(hub)
    assert run("select", folder, *OPEN).code == 0
    selected = _record(folder / "selection.json")
    assert (selected["model"]["revision"], selected["datasets"]) == (A, {"org/rows": A})
    # The direction's file alone says the commit too.
    for direction in (folder, folder / "direction.safetensors"):
        done = run("orthogonalize", "org/moving", "--direction", direction, "-o", out, "-q")
        assert done.code == 0, done.err
        assert _record(out / "abliterate.json")["source"]["revision"] == A
        assert f"`org/moving` at commit `{A}`" in (out / "README.md").read_text()
        assert A not in done.err
        assert B not in done.err
        base = ("--source", "org/moving", "--direction", direction)
        assert run("verify", out, *base).code == 0
        shutil.rmtree(out)
    adapter = ("--direction", folder, "-o", out, "--as-lora", "-q")
    assert run("orthogonalize", "org/moving", *adapter).code == 0
    config = _record(out / "adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/moving", A)
    assert run("evaluate", "org/moving", "--direction", folder, *SHORT).code == 0
    evaluated = _record(folder / "evaluation.json")
    assert (evaluated["model"]["revision"], evaluated["datasets"]) == (A, {"org/rows": A})
    assert run("inspect", folder, "-q").code == 0
    assert _record(folder / "inspect.json")["model"]["revision"] == A
    assert run("trace", folder, "--n-prompts", "2", "-q").code == 0
    assert _record(folder / "trace.json")["model"]["revision"] == A
    asked = ("--steps", "2", "--n-test", "2", "--max-new-tokens", "2", "--no-picture", "-q")
    assert run("fragility", folder, *asked).code == 0
    assert _record(folder / "fragility.json")["model"]["revision"] == A


def test_another_commit_is_taken_when_asked_for_and_said(
    hub: Hub, run: Commands, tmp_path: Path
) -> None:
    folder, out = tmp_path / "run", tmp_path / "out"
    assert run("extract", "org/moving@next", "-o", folder, *SMALL).code == 0
    assert _record(folder / "extract.json")["model"] == {"id": "org/moving", "revision": B}
    done = run("select", folder, "--revision", "main", *OPEN)
    said = f"org/moving is taken at commit {A}; {folder / 'extract.json'} names commit {B}"
    assert done.code == 0
    assert said in done.err
    assert _record(folder / "selection.json")["model"]["revision"] == A
    for asked in (["org/moving@main"], ["org/moving", "--revision", A]):
        done = run("orthogonalize", *asked, "--direction", folder, "-o", out, "-q")
        assert done.code == 0
        assert said in done.err
        assert _record(out / "abliterate.json")["source"]["revision"] == A
        shutil.rmtree(out)
    line = run.fails("extract", "org/moving@next", "--revision", "main", "-o", out, code=2)
    assert "name two revisions" in line
    line = run.fails("extract", "org/moving@..", "-o", out, code=2)
    assert "org/moving@..: what follows the @ must name" in line


def test_an_id_with_a_revision_is_understood_wherever_an_id_is(
    hub: Hub, run: Commands, tiny, tmp_path: Path
) -> None:
    """Of the two commits only the second differs from the folder."""
    local = tiny("llama")
    same = run("diff", "org/moving@main", local, "--json")
    assert same.code == 0
    assert all(t["state"] == "unchanged" for t in same.json["tensors"])
    other = run("diff", local, "org/moving@next", "--json")
    assert other.code == 0
    assert any(t["state"] != "unchanged" for t in other.json["tensors"])
    direction = tmp_path / "direction.safetensors"
    save_file({"direction": torch.randn(48, generator=torch.Generator().manual_seed(2))}, direction)
    out = tmp_path / "out"
    asked = ("--direction", direction, "-o", out, "-q")
    assert run("orthogonalize", "org/moving@next", *asked).code == 0
    # The record of OUT names the commit: the base is that one, though main is another.
    audit = run("audit", out, "--base", "org/moving", "--json")
    assert audit.code == 7
    assert audit.json["base"]["projected"], audit.err
    assert audit.json["base"]["beyond"] == []
    pinned = run("audit", out, "--base", "org/moving@main", "--json")
    assert pinned.json["base"]["beyond"] != []
    assert f"commit {A}" in pinned.err
    assert run("verify", out, "--source", "org/moving", "--direction", direction).code == 0
    rows = ("--checkpoint", "org/moving@next", "--checkpoint", "old=org/moving@main")
    done = run("evaluate", local, *rows, "-o", tmp_path / "e", "--intervention", "checkpoint",
               "--refusal-token", "I", *SHORT)  # fmt: skip
    assert done.code == 0, done.err
    document = json.dumps(_record(tmp_path / "e" / "evaluation.json"))
    assert A in document
    assert B in document
    assert '"moving"' in document
    # What it compared it compares again, at the same commit, until another one is asked for.
    _move(hub)
    rows = ("--checkpoint", "org/moving", "--checkpoint", "old=org/moving")
    again = run("evaluate", local, *rows, "-o", tmp_path / "e", "--intervention", "checkpoint",
                "--refusal-token", "I", *SHORT)  # fmt: skip
    assert again.code == 0, again.err
    held = _record(tmp_path / "e" / "evaluation.json")["checkpoints"]
    assert {name: one["revision"] for name, one in held.items()} == {"moving": B, "old": A}
    assert "is taken at commit" not in again.err
    for command in ("writers", "plan"):
        assert run(command, "org/moving@next", "--json").code == 0


def test_names_that_are_nearly_ids_say_how_to_write_them(
    hub: Hub, run: Commands, tmp_path: Path
) -> None:
    for name, written in {
        "org/moving/": "write org/moving",
        "https://huggingface.co/org/moving": "write org/moving",
        "https://huggingface.co/org/moving/tree/next": "write org/moving@next",
        "huggingface.co/org/moving/": "write org/moving",
        "hf://org/moving@next": "write org/moving@next",
        "https://huggingface.co/org/moving.git": "write org/moving",
        "hf.co/org/moving:Q4_K_M": "write org/moving",
    }.items():
        for command in ("writers", "plan"):
            assert run.fails(command, name, code=4).endswith(written)
    assert run.fails("prompts", "org/rows/", code=3).endswith("org/rows")


def test_a_data_sets_revision_is_that_one_or_nothing(hub: Hub, run: Commands) -> None:
    def counted(source: str) -> int:
        done = run("prompts", source, "--json")
        assert done.code == 0, done.err
        return done.json["splits"]["all"]["prompts"]

    assert counted("org/rows") == 40
    hub.faults.append(_gone())
    line = run.fails("prompts", "org/rows@v2", code=3)
    assert "the hub answers 500" in line
    hub.clear()
    assert counted("org/rows@v2") == 30
    assert counted("org/rows@v2:train[:10]") == 10
    # Both are cached now, the second later: each name still means its own.
    hub.faults.append(_gone())
    assert (counted("org/rows"), counted(f"org/rows@{A}")) == (40, 40)
    assert (counted("org/rows@v2"), counted(f"org/rows@{B}:train[goal]")) == (30, 30)
    assert "the hub answers 500" in run.fails("prompts", f"org/rows@{'c' * 40}", code=3)


def test_a_run_that_goes_on_keeps_its_commit(hub: Hub, run: Commands, tmp_path: Path) -> None:
    command = ("run", "org/moving", "-o", tmp_path / "run", *OPEN, "--n-train", "4",
               "--refusal-token", "I", "--positions", "last", *SHORT[:4], "--json")  # fmt: skip
    first = run(*command)
    assert first.code == 0, first.err
    _move(hub)
    again = run(*command)
    assert again.code == 0
    assert again.json == first.json
    assert again.json["orthogonalize"]["source"]["revision"] == A


def _gone():
    from hub_server import Fault

    return Fault("/(api/)?datasets/", 500, {"Retry-After": "0"})
