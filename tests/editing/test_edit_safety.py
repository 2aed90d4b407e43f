"""The data: OUT is complete or absent, a kill costs no more than the shards in flight."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from warm_python import warm_python

from abliterate.editing import auxiliary_files
from abliterate.editing.workspace import Workspace
from abliterate.storage import file_io

HERE = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def directions(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("directions")
    for seed in range(2):
        vector = torch.randn(48, generator=torch.Generator().manual_seed(seed))
        save_file({"direction": vector}, folder / f"{seed}.safetensors")
    return sorted(folder.iterdir())


def copy(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("replacing", [False, True])
def test_kills_at_random_moments_lose_no_byte(
    replacing: bool, tiny, cli, directions, tmp_path: Path
) -> None:
    # In memory where possible: it is the process that is killed, not the machine.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        source = copy(tiny("qwen2", True), Path(scratch, "source"))
        old = Path(scratch, "old") if replacing else None
        if old is not None:
            base = ("orthogonalize", tiny("llama"), "--direction", directions[0])
            assert cli(*base, "-o", old).code == 0
        job = {
            "source": str(source),
            "out": str(Path(scratch, "out")),
            "old": old and str(old),
            "directions": [str(path) for path in directions],
            "kills": 60,
            "seed": 3 + replacing,
        }
        done = warm_python().run(HERE / "killing.py", json.dumps(job), timeout=900)
        assert done.code == 0, done.err[-2000:]
        report = done.json
        assert report["errors"] == []
        assert report["kills"] >= 60
        assert report["resumed"] >= 6  # kills that left finished shards behind


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem with room for one edited checkpoint and a little more."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no filesystem can be mounted: {error}")
    if mounted.returncode:
        pytest.skip(f"no filesystem can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return filler


def test_a_full_disk_midway_keeps_what_is_finished(
    tiny, cli, fails, directions, tmp_path: Path, small_disk: Path, monkeypatch
) -> None:
    source = tiny("qwen2", True)
    base = ("orthogonalize", source, "--direction", directions[0], "--jobs", "1", "-o")
    assert cli(*base, tmp_path / "whole").code == 0
    current = Workspace.current
    seen: list[str] = []

    def current_and_fill(self, name: str) -> Path:
        if name not in seen:
            seen.append(name)
            if len(seen) == 3:
                while len(self.finished) < 2:  # the thread that flushes them is at it
                    time.sleep(0.001)
                fill(small_disk)
        return current(self, name)

    monkeypatch.setattr(Workspace, "current", current_and_fill)
    line = fails(*base, small_disk / "out", code=4)
    assert ".safetensors: No space left on device" in line
    assert "kept in" in line
    assert names(small_disk) == ["filler", "out.partial"]
    monkeypatch.setattr(Workspace, "current", current)
    line = fails(*base, small_disk / "out", code=4)  # still full: nothing is thrown away
    assert "bytes of disk space" in line
    assert "2 finished shards kept" in line
    (small_disk / "filler").unlink()
    result = cli(*base, small_disk / "out")
    assert result.code == 0, result.err
    assert "going on from 2 finished shards" in result.err
    assert tree(small_disk / "out") == tree(tmp_path / "whole")
    assert names(small_disk) == ["out"]


def test_too_little_space_is_seen_before_anything_is_written(
    tiny, fails, cli, directions, small_disk: Path
) -> None:
    base = ("orthogonalize", tiny("qwen2", True), "--direction", directions[0], "-o")
    filler = fill(small_disk)
    line = fails(*base, small_disk / "out", code=4)
    assert "No space left" in line or "bytes of disk space" in line
    assert "out" not in names(small_disk)
    with filler.open("r+b") as file:  # room for most of it, but not for all
        file.truncate(filler.stat().st_size - (400 << 10))
    line = fails(*base, small_disk / "out", code=4)
    assert "bytes of disk space" in line
    filler.unlink()
    assert cli(*base, small_disk / "out").code == 0


def test_ctrl_c_midway_is_one_line_and_resumable(
    tiny, cli, directions, tmp_path: Path, monkeypatch
) -> None:
    source = tiny("qwen2", True)
    base = ("orthogonalize", source, "--direction", directions[0], "--jobs", "1", "-o")
    assert cli(*base, tmp_path / "whole").code == 0
    finish = Workspace.finish

    def finish_and_interrupt(self, *args) -> None:
        finish(self, *args)
        if len(self.finished) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    monkeypatch.setattr(Workspace, "finish", finish_and_interrupt)
    result = cli(*base, tmp_path / "out")
    assert result.code == 130
    assert "Traceback" not in result.err
    line = result.err.strip().splitlines()[-1]
    assert line.startswith("error: interrupted; ")
    assert "run the same command again" in line
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Workspace, "finish", finish)
    result = cli(*base, tmp_path / "out")
    assert result.code == 0, result.err
    assert "going on from" in result.err
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_an_unreadable_disk_is_named_and_the_work_kept(
    tiny, fails, directions, tmp_path: Path, monkeypatch
) -> None:
    read = os.preadv

    def broken(descriptor: int, buffers: list, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("00003-of-00007.safetensors"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(descriptor, buffers, offset)

    source = tiny("qwen2", True)
    assert (source / "model-00003-of-00007.safetensors").exists(), names(source)
    monkeypatch.setattr(os, "preadv", broken)
    monkeypatch.setattr(os, "copy_file_range", lambda *a: 0)
    base = ("orthogonalize", source, "--direction", directions[0], "-o", tmp_path / "out")
    line = fails(*base, code=4)
    assert "model-00003-of-00007.safetensors: Input/output error" in line
    assert "kept in" in line
    assert names(tmp_path) == ["out.partial"]


def test_a_source_that_changes_is_refused(
    tiny, fails, directions, tmp_path: Path, monkeypatch
) -> None:
    source = copy(tiny("llama", True), tmp_path / "source")
    victim = sorted(source.glob("*.safetensors"))[1]
    finish = Workspace.finish

    def finish_and_touch(self, *args) -> None:
        finish(self, *args)
        os.utime(victim, ns=(1, 1))

    monkeypatch.setattr(Workspace, "finish", finish_and_touch)
    base = ("orthogonalize", source, "--direction", directions[0], "-o", tmp_path / "out")
    line = fails(*base, code=4)
    assert f"{victim} changed while it was read" in line
    assert names(tmp_path) == ["source"]


def test_a_tampered_partial_is_made_again_and_a_foreign_one_is_left_alone(
    tiny, cli, fails, directions, tmp_path: Path, monkeypatch
) -> None:
    base = ("orthogonalize", tiny("qwen2", True), "--direction", directions[0], "-o")
    assert cli(*base, tmp_path / "whole").code == 0

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("abliterate.editing.orthogonalize.check_unchanged", interrupt)
        assert cli(*base, tmp_path / "out").code == 130
    files = tmp_path / "out.partial" / "files"
    first, second, *_ = sorted(files.glob("*.safetensors"))
    first.write_bytes(b"short")
    with second.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    (files / "stray.txt").write_text("")
    with (tmp_path / "out.partial" / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"shard": "torn')
    assert cli(*base, tmp_path / "out").code == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")

    foreign = tmp_path / "mine.partial"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("keep")
    assert "remove it" in fails(*base, tmp_path / "mine", code=4)
    assert (foreign / "thesis.txt").read_text() == "keep"


def test_other_options_or_sources_start_over(
    tiny, cli, directions, tmp_path: Path, monkeypatch
) -> None:
    source = copy(tiny("qwen2", True), tmp_path / "source")
    base = ("orthogonalize", source, "--direction", directions[0])
    assert cli(*base, "--scale", "0.5", "-o", tmp_path / "half").code == 0
    out = tmp_path / "out"

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    def stop_early(*more: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr("abliterate.editing.orthogonalize.check_unchanged", interrupt)
            assert cli(*base, *more, "-o", out).code == 130

    stop_early()
    result = cli(*base, "--scale", "0.5", "-o", out)
    assert result.code == 0
    assert "going on" not in result.err
    assert tree(out) == tree(tmp_path / "half")
    stop_early("--overwrite")
    shard = sorted(source.glob("*.safetensors"))[0]
    os.utime(shard, ns=(5, 5))
    result = cli(*base, "--overwrite", "-o", out)
    assert result.code == 0
    assert "going on" not in result.err


def test_a_second_process_waits_outside(tiny, fails, directions, tmp_path: Path) -> None:
    import fcntl

    partial = tmp_path / "out.partial"
    partial.mkdir()
    with (partial / "journal.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = fails("orthogonalize", tiny("llama"), "--direction", directions[0], "-o",
                     tmp_path / "out", code=3)  # fmt: skip
    assert "in use by another process" in line


def test_targets_that_would_destroy_something(tiny, fails, directions, tmp_path: Path) -> None:
    source = copy(tiny("llama"), tmp_path / "out.partial")
    base = ("orthogonalize", source, "--direction", directions[0], "-o")
    assert "overlaps" in fails(*base, tmp_path / "out", code=2)
    (tmp_path / "link").symlink_to(source)
    assert "overlaps" in fails(*base, tmp_path / "link" / "x", code=2)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "other").symlink_to(tmp_path / "elsewhere")
    assert "--overwrite" in fails(*base, tmp_path / "other", code=2)
    assert "no folder" in fails(*base, tmp_path / "other", "--overwrite", code=2)
    (tmp_path / "file").write_text("keep")
    assert "no folder" in fails(*base, tmp_path / "file", "--overwrite", code=2)
    assert (tmp_path / "file").read_text() == "keep"


def test_overwriting_without_an_atomic_exchange(
    tiny, cli, directions, tmp_path: Path, monkeypatch
) -> None:
    base = ("orthogonalize", tiny("llama", True), "--direction", directions[0], "-o")
    assert cli(*base, tmp_path / "whole").code == 0
    out = tmp_path / "out"
    earlier = ("orthogonalize", tiny("llama"), "--direction", directions[1], "-o", out)
    assert cli(*earlier).code == 0
    before = tree(out)
    monkeypatch.setattr("abliterate.editing.workspace.exchange", lambda *a: False)
    rename = Path.rename

    def crash(self: Path, target: Path) -> None:
        if self.name == "files":
            raise KeyboardInterrupt  # between the two renames
        rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crash)
        assert cli(*base, out, "--overwrite").code == 130
    assert not out.exists()
    # Another edit finds the old checkpoint in its place again.
    other = ("orthogonalize", tiny("llama", True), "--direction", directions[1], "-o", out)
    with monkeypatch.context() as patch:
        patch.setattr("abliterate.editing.orthogonalize.check_unchanged", crash)
        patch.setattr("abliterate.editing.orthogonalize.write_shards", lambda *a: 1 / 0)
        assert cli(*other, "--overwrite").code == 1
    assert tree(out) == before
    assert cli(*base, out, "--overwrite").code == 0
    assert tree(out) == tree(tmp_path / "whole")
    assert names(tmp_path) == ["out", "whole"]


def test_copies_work_without_help_of_the_kernel(
    tiny, cli, directions, tmp_path: Path, monkeypatch
) -> None:
    base = ("orthogonalize", tiny("qwen2", True), "--direction", directions[0], "-o")
    assert cli(*base, tmp_path / "kernel").code == 0

    def refuse(*args: object) -> int:
        raise OSError(errno.EXDEV, "cross-device")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    assert cli(*base, tmp_path / "bytes").code == 0
    assert tree(tmp_path / "kernel") == tree(tmp_path / "bytes")
    monkeypatch.setattr(file_io, "_CHUNK", 1000)
    assert cli(*base, tmp_path / "chunks", "--jobs", "3").code == 0
    assert tree(tmp_path / "kernel") == tree(tmp_path / "chunks")


def test_clones_are_overwritten_in_place(
    tiny, cli, directions, tmp_path: Path, monkeypatch
) -> None:
    """Where the filesystem shares blocks, only the writers are written."""
    base = ("orthogonalize", tiny("llama", True), "--direction", directions[0], "-o")
    assert cli(*base, tmp_path / "copied").code == 0
    written = 0
    copy_range = file_io.copy_range

    def clone(source: file_io.SourceFile, target: file_io.TargetFile) -> bool:
        copy_range(source, 0, target, 0, source.path.stat().st_size)
        return True

    def count(*args) -> None:
        nonlocal written
        written += 1
        copy_range(*args)

    monkeypatch.setattr("abliterate.editing.shard_writer.clone_file", clone)
    monkeypatch.setattr("abliterate.editing.shard_tasks.copy_range", count)
    assert cli(*base, tmp_path / "cloned").code == 0
    assert tree(tmp_path / "copied") == tree(tmp_path / "cloned")
    assert written == 0


def test_everything_else_of_the_source_comes_along(tiny, cli, directions, tmp_path: Path) -> None:
    source = copy(tiny("llama"), tmp_path / "source")
    for name in ("modeling_custom.py", "sub/deep/vocab.txt", ".gitattributes", "LICENSE"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (source / "modeling_custom.py").chmod(0o755)
    for name in ("old.BIN", "original/consolidated.00.pth", "model.Q4.gguf", "onnx/m.onnx",
                 "adapter/adapter_model.safetensors", ".git/HEAD"):  # fmt: skip
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"unedited")
    os.mkfifo(source / "pipe")
    out = tmp_path / "out"
    result = cli("orthogonalize", source, "--direction", directions[0], "-o", out)
    assert result.code == 0, result.err
    for name in ("modeling_custom.py", "sub/deep/vocab.txt", ".gitattributes", "LICENSE"):
        assert (out / name).read_text() == name
    assert os.access(out / "modeling_custom.py", os.X_OK)
    left = next(line for line in result.err.splitlines() if "left behind" in line)
    for name in ("old.BIN", "original/consolidated.00.pth", "model.Q4.gguf", "onnx/m.onnx",
                 "adapter/adapter_model.safetensors", "pipe"):  # fmt: skip
        assert name in left
        assert not (out / name).exists()
    assert not (out / ".git").exists()


def test_large_values_are_no_infinities_and_half_precision_may_overflow(
    tiny, cli, fails, directions, tmp_path: Path
) -> None:
    source = copy(tiny("llama"), tmp_path / "source")
    path, name = source / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(path).items()}
    tensors[name][0, 0] = 1e30  # its square does not fit float32
    save_file(tensors, path, {"format": "pt"})
    base = ("orthogonalize", source, "--direction", directions[0], "-o")
    assert cli(*base, tmp_path / "large").code == 0
    for bad in (float("nan"), float("-inf")):
        tensors[name][3, 4] = bad
        save_file(tensors, path, {"format": "pt"})
        assert f"'{name}'" in (line := fails(*base, tmp_path / "out", code=4))
        assert "NaN or infinity" in line
    full = {key: tensor.float().clamp(-1, 1).half() for key, tensor in tensors.items()}
    full[name] = torch.full_like(full[name], 65504.0).nan_to_num()
    full[name][::2] *= -1
    save_file(full, path, {"format": "pt"})
    assert "no longer fit" in fails(*base, tmp_path / "out", code=4)
    assert names(tmp_path) == ["large", "source"]


def test_space_is_counted_in_whole_blocks(tmp_path: Path, monkeypatch) -> None:
    class System:
        f_frsize, f_bavail = 4096, 3

    monkeypatch.setattr(os, "statvfs", lambda path: System)
    auxiliary_files.check_space(tmp_path / "out", [1, 4096, 4096], 0)
    with pytest.raises(Exception, match=r"needs 16,384 bytes .* has 12,288: free 4,096 bytes"):
        auxiliary_files.check_space(tmp_path / "out", [1, 4096, 4097], 0)
    auxiliary_files.check_space(tmp_path / "out", [1, 4096, 4097], 4096)
