"""Every stage where what Windows lacks is missing: the same bytes as with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Commands
from hub_server import hub_server

from abliterate.cli.app import main
from abliterate.resources import demo_model_dir

SCRIPT = Path(__file__).with_name("support") / "without_posix.py"
SMALL = ("--n-train", "8", "--no-filter", "--batch-size", "8")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("windows")


@pytest.fixture(scope="module")
def windows(place: Path, tiny) -> Iterator[Commands]:
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
            yield Commands(process)
            assert process.stdin is not None
            process.stdin.close()


def here(*args: str | Path) -> None:
    assert main([*map(str, args), "--quiet"]) == 0


def there(windows: Commands, *args: str | Path) -> Any:
    # Commands.wait: this server's commands have no process of their own to tell the id of.
    assert windows._process.stdin is not None
    windows._process.stdin.write(json.dumps(list(map(str, args))) + "\n")
    windows._process.stdin.flush()
    return windows.wait()


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
        ("evaluate", run, "--checkpoint", made, "--n-test", "2", "--max-new-tokens", "3"),
        ("audit", made, "--base", model, "-o", run / "audit.json"),
        ("report", run, "-o", run / "report.html"),
    ]


def content(folder: Path) -> dict[str, Any]:
    """Every file, with the folder's own name and what the clock says left out."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        raw = path.read_bytes().replace(str(folder).encode(), b"RUN")
        name = path.relative_to(folder).as_posix()
        found[name] = timeless(json.loads(raw)) if path.suffix == ".json" else raw
    return found


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "inputs")}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def test_every_stage_gives_the_same_bytes(windows: Commands, place: Path) -> None:
    model = demo_model_dir()
    for mine, theirs in zip(
        stages(model, place / "posix"), stages(model, place / "windows"), strict=True
    ):
        here(*mine)
        done = there(windows, *theirs)
        assert done.code == 0, (theirs[0], done.err)
    one, other = content(place / "posix"), content(place / "windows")
    assert one.keys() == other.keys()
    assert {"directions.safetensors", "direction.safetensors", "report.html", "audit.json",
            "model/model.safetensors"} <= one.keys()  # fmt: skip
    assert [name for name in one if one[name] != other[name]] == []
    assert not list(place.rglob("*.partial"))


def test_a_model_read_layer_by_layer_gives_the_same_direction(
    windows: Commands, place: Path
) -> None:
    for name in ("offload-posix", "offload-windows"):
        command = ("extract", demo_model_dir(), "-o", place / name, *SMALL, "--offload")
        if name == "offload-posix":
            here(*command)
        else:
            done = there(windows, *command)
            assert done.code == 0, done.err
    one, other = (
        (place / name / "directions.safetensors").read_bytes()
        for name in ("offload-posix", "offload-windows")
    )
    assert one == other
