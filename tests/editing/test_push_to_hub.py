"""``--push-to-hub``: verified, private, resumed; through the real client to a hub on loopback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Commands
from hub_server import Fault, Hub
from safetensors.torch import load_file, save_file

ACCOUNT = {
    "type": "user", "name": "me", "orgs": [{"name": "org"}],
    "auth": {"accessToken": {"role": "write"}},
}  # fmt: skip
TOKEN = {"HF_TOKEN": "hf_of_a_test"}


@pytest.fixture(scope="module")
def direction(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    vector = torch.randn(48, generator=torch.Generator().manual_seed(2))
    save_file({"direction": vector}, path)
    return path


@pytest.fixture
def hub(hub_place, tmp_path: Path) -> Iterator[Hub]:
    hub, _, cache = hub_place
    hub.clear()
    hub.models, hub.branches = {}, {}
    hub.account, hub.room = ACCOUNT, tmp_path / "on the hub"
    yield hub
    hub.pushed.clear()
    hub.private.clear()
    hub.stored.clear()
    hub.account = hub.room = None
    for folder in cache.iterdir():
        shutil.rmtree(folder)


@pytest.fixture
def run(hub_place) -> Commands:
    return hub_place[1]


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".gitattributes"
    }


def _sent(hub: Hub) -> list[str]:
    """What was written to the hub."""
    reads = ("GET ", "HEAD ", "POST /api/validate-yaml")
    return [path for path in hub.paths if not path.startswith(reads)]


def test_a_pushed_checkpoint_is_the_folder_and_a_broken_push_goes_on(
    tiny, direction: Path, hub: Hub, run: Commands, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("orthogonalize", tiny("llama"), "--direction", direction, "-o", out,
               "--push-to-hub", "org/new")  # fmt: skip
    hub.faults = [Fault("POST .*/commit/", 403)]
    denied = run(*command, environment=TOKEN)
    assert denied.code == 2, denied.err
    assert "your token may not write there (403)" in denied.err
    assert len([path for path in hub.paths if path.startswith("PUT ")]) == 1
    hub.clear()
    done = run(*command, "--overwrite", environment=TOKEN)
    assert done.code == 0, done.err
    assert "(private)" in done.out
    # What was sent before the fault is not sent again.
    assert not [path for path in hub.paths if path.startswith("PUT ")]
    assert _files(hub.pushed["org/new"]) == _files(out)
    assert {"README.md", "abliterate.json", "model.safetensors"} <= _files(out).keys()
    assert hub.private == {"org/new"}
    assert "hf_of_a_test" not in done.out + done.err


def test_public_is_asked_for(
    tiny, direction: Path, hub: Hub, run: Commands, tmp_path: Path
) -> None:
    base = ("orthogonalize", tiny("llama"), "--direction", direction)
    assert "--push-to-hub" in run.fails(*base, "-o", tmp_path / "a", "--public", code=2)
    push = ("--push-to-hub", "me/new")
    done = run(*base, "-o", tmp_path / "a", *push, "--public", environment=TOKEN)
    assert done.code == 0, done.err
    assert not hub.private
    line = run.fails(*base, "-o", tmp_path / "b", *push, code=2, environment=TOKEN)
    assert "is public already: pass --public" in line
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("repo", "change", "said"),
    [
        ("org/new", {"environment": {}}, "there is no token"),
        ("org/new", {"account": None}, "the hub refuses your token"),
        ("org/new", {"role": "read"}, "your token may only read"),
        ("other/new", {}, "the account of your token, me, is neither other nor a member"),
        ("new", {}, "a repository is written ORG/NAME"),
        ("org/full", {}, "holds other files (weights.bin)"),
        ("org/new", {"options": ("--as-lora",)}, "--as-lora leaves out"),
    ],
)
def test_what_cannot_be_pushed_is_told_before_the_edit(
    repo: str, change: dict[str, Any], said: str, tiny, direction: Path, hub: Hub, run: Commands,
    tmp_path: Path,
) -> None:  # fmt: skip
    hub.account = change.get("account", ACCOUNT | {
        "auth": {"accessToken": {"role": change.get("role", "write")}}
    })  # fmt: skip
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "weights.bin").write_bytes(b"of somebody")
    hub.pushed["org/full"] = tmp_path / "full"
    hub.private.add("org/full")
    out = tmp_path / "out"
    line = run.fails(
        "orthogonalize", tiny("llama"), "--direction", direction, "-o", out,
        "--push-to-hub", repo, *change.get("options", ()),
        code=2, environment=change.get("environment", TOKEN),
    )  # fmt: skip
    assert said in line
    assert not out.exists()
    assert not _sent(hub)


@pytest.fixture
def pushes(monkeypatch) -> list[tuple[Any, ...]]:
    """What would be sent, of commands in this process."""
    found: list[tuple[Any, ...]] = []

    def note(*args: Any) -> str:
        found.append(args)
        return "http://hub/org/new"

    monkeypatch.setattr("abliterate.hub.publishing.check_destination", lambda *_: None)
    monkeypatch.setattr("abliterate.hub.publishing.push_folder", note)
    return found


def test_nothing_is_pushed_that_verify_refuses_or_the_editor_does_not_make(
    tiny, direction: Path, cli, pushes, monkeypatch, tmp_path: Path
) -> None:
    from abliterate.pipeline import edit_stage

    made = edit_stage.orthogonalize_stage

    def tampered(session: Any, vector: Any, out: Path) -> dict[str, Any]:
        record = made(session, vector, out)
        tensors = load_file(out / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] += 0.5
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        return record

    base = ("orthogonalize", tiny("llama"), "--direction", direction, "--push-to-hub", "org/new")
    assert cli(*base, "-o", tmp_path / "good").code == 0
    assert [args[:3] for args in pushes] == [(tmp_path / "good", "org/new", False)]
    monkeypatch.setattr(edit_stage, "orthogonalize_stage", tampered)
    done = cli(*base, "-o", tmp_path / "bad")
    assert done.code == 6
    assert "does not pass verify against its source, so nothing was pushed" in done.err
    assert cli(*base, "-o", tmp_path / "no", "--layers", "99").code == 2
    assert len(pushes) == 1


def test_run_pushes_the_model_of_its_folder(
    tiny, direction: Path, cli, pushes, monkeypatch, tmp_path: Path
) -> None:
    """With the stages before the edit left out."""
    folder = tmp_path / "run"

    def pipeline(session: Any, run: Path) -> dict[str, Any]:
        from abliterate.direction_loading import load_direction
        from abliterate.pipeline.edit_stage import orthogonalize_stage

        run.mkdir()
        shutil.copyfile(direction, run / "direction.safetensors")
        edit = orthogonalize_stage(session, load_direction(run), run / "model")
        return {"edit": edit, "evaluate": {"interventions": {}, "judge_failures": []}}

    monkeypatch.setattr("abliterate.pipeline.run.run_pipeline", pipeline)
    done = cli("run", tiny("llama"), "-o", folder, "--push-to-hub", "org/new", "--public", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["edit"]["tensors"]
    assert [args[:3] for args in pushes] == [(folder / "model", "org/new", True)]
