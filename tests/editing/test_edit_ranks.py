"""Several processes on one edit: launched by torchrun and accelerate, and when one of them dies."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from launching import Ended, accelerate_launch, each_rank, torchrun
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def direction(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    vector = torch.randn(48, generator=torch.Generator().manual_seed(0))
    save_file({"direction": vector}, path)
    return path


@pytest.fixture(scope="module")
def command(tiny, direction: Path) -> list[str]:
    return ["orthogonalize", str(tiny("qwen2", True)), "--direction", str(direction)]


@pytest.fixture(scope="module")
def expected(command: list[str], tmp_path_factory) -> dict[str, bytes]:
    from abliterate.cli.app import main

    out = tmp_path_factory.mktemp("whole") / "out"
    assert main([*command, "-o", str(out), "-q"]) == 0
    return tree(out)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_ranks_split_the_shards(
    launcher: str, command: list[str], expected: dict[str, bytes], tmp_path: Path
) -> None:
    args, env = (*command, "-o", tmp_path / "out", "--json"), {"HF_HOME": str(tmp_path / "home")}
    if launcher == "torchrun":
        # The one that starts its ranks as a user's launcher does, each importing all by itself.
        done = torchrun(2, "-m", "abliterate", *args, env=env, cold=True)
    else:
        done = accelerate_launch(2, "-m", "abliterate", *args, env=env)
    assert done.code == 0, done.err[-2000:]
    assert json.loads(done.out)["tensors"]  # rank 0 alone speaks
    assert tree(tmp_path / "out") == expected
    assert not (tmp_path / "out.partial").exists()


def one_error(ended: Ended, code: int) -> str:
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    (line,) = ended.errors
    assert "unexpected" not in line
    return line


@pytest.mark.parametrize(("dead", "moment"), [(1, "finish"), (0, "1")])
def test_a_rank_that_dies_ends_the_other_and_the_work_goes_on(
    dead: int, moment: str, command: list[str], expected: dict[str, bytes], tmp_path: Path
) -> None:
    arguments = [*command, "-o", str(tmp_path / "out")]
    ended = each_rank(2, *arguments, env={"FAULT": f"{dead} {moment} kill"})
    assert ended[dead].code == -signal.SIGKILL
    line = one_error(ended[1 - dead], 4)
    # Which of the two a survivor sees depends on how far the other had come.
    assert "another rank is gone" in line or f"rank {dead} is dead" in line
    assert "run the same command again" in line
    assert not (tmp_path / "out").exists()
    again = each_rank(2, *arguments)
    assert [rank.code for rank in again] == [0, 0], again[0].err
    assert "going on from" in again[0].err  # what the survivor had finished
    assert tree(tmp_path / "out") == expected
    assert not (tmp_path / "out.partial").exists()


def test_an_error_of_one_rank_is_told_to_all(command: list[str], tmp_path: Path) -> None:
    ended = each_rank(2, *command, "-o", tmp_path / "out", env={"FAULT": "1 1 raise"})
    assert "the disk of this rank is on fire" in one_error(ended[1], 3)
    assert "rank 1 failed: the disk of this rank is on fire" in one_error(ended[0], 4)
    assert not (tmp_path / "out").exists()


def test_ranks_edit_by_layer(tiny, tmp_path: Path) -> None:
    from abliterate.cli.app import main

    rows = torch.randn(4, 48, generator=torch.Generator().manual_seed(4))
    save_file({"directions": rows}, tmp_path / "set.safetensors")
    command = ["orthogonalize", str(tiny("qwen2", True)), "--direction",
               str(tmp_path / "set.safetensors"), "-o"]  # fmt: skip
    assert main([*command, str(tmp_path / "whole"), "-q"]) == 0
    ended = each_rank(2, *command, tmp_path / "out")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
