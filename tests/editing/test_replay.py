"""``orthogonalize --direction OUT/abliterate.json``: an edit again, from its record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

HALF = torch.bfloat16


@pytest.fixture(scope="module")
def direction(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    # Far from unit length: what is added is not normalised.
    vector = 7 * torch.randn(48, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    save_file({"direction": vector}, path, {"layer": "2", "position": "-1"})
    return path


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("kind", "sharded", "dtype", "options"),
    [
        ("llama", True, torch.float32, ()),
        ("qwen2", False, HALF, ("--scale", "0.7", "--layers", "1-2", "--components", "mlp")),
        ("qwen2", False, torch.float32, ("--tied-embeddings", "share", "--norm-preserve")),
        ("llama-bias", False, torch.float32, ("--add", "1.5")),
        ("llama", False, torch.float32, ("--as-lora",)),
    ],
)
def test_an_edit_is_repeated_from_its_record(
    kind: str, sharded: bool, dtype, options, tiny, cli, direction: Path, tmp_path: Path
) -> None:
    source = tiny(kind, sharded, dtype)
    first, again = tmp_path / "first", tmp_path / "again"
    made = cli("orthogonalize", source, "--direction", direction, "-o", first, *options)
    assert made.code == 0, made.err
    record = first / "abliterate.json"
    result = cli("orthogonalize", source, "--direction", record, "-o", again)
    assert result.code == 0, result.err
    assert "last bits" not in result.err
    assert _bytes(again) == _bytes(first)
    plain = cli("orthogonalize", source, "--direction", direction, "-o", tmp_path / "plain")
    assert plain.code == 0
    if options:  # else nothing was repeated
        assert _bytes(tmp_path / "plain") != _bytes(first)


def test_a_record_is_repeated_on_its_own_source_alone(
    tiny, cli, fails, direction: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny("llama", True), tmp_path / "source")
    out, again = tmp_path / "out", tmp_path / "again"
    assert cli("orthogonalize", source, "--direction", direction, "-o", out).code == 0
    replay = ("orthogonalize", source, "--direction", out / "abliterate.json", "-o", again)
    shard = max(source.glob("*.safetensors"))
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    line = fails(*replay, code=4)
    assert str(shard) in line
    assert "is not the one that" in line
    shard.write_bytes(good)
    (source / "generation_config.json").unlink()
    assert "generation_config.json is missing" in fails(*replay, code=4)
    other = ("orthogonalize", tiny("other"), "--direction", out / "abliterate.json", "-o", again)
    assert "abliterate.json records of" in fails(*other, code=4)
    assert not again.exists()
    assert not again.with_name("again.partial").exists()


def test_a_moved_source_is_the_same_source(tiny, cli, direction: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    assert cli("orthogonalize", tiny("llama"), "--direction", direction, "-o", out).code == 0
    moved = shutil.copytree(tiny("llama"), tmp_path / "moved")
    result = cli("orthogonalize", moved, "--direction", out / "abliterate.json", "-o", again)
    assert result.code == 0, result.err
    assert _bytes(again)["model.safetensors"] == _bytes(out)["model.safetensors"]


def test_options_that_ask_for_another_edit_are_refused(
    tiny, cli, fails, direction: Path, tmp_path: Path
) -> None:
    source, out, again = tiny("llama"), tmp_path / "out", tmp_path / "again"
    base = ("orthogonalize", source, "--direction")
    assert cli(*base, direction, "-o", out, "--scale", "0.5").code == 0
    replay = (*base, out / "abliterate.json", "-o", again)
    line = fails(*replay, "--scale", "0.6", code=2)
    assert line.startswith("error: --scale is not what ")
    assert "(0.5)" in line
    assert "--requantize and --dequantize" in fails(*replay, "--requantize", code=2)
    result = cli(*replay, "--scale", "0.5", "--jobs", "1")
    assert result.code == 0, result.err
    assert _bytes(again) == _bytes(out)


def test_records_of_older_and_other_kinds(
    tiny, cli, fails, direction: Path, tmp_path: Path
) -> None:
    source, out, again = tiny("llama", False, HALF), tmp_path / "out", tmp_path / "again"
    assert cli("orthogonalize", source, "--direction", direction, "-o", out).code == 0
    record, changed = json.loads((out / "abliterate.json").read_text()), tmp_path / "record.json"

    def replay(document: object) -> tuple[str | Path, ...]:
        changed.write_text(json.dumps(document))
        return ("orthogonalize", source, "--direction", changed, "-o", again)

    kept = {name: value for name, value in record.items() if name != "unnormalised"}
    versions = {**record["versions"], "torch": "1.0"}
    result = cli(*replay({**kept, "versions": versions}))
    assert result.code == 0, result.err
    assert "last bits may differ" in result.err
    assert "torch 1.0 then" in result.err
    assert _bytes(again)["model.safetensors"] == _bytes(out)["model.safetensors"]
    shutil.rmtree(again)
    for document in (
        [],
        {},
        {**record, "vector": None},
        {**record, "unnormalised": ["1"]},
        {**record, "options": {"scale": "much"}},
        {**record, "source": {}},
    ):
        code = 4 if document == {**record, "source": {}} else 3
        assert str(changed) in fails(*replay(document), code=code)
    wrong = {**record, "unnormalised": record["unnormalised"][:-1]}
    assert "made for another model" in fails(*replay(wrong), code=3)
    assert not again.exists()


def test_a_record_gives_other_commands_its_direction(
    tiny, cli, direction: Path, tmp_path: Path
) -> None:
    source, out = tiny("llama"), tmp_path / "out"
    assert cli("orthogonalize", source, "--direction", direction, "-o", out).code == 0
    record = out / "abliterate.json"
    assert cli("verify", out, "--direction", record, "--source", source).code == 0
    assert cli("verify", source, "--direction", record).code == 6
    # The folder alone names no direction; the line says what does.
    found = cli("verify", out, "--direction", out)
    assert found.code == 3
    assert (
        f"{out} is an edited checkpoint: give its record, {record}, or the run folder" in found.err
    )
