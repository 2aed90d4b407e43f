"""Files are replaced whole and never through a link; a lock keeps a second writer out."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from abliterate.errors import InputError, UsageError
from abliterate.storage import guarded_files, locks
from abliterate.storage.artifacts import write_json
from abliterate.storage.guarded_files import open_to_extend, remove_temporaries, replacing
from abliterate.storage.locks import hold_file, hold_folder
from abliterate.storage.ownership import claim, claim_file, is_lines, is_page, is_record


def plant(path: Path, kind: str, victim: Path) -> None:
    """Put something in the place of a file that is to be written."""
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "dangling":
        path.symlink_to(victim.with_name("nowhere"))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/full")


@pytest.mark.parametrize("without", [False, True], ids=["nofollow", "no-nofollow"])
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder", "device"])
def test_what_is_in_the_way_is_refused_and_left_alone(
    kind: str, without: bool, tmp_path: Path, monkeypatch
) -> None:
    if without:  # as where the system has no such flag
        monkeypatch.setattr(guarded_files, "NOFOLLOW", 0)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = tmp_path / "run" / "extract.json"
    path.parent.mkdir()
    plant(path, kind, victim)
    for write in (lambda: write_json(path, {}), lambda: open_to_extend(path)):
        with pytest.raises(InputError, match=r"extract.json .*remove it"):
            write()
    assert victim.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["run", "victim"]
    assert os.listdir(path.parent) == ["extract.json"]


def test_names_that_others_could_guess_are_not_used(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "record.json.partial").symlink_to(victim)
    write_json(tmp_path / "record.json", {"a": 1})
    assert json.loads((tmp_path / "record.json").read_text()) == {"a": 1}
    assert victim.read_text() == "precious"


def test_a_hard_link_is_replaced_but_never_added_to(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "lines.jsonl"
    victim.write_text("precious")
    os.link(victim, path)
    with pytest.raises(InputError, match="hard link"):
        open_to_extend(path)
    write_json(path, {})
    assert victim.read_text() == "precious"


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "extract.json"
    with pytest.raises(OSError, match="No space left") as caught:
        write_json(path, {})
    assert caught.value.filename == str(path)
    assert os.listdir(tmp_path) == []


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.json"):
        (left,) = os.listdir(tmp_path)
    assert os.listdir(tmp_path) == ["a.json"]
    for name in (left, "a.partial", ".a.json.partial", ".a.json.0123.partial"):
        (tmp_path / name).write_text("")
    (tmp_path / left.replace("a.json", "b.json")).symlink_to("a.partial")
    remove_temporaries(tmp_path)
    assert left not in os.listdir(tmp_path)
    assert len(os.listdir(tmp_path)) == 5


def test_a_lock_names_its_holder_and_is_gone_afterwards(tmp_path: Path) -> None:
    run, said = tmp_path / "new" / "run", list[str]()

    def second() -> None:
        for lock in (hold_folder(run, "select"), hold_file(run / "out.jsonl", "score")):
            try:
                with lock:
                    said.append("held")
            except InputError as error:
                said.append(str(error))

    with hold_folder(run, "evaluate"), hold_folder(run, "extract"):  # a stage within a chain
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert (
        f"{run} is in use by another process: `abliterate evaluate`, pid {os.getpid()}" in said[0]
    )
    assert said[1] == "held"
    assert not (tmp_path / "new").exists()  # made by the lock, and nothing came into it


def test_a_part_of_a_folder_is_held_beside_the_whole(tmp_path: Path) -> None:
    with hold_folder(tmp_path, "evaluate"), hold_folder(tmp_path, "inspect", "inspect"):
        assert len(os.listdir(tmp_path)) == 4
    assert os.listdir(tmp_path) == []


def test_a_filesystem_without_locks_is_worked_on_with_a_warning(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    def missing(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", missing)
    monkeypatch.setattr(locks.log, "propagate", True)
    with caplog.at_level("WARNING", "abliterate"), hold_folder(tmp_path, "select"):
        assert f"{tmp_path} has no locks" in caplog.text
    assert os.listdir(tmp_path) == []


HOLD = """
import sys, time
from pathlib import Path
from abliterate.storage.locks import hold_folder
with hold_folder(Path(sys.argv[1]), "evaluate"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"pid {process.pid} on "), hold_folder(tmp_path, "x"):
            pass
        process.send_signal(signal.SIGKILL)
    assert len(os.listdir(tmp_path)) == 2  # both files are left
    with hold_folder(tmp_path, "select"):
        who = json.loads((tmp_path / ".abliterate.holder.json").read_text())
        assert (who["pid"], who["command"]) == (os.getpid(), "select")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", [locks.LOCK, ".abliterate.holder.json"])
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder", "hard"])
def test_a_lock_is_no_link(kind: str, name: str, tmp_path: Path) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.write_text("precious")
    if kind == "hard":
        os.link(victim, run / name)
    else:
        plant(run / name, kind, victim)
    with pytest.raises(InputError, match="remove it"), hold_folder(run, "extract"):
        pass
    assert victim.read_text() == "precious"


def test_what_is_said_of_a_holder_is_never_shown_raw(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        evil = {"pid": 1, "host": "\x1b[2Jx\nerror: no", "command": "a", "started": "b"}
        (tmp_path / ".abliterate.holder.json").write_text(json.dumps(evil))
        with pytest.raises(InputError) as caught, hold_folder(tmp_path, "x"):
            pass
        process.kill()
    assert str(caught.value) == f"{tmp_path} is in use by another process; wait for it to end"


def test_only_files_of_the_same_kind_are_replaced(tmp_path: Path) -> None:
    record, lines, page = (tmp_path / name for name in ("a.json", "a.jsonl", "a.html"))
    record.write_text('{"mine": 1}')
    with pytest.raises(InputError, match=r"a.json was not written by abliterate"):
        claim(tmp_path, {"a.json": is_record})
    record.write_text("{torn")
    with pytest.raises(InputError, match=r"a.json"):
        claim(tmp_path, {"a.json": is_record})
    write_json(tmp_path / "b.json", {"versions": {"abliterate": "0"}})
    claim(tmp_path, {"a.json": is_record})  # damaged, in a folder of ours
    kind = is_lines("prompt", "refused")
    ours = '{"prompt": "p", "refused": true}\n'
    for text, fine in (("", True), (ours, True), (ours + '{"pro', True), ('{"prompt": "p', True),
                       ("hello", False), ('{"prompt": 1}\n', False), (ours + "no\n", False),
                       (ours + "[1]\n", False)):  # fmt: skip
        lines.write_text(text)
        if fine:
            claim_file(lines, kind, "score -o")
        else:
            with pytest.raises(UsageError, match="no earlier output of `abliterate score -o`"):
                claim_file(lines, kind, "score -o")
    page.write_text("<html><head></head>my thesis")
    with pytest.raises(UsageError, match=r"a.html"):
        claim_file(page, is_page, "report")
