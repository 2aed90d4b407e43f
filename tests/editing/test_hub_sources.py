"""Hub ids as sources, with --low-disk and without, through the real client over loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import Commands, failure
from hub_server import COMMIT, Hub
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def direction(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    vector = torch.randn(48, generator=torch.Generator().manual_seed(2))
    save_file({"direction": vector}, path)
    return path


@pytest.fixture
def hub(hub_place, tiny) -> Iterator[Hub]:
    hub, _, cache = hub_place
    hub.clear()
    hub.branches = {}
    hub.models = {"org/tied": tiny("qwen2", True), "org/untied": tiny("llama", True)}
    hub.stalled.clear()
    hub.go_on.clear()
    yield hub
    hub.go_on.set()
    hub.stall = hub.broken = hub.gone = None
    hub.ranges = True
    shutil.rmtree(cache / "hub", ignore_errors=True)


@pytest.fixture
def run(hub_place) -> Commands:
    return hub_place[1]


@pytest.fixture
def cache(hub_place) -> Path:
    return hub_place[2] / "hub"


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but the record and the card, which name the source."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("abliterate.json", "README.md")
    }


def tensors(folder: Path) -> list[dict]:
    return json.loads((folder / "abliterate.json").read_text())["tensors"]


def shards_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("model", ["org/tied", "org/untied"])
def test_low_disk_gives_the_same_bytes_and_keeps_no_shard(
    model: str, hub: Hub, run: Commands, cache: Path, direction: Path, tmp_path: Path
) -> None:
    base = ("--direction", direction, "-o")
    assert run("orthogonalize", hub.models[model], *base, tmp_path / "local").code == 0
    done = run("orthogonalize", model, "--low-disk", *base, tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert tree(tmp_path / "out") == tree(tmp_path / "local")
    assert tensors(tmp_path / "out") == tensors(tmp_path / "local")
    assert done.json["source"] == {"id": model, "revision": COMMIT}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local", "out"]
    assert shards_in(cache) == []
    # Each came once and whole; before that only headers were read.
    weights = [name for name in hub.downloads() if name.endswith(".safetensors")]
    assert sorted(weights) == shards_in(hub.models[model])


def test_low_disk_edits_by_layer(hub: Hub, run: Commands, cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    rows = torch.randn(4, 48, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    rows[2] = 0
    save_file({"directions": rows}, path)
    base = ("--direction", path, "-o")
    assert run("orthogonalize", hub.models["org/tied"], *base, tmp_path / "local").code == 0
    done = run("orthogonalize", "org/tied", "--low-disk", *base, tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert {one["layer"] for one in done.json["tensors"]} == {None, 0, 1, 3}
    assert tree(tmp_path / "out") == tree(tmp_path / "local")
    assert tensors(tmp_path / "out") == tensors(tmp_path / "local")
    assert shards_in(cache) == []


def test_what_was_cached_before_is_used_and_stays(
    hub: Hub, run: Commands, cache: Path, direction: Path, tmp_path: Path
) -> None:
    base = ("--direction", direction, "-o")
    assert run("orthogonalize", "org/untied", *base, tmp_path / "whole").code == 0
    everything = shards_in(cache)
    assert everything == shards_in(hub.models["org/untied"])
    hub.requests.clear()
    done = run("orthogonalize", "org/untied", "--low-disk", *base, tmp_path / "cached")
    assert done.code == 0, done.err
    assert not [name for name in hub.downloads() if name.endswith(".safetensors")]
    # Two are lost: these alone are fetched, and only these are dropped again.
    for name in everything[1:3]:
        (link,) = cache.rglob(name)
        link.resolve().unlink()
        link.unlink()
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    done = run("orthogonalize", "org/untied", "--low-disk", *base, tmp_path / "mixed")
    assert done.code == 0, done.err
    fetched = [name for name in hub.downloads() if name.endswith(".safetensors")]
    assert sorted(fetched) == everything[1:3]
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == kept
    assert tree(tmp_path / "whole") == tree(tmp_path / "cached") == tree(tmp_path / "mixed")


@pytest.mark.parametrize("stopped_by", [signal.SIGKILL, signal.SIGINT])
def test_stopped_midway_it_goes_on_from_the_finished_shards(
    stopped_by: signal.Signals, hub: Hub, run: Commands, cache: Path, direction: Path,
    tmp_path: Path
) -> None:  # fmt: skip
    command = ("orthogonalize", "org/tied", "--low-disk", "--direction", direction, "-o")
    assert run(*command, tmp_path / "whole").code == 0
    order = [name for name in hub.downloads() if name.endswith(".safetensors")]
    shutil.rmtree(cache)
    hub.requests.clear()
    hub.stall = order[4]
    pid = run.start(*command, tmp_path / "out")
    assert hub.stalled.wait(300)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    while journal.read_bytes().count(b'"shard"') < 4:  # the fourth is edited meanwhile
        os.sched_yield()
    os.kill(pid, stopped_by)
    if stopped_by == signal.SIGINT:
        # The download is given up at its next piece.
        hub.go_on.set()
    done = run.wait()
    hub.go_on.set()
    if stopped_by == signal.SIGINT:
        assert "4 finished shards kept" in failure(done, 130)
    assert not (tmp_path / "out").exists()
    hub.stall = None
    hub.requests.clear()
    done = run(*command, tmp_path / "out")
    assert done.code == 0, done.err
    assert "going on from 4 finished shards" in done.err
    again = [name for name in hub.downloads() if name.endswith(".safetensors")]
    assert set(again) <= set(order[4:])
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_shard_that_vanishes_is_one_line_and_resumable(
    hub: Hub, run: Commands, direction: Path, tmp_path: Path
) -> None:
    command = ("orthogonalize", "org/tied", "--low-disk", "--direction", direction, "-o")
    assert run(*command, tmp_path / "whole").code == 0
    order = [name for name in hub.downloads() if name.endswith(".safetensors")]
    hub.gone = order[-1]
    line = run.fails(*command, tmp_path / "out", code=4)
    assert f"model 'org/tied/{order[-1]}' is not there on the hub (404)" in line
    assert f"{len(order) - 1} finished shards kept" in line
    hub.gone, hub.broken = None, order[-1]  # a lost connection: the client goes on by itself
    done = run(*command, tmp_path / "out")
    assert done.code == 0, done.err
    assert hub.broken is None
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_hub_without_the_shard_or_without_ranges(
    hub: Hub, run: Commands, direction: Path, tmp_path: Path
) -> None:
    command = ("orthogonalize", "org/broken", "--low-disk", "--direction", direction, "-o")
    source = tmp_path / "source"
    shutil.copytree(hub.models["org/untied"], source)
    hub.models["org/broken"] = source
    hub.ranges = False
    assert "leave out --low-disk" in run.fails(*command, tmp_path / "out", code=4)
    hub.ranges = True
    victim = source / shards_in(source)[1]
    raw = victim.read_bytes()
    victim.write_bytes(raw[:-2])
    assert "should have" in run.fails(*command, tmp_path / "out", code=4)
    victim.unlink()
    line = run.fails(*command, tmp_path / "out", code=4)
    assert f"shard org/broken/{victim.name} is missing" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_what_low_disk_does_not_go_with(
    hub: Hub, run: Commands, tiny, direction: Path, tmp_path: Path
) -> None:
    command = ("--low-disk", "--direction", direction, "-o", tmp_path / "out")
    line = run.fails("orthogonalize", tiny("llama"), *command, code=2)
    assert "is a folder, which is never deleted" in line
    line = run.fails("orthogonalize", "org/untied", "--as-lora", *command, code=2)
    assert "--as-lora" in line
    line = run.fails("orthogonalize", "org/nobody", *command, code=4)
    assert "model 'org/nobody' does not exist on the hub" in line
    line = run.fails("orthogonalize", "org/untied", "--revision", "no-such", *command, code=4)
    assert "model 'org/untied' has no revision 'no-such'" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tied", [False, True])
def test_the_disk_needs_room_for_the_output_alone(
    tied: bool, hub: Hub, run: Commands, cache: Path, direction: Path, tmp_path: Path
) -> None:
    """On a filesystem as large as the output and what the check leaves for record and card."""
    source, small = tmp_path / "source", tmp_path / "small"
    plain = hub.models["org/tied" if tied else "org/untied"]
    model = AutoModelForCausalLM.from_pretrained(plain)
    model.save_pretrained(source, max_shard_size="150KB")
    sizes = [path.stat().st_size for path in source.glob("*.safetensors")]
    assert len(sizes) >= 3
    hub.models["org/large"] = source
    base = ("--direction", direction, "-o")
    assert run("orthogonalize", source, *base, tmp_path / "local").code == 0
    blocks = sum(p.stat().st_blocks * 512 for p in (tmp_path / "local").rglob("*") if p.is_file())
    small.mkdir()
    room = blocks + (90 << 10)
    assert room < blocks + max(sizes)  # for one shard more there is no room
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(small)]
    mounted = subprocess.run(mounting, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no filesystem can be mounted: {mounted.stderr.strip()}")
    try:
        done = run("orthogonalize", "org/large", "--low-disk", *base, small / "out")
        assert done.code == 0, done.err
        assert tree(small / "out") == tree(tmp_path / "local")
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert shards_in(cache) == []


@pytest.mark.parametrize("low_disk", [(), ("--low-disk",)])
def test_repositories_without_safetensors_say_what_they_hold(
    low_disk: tuple[str, ...], hub: Hub, run: Commands, direction: Path, tmp_path: Path
) -> None:
    files = {
        "org/gguf": ("README.md", "Q4/model.Q4_K_M.gguf"),
        "org/pickle": ("config.json", "pytorch_model-00001-of-00002.bin"),
        "org/both": ("config.json", "pytorch_model.bin", "model.gguf"),
        "org/none": ("config.json", "README.md"),
        "org/onnx": ("config.json", "onnx/model.onnx"),
        "org/old": ("config.json", "pytorch_model.bin", "tf_model.h5", "onnx/model.onnx"),
        "org/vino": ("config.json", "openvino_model.bin", "openvino_model.xml"),
        "org/image": ("model_index.json", "unet/diffusion_pytorch_model.safetensors"),
    }
    for model, names in files.items():
        hub.models[model] = tmp_path / model
        for name in names:
            (tmp_path / model / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / model / name).write_text("{}")
    command = (*low_disk, "--direction", direction, "-o", tmp_path / "out")
    hub.requests.clear()
    for model, said in {
        "org/gguf": "org/gguf holds GGUF weights (Q4/model.Q4_K_M.gguf)",
        "org/pickle": "org/pickle holds pickle weights (pytorch_model-00001-of-00002.bin)",
        "org/both": "GGUF",
        "org/none": "org/none has no .safetensors weights",
        "org/onnx": "org/onnx holds ONNX weights (onnx/model.onnx)",
        "org/old": "org/old holds pickle weights (pytorch_model.bin)",
        "org/vino": "org/vino holds OpenVINO weights (openvino_model.bin)",
        "org/image": "org/image holds a diffusers pipeline (model_index.json)",
    }.items():
        assert said in run.fails("orthogonalize", model, *command, code=4)
    assert hub.requests == []  # seen from the list of files alone
