"""Several processes on one edit: launched by torchrun and accelerate, and when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

HERE = Path(__file__).parents[1] / "support"


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
    # --standalone and port 0: a free port of the system's choice.
    start = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                       "--num_machines", "1", "--machine_rank", "0", "--mixed_precision", "no",
                       "--dynamo_backend", "no", "--main_process_port", "0"],
    }[launcher]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *start, "-m", "abliterate", *command, "-o", str(tmp_path / "out"),
         "--json"],
        capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["tensors"]  # rank 0 alone speaks
    assert tree(tmp_path / "out") == expected
    assert not (tmp_path / "out.partial").exists()


def start_ranks(how: str, arguments: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """Two ranks that meet at a store of this process, as they do under torchrun; no agent is there
    to end them, so that each must come to its own end."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(2):
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, str(HERE / "ranks.py"), how, *arguments],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**os.environ, **environment},
            )
        )  # fmt: skip
    done = []
    for process in processes:
        out, err = process.communicate(timeout=600)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


def one_error(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "unexpected" not in line
    return line


@pytest.mark.parametrize("how", ["1:finish", "0:write"])
def test_a_rank_that_dies_ends_the_other_and_the_work_goes_on(
    how: str, command: list[str], expected: dict[str, bytes], tmp_path: Path
) -> None:
    arguments = [*command, "-o", str(tmp_path / "out")]
    dead = int(how[0])
    done = start_ranks(how, arguments)
    assert done[dead].returncode == -signal.SIGKILL
    line = one_error(done[1 - dead], 4)
    # Which of the two a survivor sees depends on how far the other had come.
    assert "another rank is gone" in line or f"rank {dead} is dead" in line
    assert "run the same command again" in line
    assert not (tmp_path / "out").exists()
    again = start_ranks("none", arguments)
    assert [rank.returncode for rank in again] == [0, 0], again[0].stderr
    assert "going on from" in again[0].stderr  # what the survivor had finished
    assert tree(tmp_path / "out") == expected
    assert not (tmp_path / "out.partial").exists()


def test_an_error_of_one_rank_is_told_to_all(command: list[str], tmp_path: Path) -> None:
    done = start_ranks("1:nan", [*command, "-o", str(tmp_path / "out")])
    assert "tensor 'x' in y.safetensors holds NaN" in one_error(done[1], 4)
    assert "rank 1 failed: tensor 'x' in y.safetensors holds NaN" in one_error(done[0], 4)
    assert not (tmp_path / "out").exists()
