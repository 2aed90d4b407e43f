"""Every stage where what Windows lacks is missing: the same bytes as with it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Done, failure
from hub_server import hub_server
from safetensors.torch import save_file

from abliterate.cli.app import main
from abliterate.resources import demo_model_dir
from abliterate.storage.locks import hold_folder

SCRIPT = Path(__file__).with_name("support") / "without_posix.py"
SMALL = ("--n-train", "8", "--no-filter", "--batch-size", "8")

SHORT = ("--n-test", "2", "--max-new-tokens", "3")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("windows")


@pytest.fixture(scope="module")
def windows(place: Path, tiny) -> Iterator[subprocess.Popen[str]]:
    """Commands in one process without those names; the hub is a folder of tiny models."""
    with hub_server() as hub:
        hub.models = {"org/tied": tiny("qwen2", True), "org/untied": tiny("llama", True)}
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(place / "home"),
            "HF_HUB_CACHE": str(place / "home" / "hub"),
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "*",
        }
        with subprocess.Popen(
            [sys.executable, str(SCRIPT), str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        ) as process:
            yield process
            assert process.stdin is not None
            process.stdin.close()


def here(capfd: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str]:
    capfd.readouterr()
    code = main(list(map(str, args)))
    return code, capfd.readouterr().out


def there(windows: subprocess.Popen[str], *args: str | Path) -> Done:
    assert windows.stdin is not None
    assert windows.stdout is not None
    windows.stdin.write(json.dumps(list(map(str, args))) + "\n")
    windows.stdin.flush()
    return Done(**json.loads(windows.stdout.readline()))


def stages(model: Path, run: Path) -> list[tuple[str | Path, ...]]:
    made = run / "model"
    return [
        ("extract", model, "-o", run, *SMALL, "--save-activations"),
        ("select", run, "--n-val", "4", "--batch-size", "8"),
        ("inspect", run),
        ("orthogonalize", model, "--direction", run, "-o", made),
        ("orthogonalize", model, "--direction", run, "-o", made, "--overwrite", "--scale", "0.5"),
        ("orthogonalize", model, "--direction", run, "-o", made, "--overwrite"),
        ("verify", made, "--source", model, "--direction", run, "--forward"),
        (
            "evaluate",
            model,
            "--direction",
            run,
            "--checkpoint",
            made,
            "--n-test",
            "2",
            "--max-new-tokens",
            "3",
        ),
        ("audit", made, "--base", model),
        ("report", run, "-o", run / "report.html"),
    ]


def content(folder: Path) -> dict[str, Any]:
    """Every file, with what the clock says left out."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        raw = re.sub(rb", [\d.]+ s, inputs", b", inputs", path.read_bytes())
        name = path.relative_to(folder).as_posix()
        found[name] = timeless(json.loads(raw)) if path.suffix == ".json" else raw
    return found


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k != "seconds"}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def test_every_stage_gives_the_same_bytes(
    windows: subprocess.Popen[str], place: Path, capfd
) -> None:
    run, seen = place / "run", list[list[tuple[str, int, str]]]()
    for name in ("posix", "windows"):  # under one name in turn, which some records hold
        seen.append([])
        for command in stages(demo_model_dir(), run):
            if name == "posix":
                code, out = here(capfd, *command, "--json")
            else:
                done = there(windows, *command, "--json")
                code, out = done.code, done.out
                assert code in (0, 7), (command, done.err)
            told = out if command[0] in ("verify", "audit") else ""
            seen[-1].append((str(command[0]), code, told))
        run.rename(place / name)
    for one, other in zip(*seen, strict=True):
        assert one == other
    assert [code for _, code, _ in seen[1]] == [0] * 8 + [7, 0]
    one, other = content(place / "posix"), content(place / "windows")
    assert one.keys() == other.keys()
    assert {"directions.safetensors", "direction.safetensors", "report.html",
            "model/model.safetensors"} <= one.keys()  # fmt: skip
    for name in one:
        assert one[name] == other[name], name
    assert not list(place.rglob("*.partial"))


def test_a_model_read_layer_by_layer_gives_the_same_direction(
    windows: subprocess.Popen[str], place: Path, capfd
) -> None:
    for name in ("offload-posix", "offload-windows"):
        command = ("extract", demo_model_dir(), "-o", place / name, *SMALL, "--offload")
        if name == "offload-posix":
            assert here(capfd, *command)[0] == 0
        else:
            done = there(windows, *command)
            assert done.code == 0, done.err
    one, other = (
        (place / name / "directions.safetensors").read_bytes()
        for name in ("offload-posix", "offload-windows")
    )
    assert one == other


def test_low_disk_gives_the_same_bytes(
    windows: subprocess.Popen[str], place: Path, tiny, capfd
) -> None:
    direction = place / "direction.safetensors"
    vector = torch.randn(48, generator=torch.Generator().manual_seed(2))
    save_file({"direction": vector}, direction)
    for name, kind in (("org/tied", "qwen2"), ("org/untied", "llama")):
        one, other = place / f"{kind}-posix", place / f"{kind}-windows"
        command = ("orthogonalize", tiny(kind, True), "--direction", direction, "-o", one)
        assert here(capfd, *command)[0] == 0
        command = ("orthogonalize", name, "--low-disk", "--direction", direction, "-o", other)
        done = there(windows, *command)
        assert done.code == 0, done.err
        shards = sorted(path.name for path in one.glob("*.safetensors"))
        assert len(shards) > 2
        for shard in shards:
            assert (one / shard).read_bytes() == (other / shard).read_bytes()
    assert not list(place.rglob("*.partial"))


def test_a_second_process_is_kept_out(windows: subprocess.Popen[str], place: Path) -> None:
    """The lock is a file there: its text is what says that it is held."""
    run = place / "held"
    with hold_folder(run, "evaluate"):
        (run / ".abliterate.lock").write_text("held by a lock that is a file")
        done = there(windows, "extract", demo_model_dir(), "-o", run, *SMALL)
    assert "in use by another process: `abliterate evaluate`" in failure(done, 3)
