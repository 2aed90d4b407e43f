"""Writing past the page cache gives the bytes that writing through it gives, wherever it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from abliterate.checkpoints.shards import read_shards
from abliterate.editing import matrix_orthogonalization, planning, shard_tasks
from abliterate.editing.edit_plan import EditPlan, TensorEdit
from abliterate.storage import file_io, write_buffers

PAGE, WIDTH = mmap.PAGESIZE, 96


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def edit(monkeypatch, tmp_path: Path, cli) -> Callable[..., bytes]:
    """Edit a file whose writers begin and end amid pages; returns the result's bytes.

    With ``odd`` the header's length leaves the elements unaligned in the file.
    """
    source, made = tmp_path / "source", []
    direction = tmp_path / "direction.safetensors"
    save_file({"direction": random(48, seed=1)}, direction)
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    monkeypatch.setattr(write_buffers, "RUN_BYTES", 5 * PAGE)
    monkeypatch.setattr(shard_tasks, "_EDIT_BYTES", 5 * PAGE)
    monkeypatch.setattr(matrix_orthogonalization, "_BLOCK_ELEMENTS", 1000)
    monkeypatch.setattr(file_io, "_LEAST_DIRECT", PAGE)
    basis = torch.nn.functional.normalize(random(1, WIDTH, seed=2).double())
    tensors = {
        "a": random(400, WIDTH, seed=3).bfloat16(),
        "b": random(7, 3, seed=4).half(),
        "c": random(WIDTH, 300, seed=5).half(),
        "d": random(5, WIDTH, 60, seed=6),
        "e": random(3, WIDTH, seed=7).bfloat16(),
        "f": random(200, WIDTH, seed=8).double(),
    }
    edits = [
        TensorEdit(n, a, basis, "mlp", 0) for n, a in zip("acdef", (1, 0, 1, 1, 1), strict=True)
    ]
    file = source / "model.safetensors"
    plan = lambda *args: EditPlan(read_shards(source), tuple(edits))  # noqa: E731
    monkeypatch.setattr(planning, "make_plan", plan)

    def run(*options: str, odd: bool = False) -> bytes:
        save_file(tensors, file)
        if odd:
            raw = file.read_bytes()
            length = int.from_bytes(raw[:8], "little") + 3
            file.write_bytes(
                length.to_bytes(8, "little") + raw[8 : length + 5] + b"   " + raw[length + 5 :]
            )
        out = tmp_path / f"out{len(made)}"
        made.append(out)
        result = cli("orthogonalize", source, "--direction", direction, "-o", out, *options)
        assert result.code == 0, result.err
        return (out / "model.safetensors").read_bytes()

    return run


@pytest.fixture
def through_cache(edit, monkeypatch) -> bytes:
    with monkeypatch.context() as patch:
        patch.setattr(file_io, "_open_direct", lambda path: None)
        return edit()


Write = Callable[[int, memoryview, int], int]


def patch_direct_writes(monkeypatch, folder: Path, change: Callable[..., int]) -> list[int]:
    """Let ``change`` do those writes; returns their offsets as they come."""
    probe = folder / "probe"
    probe.touch()
    opened = file_io._open_direct(probe)
    if opened is None:
        pytest.skip("this filesystem writes through the page cache only")
    os.close(opened)
    offsets: list[int] = []
    really = os.pwrite

    def pwrite(descriptor: int, content: memoryview, offset: int) -> int:
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            return really(descriptor, content, offset)
        assert offset % PAGE == len(content) % PAGE == 0
        offsets.append(offset)
        return change(really, descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return offsets


def as_asked(write: Write, descriptor: int, content: memoryview, offset: int) -> int:
    return write(descriptor, content, offset)


def one_page(write: Write, descriptor: int, content: memoryview, offset: int) -> int:
    return write(descriptor, content[:PAGE], offset)


def refuse(write: Write, descriptor: int, content: memoryview, offset: int) -> int:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


@pytest.mark.parametrize("change", [as_asked, one_page, refuse])
@pytest.mark.parametrize("jobs", ["1", "3"])
def test_the_bytes_are_those_that_go_through_the_cache(
    change: Callable[..., int], jobs: str, edit, through_cache: bytes, tmp_path: Path, monkeypatch
) -> None:
    offsets = patch_direct_writes(monkeypatch, tmp_path, change)
    assert edit("--jobs", jobs) == through_cache
    assert offsets


def test_blocks_may_be_longer_than_a_run(edit, monkeypatch) -> None:
    monkeypatch.setattr(write_buffers, "RUN_BYTES", 100)
    monkeypatch.setattr(matrix_orthogonalization, "_BLOCK_ELEMENTS", 50_000)
    monkeypatch.setattr(shard_tasks, "_EDIT_BYTES", 1 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(file_io, "_open_direct", lambda path: None)
        patch.setattr(write_buffers, "RUN_BYTES", 1 << 20)
        expected = edit()
    assert edit() == expected


def test_elements_that_are_not_aligned_in_the_file(edit, through_cache: bytes) -> None:
    length = 8 + int.from_bytes(through_cache[:8], "little")
    assert edit(odd=True)[length + 3 :] == through_cache[length:]


def test_a_full_disk_is_told(edit, tmp_path: Path, monkeypatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch_direct_writes(monkeypatch, tmp_path, full)
    with pytest.raises(AssertionError, match="No space left on device; 0 finished shards kept"):
        edit()
