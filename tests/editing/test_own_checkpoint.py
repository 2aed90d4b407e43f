"""What the editor may replace, follow and remove: its own work, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from abliterate.editing.own_checkpoint import check_replaceable
from abliterate.editing.workspace import Workspace


@pytest.fixture(scope="module")
def direction(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "d.safetensors"
    vector = torch.randn(48, generator=torch.Generator().manual_seed(1))
    save_file({"direction": vector}, path)
    return path


@pytest.fixture
def base(tiny, direction: Path) -> tuple[str | Path, ...]:
    return ("orthogonalize", tiny("llama", True), "--direction", direction, "-o")


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_the_record_lists_every_file(base, cli, tiny, direction, tmp_path: Path) -> None:
    for name, more in (("out", ()), ("adapter", ("--as-lora",)), ("added", ("--add", "1"))):
        out = tmp_path / name
        if more[:1] == ("--add",):
            from abliterate.direction import Direction, save_direction

            save_direction(tmp_path / "d.safetensors", Direction(torch.ones(48), -1, 2), "tiny")
            args = ("orthogonalize", tiny("llama"), "--direction", tmp_path / "d.safetensors", "-o")
        else:
            args = base
        result = cli(*args, out, *more)
        assert result.code == 0, result.err
        record = json.loads((out / "abliterate.json").read_text())
        assert record["files"] == sorted(files(out))
        check_replaceable(out)


@pytest.mark.parametrize(
    "kind", ["nothing", "fake", "other", "borrowed", "notes", "folder", "link"]
)
def test_only_an_edited_checkpoint_and_nothing_else_is_replaced(
    kind: str, base, cli, fails, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli(*base, out).code == 0
    record = (out / "abliterate.json").read_text()
    named = out / "thesis.txt"
    if kind in ("nothing", "fake", "other", "borrowed"):
        shutil.rmtree(out)
        out.mkdir()
    if kind == "fake":
        (out / "abliterate.json").write_text("{}")
    elif kind == "other":
        (out / "abliterate.json").write_text('{"files": ["abliterate.json", "thesis.txt"]}')
    elif kind == "borrowed":
        (out / "abliterate.json").write_text(record)
    elif kind == "folder":
        named = out / "notes" / "deep" / "thesis.txt"
        named.parent.mkdir(parents=True)
    elif kind == "link":
        named = out / "papers"
        named.symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").mkdir()
    if kind != "link":
        named.write_text("mine")
    before = files(out)
    line = fails(*base, out, "--overwrite", "--scale", "0.5", code=2)
    assert str(named if kind in ("borrowed", "notes", "folder", "link") else out) in line
    assert files(out) == before
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_came_into_out_meanwhile_is_not_replaced(
    overwrite: bool, base, cli, fails, tmp_path: Path, monkeypatch
) -> None:
    out = tmp_path / "out"
    if overwrite:
        assert cli(*base, out).code == 0
    finish = Workspace.finish

    def finish_and_write(self, *args) -> None:
        finish(self, *args)
        out.mkdir(exist_ok=True)
        (out / "thesis.txt").write_text("mine")

    monkeypatch.setattr(Workspace, "finish", finish_and_write)
    more = ("--overwrite", "--scale", "0.5") if overwrite else ()
    line = fails(*base, out, *more, code=2)
    assert str(out) in line
    assert (out / "thesis.txt").read_text() == "mine"


def begin(base, cli, out: Path, monkeypatch) -> Path:
    """Work that was interrupted when all shards were done."""

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("abliterate.editing.orthogonalize.check_unchanged", interrupt)
        assert cli(*base, out).code == 130
    return out.with_name(f"{out.name}.partial")


@pytest.mark.parametrize("name", ["files", "current", "fetched", "replaced", "journal.jsonl",
                                  "journal-1.jsonl", "journal.holder.json", "journal.lock",
                                  ""])  # fmt: skip
@pytest.mark.parametrize("begun", [False, True])
def test_no_link_in_the_working_folder_is_followed(
    begun: bool, name: str, base, cli, fails, tmp_path: Path, monkeypatch
) -> None:
    partial = tmp_path / "out.partial"
    if begun and name:
        begin(base, cli, tmp_path / "out", monkeypatch)
    elif name:
        partial.mkdir()
    path, victim = partial / name if name else partial, tmp_path / "victim"
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if name.startswith("journal"):
        victim.write_text("mine")
    else:
        victim.mkdir()
        (victim / "thesis.txt").write_text("mine")
    path.symlink_to(victim)
    line = fails(*base, tmp_path / "out", code=3 if name else 4)
    assert str(path) in line
    assert files(tmp_path / "victim") == ({} if victim.is_file() else {"thesis.txt": b"mine"})
    assert victim.is_dir() or victim.read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_links_among_finished_files_never_reach_the_output(
    base, cli, tmp_path: Path, monkeypatch
) -> None:
    assert cli(*base, tmp_path / "whole").code == 0
    partial = begin(base, cli, tmp_path / "out", monkeypatch)
    shard, *_ = sorted((partial / "files").glob("*.safetensors"))
    shard.rename(tmp_path / "victim")
    shard.symlink_to(tmp_path / "victim")
    shutil.copy(tmp_path / "victim", tmp_path / "victim.was")
    (partial / "files" / "config.json").unlink(missing_ok=True)
    (partial / "files" / "config.json").symlink_to(tmp_path / "victim")
    assert cli(*base, tmp_path / "out").code == 0
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert (tmp_path / "victim").read_bytes() == (tmp_path / "victim.was").read_bytes()


@pytest.mark.parametrize("journal", [None, b"", b"{}\n", b'{"inputs": "x"}\n', b"\xff\n"])
def test_without_a_journal_of_ours_nothing_is_removed(
    journal: bytes | None, base, fails, tmp_path: Path
) -> None:
    kept = tmp_path / "out.partial" / "files" / "thesis.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    if journal is not None:
        (tmp_path / "out.partial" / "journal.jsonl").write_bytes(journal)
    assert "was not left by an edit" in fails(*base, tmp_path / "out", code=4)
    assert kept.read_text() == "mine"


def test_locks_and_torn_files_are_not_carried_along(tiny, cli, direction, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny("llama"), tmp_path / "source"))
    for name in (".abliterate.lock", ".abliterate.holder.json", ".abliterate-trace.lock",
                 ".config.json.0123456789abcdef.partial"):  # fmt: skip
        (source / name).write_text("")
    (source / "notes.lock").write_text("theirs")
    out = tmp_path / "out"
    assert cli("orthogonalize", source, "--direction", direction, "-o", out).code == 0
    assert [name for name in os.listdir(out) if "lock" in name or name.startswith(".")] == [
        "notes.lock"
    ]


def test_an_older_checkpoint_whose_record_lists_no_files_is_named_as_that(
    base, cli, fails, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli(*base, out).code == 0
    record = json.loads((out / "abliterate.json").read_text())
    del record["files"]
    (out / "abliterate.json").write_text(json.dumps(record))
    before = files(out)
    line = fails(*base, out, "--overwrite", code=2)
    assert "older version" in line
    assert "remove it yourself" in line
    assert files(out) == before
