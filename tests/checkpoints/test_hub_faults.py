"""The hub as it is: faults that pass, reasons, and no more asked for than a command takes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from commands import Commands
from hub_server import Fault, Hub
from packaging.version import Version
from safetensors.torch import save_file

from abliterate.hub.patience import retry_after
from abliterate.hub.reasons import explain, short

AT_ONCE = {"Retry-After": "0"}
# Earlier clients take the names of the files from what they are told of the repository.
ASKS_FOR_TREE = Version(huggingface_hub.__version__) >= Version("2.0")


@pytest.fixture
def hub(hub_place, tiny) -> Iterator[Hub]:
    hub, _, cache = hub_place
    hub.clear()
    hub.branches = {}
    hub.models = {"org/model": tiny("llama"), "org/parts": tiny("qwen2", True)}
    yield hub
    for folder in cache.iterdir():
        shutil.rmtree(folder)


@pytest.fixture
def run(hub_place) -> Commands:
    return hub_place[1]


@pytest.fixture
def cache(hub_place) -> Path:
    return hub_place[2]


@pytest.fixture(scope="module")
def direction(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    vector = torch.randn(48, generator=torch.Generator().manual_seed(2))
    save_file({"direction": vector}, path)
    return path


def _edit(direction: Path, out: Path, *options: str) -> tuple[str | Path, ...]:
    return ("orthogonalize", *options, "--direction", direction, "-o", out)


def _shards(hub: Hub) -> list[str]:
    return sorted({name for name in hub.downloads() if name.endswith(".safetensors")})


def test_one_fault_of_each_request_is_asked_for_again_and_said(
    hub: Hub, run: Commands, direction: Path, tmp_path: Path
) -> None:
    hub.faults = [
        Fault("GET /api/models/org/parts(?!.*tree)", 429, AT_ONCE, 1),
        Fault("HEAD .*/config.json", 500, AT_ONCE, 1),
        Fault("GET .*/model-00002.*safetensors", 500, AT_ONCE, 1),
    ]
    if ASKS_FOR_TREE:
        hub.faults.append(Fault("GET /api/models/.*/tree", 503, AT_ONCE, 1))
    done = run(*_edit(direction, tmp_path / "out", "org/parts"))
    assert done.code == 0, done.err
    assert all(fault.count == 0 for fault in hub.faults)
    for status in (429, 500):
        assert f"model 'org/parts': the hub answers {status}: asking again in 0 s" in done.err
    client = "the hub cannot now: asking again in 1.0 s (1 of 5)" in done.err  # by itself
    assert client == ASKS_FOR_TREE
    # The same of parts of files, and of a shard that is fetched by itself.
    hub.clear()
    hub.models["org/other"] = hub.models["org/parts"]
    hub.faults = [Fault("GET .*safetensors", 503, AT_ONCE, 1)]
    assert run("writers", "org/other", "--json").code == 0
    assert hub.faults[0].count == 0
    hub.faults = [
        Fault("GET /api/models/org/other", 500, AT_ONCE, 2),
        Fault("GET .*/model-00001.*safetensors", 503, AT_ONCE, 1),
    ]
    done = run(*_edit(direction, tmp_path / "low", "org/other", "--low-disk"))
    assert done.code == 0, done.err
    assert "asking again in 0 s (2 of 4)" in done.err
    assert all(fault.count == 0 for fault in hub.faults)


def test_one_fault_of_a_data_sets_requests_is_asked_for_again(
    hub: Hub, run: Commands, tmp_path: Path
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"goal": "Bake a cake"}\n{"goal": "Paint a door"}\n')
    hub.models["datasets/org/rows"] = folder
    hub.faults = [
        Fault("/api/datasets/org/rows", 429, AT_ONCE, 1),
        Fault("GET .*/train.jsonl", 503, AT_ONCE, 1),
    ]
    done = run("prompts", "org/rows", "--json")
    assert done.code == 0, done.err
    assert done.json["splits"]["all"]["prompts"] == 2
    assert all(fault.count == 0 for fault in hub.faults)
    assert "dataset 'org/rows': the hub answers 429: asking again" in done.err


def test_a_fault_that_stays_keeps_the_finished_files(
    hub: Hub, run: Commands, direction: Path, tmp_path: Path
) -> None:
    hub.faults = [Fault("GET .*/model-00002.*safetensors", 503, AT_ONCE)]
    line = run.fails(*_edit(direction, tmp_path / "out", "org/parts"), code=4)
    assert "the hub answers 503" in line
    assert line.endswith("finished files are kept: the same command fetches the rest")
    hub.clear()
    assert run(*_edit(direction, tmp_path / "out", "org/parts")).code == 0
    assert "model-00001" not in " ".join(_shards(hub))
    assert any("model-00002" in name for name in _shards(hub))


def test_a_long_wait_is_the_users_to_decide(hub: Hub, run: Commands) -> None:
    hub.faults = [Fault("/api/models", 429, {"Retry-After": "3600"})]
    assert "the hub answers 429, too many requests" in run.fails("plan", "org/model", code=4)
    assert sum("/api/models" in path for path in hub.paths) == 1
    assert retry_after({"Retry-After": "7"}) == 7
    assert retry_after({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert retry_after({}) is retry_after({"Retry-After": "soon"}) is None


def test_a_complete_cache_serves_where_the_hub_does_not(
    hub: Hub, run: Commands, cache: Path, direction: Path, tmp_path: Path
) -> None:
    assert run(*_edit(direction, tmp_path / "first", "org/parts")).code == 0
    hub.clear()
    hub.faults = [Fault(".", 500, AT_ONCE)]
    for number, options in enumerate([(), ("--low-disk",)]):
        out = tmp_path / f"out{number}"
        done = run(*_edit(direction, out, "org/parts", *options))
        assert done.code == 0, done.err
        assert "the hub answers 500" in done.err
        assert "going on with the cache's copy of commit 0123456789abcdef" in done.err
        for shard in (tmp_path / "first").glob("*.safetensors"):
            assert (out / shard.name).read_bytes() == shard.read_bytes()
    # A cache that lacks a shard, or never had this branch, serves nothing.
    assert run(*_edit(direction, tmp_path / "no", "org/parts@dev")).code == 4
    (shard,) = cache.rglob("model-00002*.safetensors")
    shard.unlink()
    line = run.fails(*_edit(direction, tmp_path / "no", "org/parts"), code=4)
    assert "the hub answers 500" in line


def test_each_reason_has_its_own_line(hub: Hub, run: Commands) -> None:
    hub.gated = {"org/model"}
    page = f"{hub.url}/org/model"
    line = run.fails("writers", "org/model", code=4)
    assert f"model 'org/model' is gated: accept its terms at {page}, then log in" in line
    token = {"HF_TOKEN": "hf_of_somebody"}
    line = run.fails("writers", "org/model", code=4, environment=token)
    assert "the account of your token has no access" in line
    assert page in line
    assert "org/none' does not exist on the hub" in run.fails("plan", "org/none", code=4)
    line = run.fails("plan", "org/parts", "--revision", "v9", code=4)
    assert "model 'org/parts' has no revision 'v9'" in line
    said = {"X-Error-Message": "Invalid credentials in Authorization header"}
    hub.faults = [Fault("/api/", 401, said)]
    line = run.fails("plan", "org/parts", code=4, environment=token)
    assert "the hub refuses your token, which is invalid or has expired" in line
    hub.faults = [Fault("/api/", 403)]
    assert "the hub denies access (403)" in run.fails("plan", "org/parts", code=4)
    proxy = {"http_proxy": "http://user:hush@127.0.0.1:9", "NO_PROXY": "", "no_proxy": ""}
    line = run.fails("plan", "org/parts", code=4, environment=proxy)
    assert "the proxy http://127.0.0.1:9" in line or "through the proxy http://127.0.0.1:9" in line
    assert "hush" not in line


def test_an_endpoint_that_does_not_answer_is_named(tmp_path: Path) -> None:
    environment = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "*",
    }
    command = [sys.executable, "-m", "abliterate", "plan", "org/model"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 4, done.stderr
    assert "asking again in 1 s (1 of 2)" in done.stderr
    assert "http://127.0.0.1:9 does not answer" in done.stderr.splitlines()[-1]


def test_what_the_disk_refuses_is_told_beforehand_or_by_its_folder(
    hub: Hub, run: Commands, tmp_path: Path
) -> None:
    hub.announced = {"model.safetensors": 10**15}
    line = run.fails("extract", "org/model", "-o", tmp_path / "run", code=4)
    assert "model 'org/model' needs 1000000.0 GB more in the hub's cache" in line
    assert "set HF_HOME to a larger one" in line
    assert hub.requests == []
    full = OSError(errno.ENOSPC, "No space left on device", "/cache/blobs/x")
    assert "the disk of /cache/blobs/x is full" in str(explain(full, "org/m", None, "model"))
    locked = OSError(errno.EROFS, "Read-only file system", "/cache")
    assert "/cache cannot be written" in str(explain(locked, "org/m", None, "model"))


def test_no_signed_address_and_no_half_word_in_a_reason() -> None:
    text = "Bad answer of https://cdn/file?X-Amz-Signature=abc&x=1 for https://cdn/b?sig=2, why"
    assert short(ValueError(text)) == "Bad answer of https://cdn/file for https://cdn/b why"
    long = short(ValueError("word " * 100))
    assert long.endswith("word ...")
    assert len(long) <= 200


def _repository(root: Path, name: str, files: dict[str, str]) -> Path:
    folder = root / name
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    return folder


def test_the_wrong_kind_of_repository_is_refused_by_every_command(
    hub: Hub, run: Commands, tiny, direction: Path, tmp_path: Path
) -> None:
    adapter = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/its-base"})
    kinds = {
        "gguf": ({"model.gguf": "", "README.md": ""}, "holds GGUF weights (model.gguf)"),
        "pickle": ({"config.json": "{}", "pytorch_model.bin": ""}, "holds pickle weights"),
        "meta": ({"config.json": "{}", "original/consolidated.00.pth": ""}, "holds pickle weights"),
        "adapter": (
            {
                "adapter_config.json": adapter,
                "adapter_model.safetensors": "",
                "training_args.bin": "",
            },
            "holds a PEFT adapter and no model: give its base 'org/its-base'",
        ),
        "mistral": (
            {"config.json": "{}", "consolidated.safetensors": ""},
            "holds consolidated weights (consolidated.safetensors)",
        ),
        "bare": ({"model.safetensors": ""}, "has no config.json"),
        "empty": ({"README.md": ""}, "has no .safetensors weights and no config.json"),
    }
    out = tmp_path / "out"
    commands: dict[str, tuple[str | Path, ...]] = {
        "plan": (),
        "writers": (),
        "extract": ("-o", out),
        "orthogonalize": ("--direction", direction, "-o", out),
        "run": ("-o", out),
        "audit": (),
        "diff": (tiny("llama"),),
        "chat": (),
        "evaluate": ("-o", out),
    }
    for name, (files, said) in kinds.items():
        hub.models[f"org/{name}"] = _repository(tmp_path / "repositories", name, files)
        # All commands by one kind, all kinds by two commands.
        asked = commands if name == "mistral" else ("plan", "extract")
        for command in asked:
            line = run.fails(command, f"org/{name}", *commands[command], code=4)
            assert f"org/{name} {said}" in line
            assert "snapshots" not in line
    assert {name for _, name, _ in hub.requests} <= {"adapter_config.json"}
    assert not out.exists()
    # A folder is told the same way.
    shutil.copytree(tiny("llama"), tmp_path / "folder")
    os.rename(tmp_path / "folder/model.safetensors", tmp_path / "folder/consolidated.safetensors")
    line = run.fails("extract", tmp_path / "folder", "-o", out, code=4)
    assert "holds consolidated weights" in line
    line = run.fails("plan", tmp_path / "repositories/adapter", code=4)
    assert "give its base 'org/its-base'" in line


def test_only_what_a_command_takes_is_fetched(
    hub: Hub, run: Commands, tiny, direction: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cluttered"
    shutil.copytree(tiny("llama"), folder)
    clutter = ("fp16/model.safetensors", "optimizer.pkl", "figure.png", "talk.mp4",
               "checkpoint-9/optimizer.pt", "consolidated.safetensors", "model.gguf")  # fmt: skip
    _repository(tmp_path, "cluttered", dict.fromkeys(clutter, "x" * 100))
    hub.models["org/cluttered"] = folder
    for command in ("plan", "writers"):
        done = run(command, "org/cluttered", "--json")
        assert done.code == 0, done.err
        local = run(command, folder, "--json")
        if command == "writers":
            assert done.json == local.json
        else:
            assert done.json["bytes_on_disk"] == local.json["bytes_on_disk"]
    assert not set(hub.downloads()) & {*clutter, "model.safetensors", "tokenizer.json"}
    assert [part for _, name, part in hub.requests if name == "model.safetensors"]
    hub.clear()
    asked = ("--no-filter", "--refusal-token", "I", "--n-train", "2", "--positions", "last", "-q")
    assert run("extract", "org/cluttered", "-o", tmp_path / "run", *asked).code == 0
    assert "model.safetensors" in hub.downloads()
    assert not set(hub.downloads()) & set(clutter)


def test_a_server_without_ranges_is_left_before_it_sends_a_shard(
    hub: Hub, run: Commands, tmp_path: Path
) -> None:
    folder = tmp_path / "large"
    shutil.copytree(hub.models["org/model"], folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(48 << 20)
    hub.models["org/large"] = folder
    hub.ranges = False
    line = run.fails("writers", "org/large", code=4)
    assert "the hub's server gives no part of a file" in line
    assert hub.cut == 1
