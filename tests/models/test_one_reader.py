"""Every way into a checkpoint reads its index and headers first, and then just what was checked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.checkpoints.shards import INDEX, SINGLE
from abliterate.errors import AbliterateError, CheckpointError
from abliterate.evaluation.judges import LocalJudge
from abliterate.models.device_placement import Placement
from abliterate.models.loading import find_checkpoint, load_model, load_weights


def repack(path: Path, change: Callable[[dict], object]) -> None:
    """Change a shard's header; what ``change`` returns, if anything, is the header's text."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = change(header)
    packed = (text if isinstance(text, str) else json.dumps(header)).encode()
    path.write_bytes(len(packed).to_bytes(8, "little") + packed + raw[8 + length :])


def point(model: Path, file: str) -> None:
    """An index that has every tensor in ``file``, instead of the single shard."""
    names = load_file(model / SINGLE)
    (model / SINGLE).rename(model.parent / "outside.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))
    save_file({}, model / "beside.safetensors")


def dotdot(model: Path) -> None:
    point(model, "../outside.safetensors")


def absolute(model: Path) -> None:
    point(model, str(model.parent / "outside.safetensors"))


def link(model: Path) -> None:
    (model / SINGLE).rename(model.parent / "outside.safetensors")
    (model / SINGLE).symlink_to("../outside.safetensors")


def linked_shard(model: Path) -> None:
    point(model, "part.safetensors")
    (model / "part.safetensors").symlink_to("../outside.safetensors")


def linked_index(model: Path) -> None:
    point(model, "part.safetensors")
    shutil.copy(model.parent / "outside.safetensors", model / "part.safetensors")
    (model / INDEX).rename(model.parent / "index.json")
    (model / INDEX).symlink_to("../index.json")


def twice(model: Path) -> None:
    point(model, "a.safetensors")
    for name in ("a", "b"):
        shutil.copy(model.parent / "outside.safetensors", model / f"{name}.safetensors")
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "b.safetensors"
    (model / INDEX).write_text(json.dumps(index))


def repeated_in_index(model: Path) -> None:
    point(model, "a.safetensors")
    (model.parent / "outside.safetensors").rename(model / "a.safetensors")
    text = (model / INDEX).read_text()
    (model / INDEX).write_text(text.replace("}}", ', "lm_head.weight": "a.safetensors"}}'))


def listed_but_absent(model: Path) -> None:
    point(model, "a.safetensors")
    (model.parent / "outside.safetensors").rename(model / "a.safetensors")
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["model.more.weight"] = "a.safetensors"
    (model / INDEX).write_text(json.dumps(index))


def repeated_in_header(model: Path) -> None:
    def change(header: dict) -> str:
        entry = json.dumps({"lm_head.weight": header["lm_head.weight"]})
        return json.dumps(header)[:-1] + ", " + entry[1:]

    repack(model / SINGLE, change)


def overlap(model: Path) -> None:
    def change(header: dict) -> None:
        one, other = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qo")
        header[other]["data_offsets"] = header[one]["data_offsets"]

    repack(model / SINGLE, change)


def distributed(model: Path) -> None:
    shutil.copy(model / SINGLE, model / "shard-00000-model-00001-of-00001.safetensors")


def other_weights(model: Path) -> None:
    shutil.copy(model / SINGLE, model / "other.safetensors")
    config = json.loads((model / "config.json").read_text())
    config["transformers_weights"] = "other.safetensors"
    (model / "config.json").write_text(json.dumps(config))


TRICKS = (
    *(dotdot, absolute, link, linked_shard, linked_index, twice, repeated_in_index),
    *(listed_but_absent, repeated_in_header, overlap, distributed, other_weights),
)


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def quantized(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (model / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick.__name__)
def test_no_way_in_reads_a_tricked_checkpoint(
    trick: Callable[[Path], None], model: Path, tiny, fails, tmp_path: Path
) -> None:
    clean = tiny("llama")
    vector = tmp_path / "direction.safetensors"
    save_file({"direction": torch.ones(48)}, vector)
    trick(model)
    run = ("extract", model, "-o", tmp_path / "run", "--n-train", "4")
    edit = ("orthogonalize", model, "--direction", vector, "-o", tmp_path / "out")
    ways: tuple[tuple[str | Path, ...], ...] = ((*run, "--no-offload"), edit)
    if trick in (dotdot, overlap, other_weights):  # in the index, in the header, beside them
        ways += (
            run,
            (*run, "--offload"),
            (*run, "--device-map", "auto"),
            ("run", model, "-o", tmp_path / "run", "--no-offload"),
            ("verify", model, "--direction", vector, "--forward", "--no-offload"),
            ("verify", clean, "--direction", vector, "--source", model),
            ("chat", model),
            ("audit", model),
            ("audit", clean, "--base", model),
            ("diff", clean, model),
            ("plan", model),
            ("writers", model),
        )
    for way in ways:
        line = fails(*way, code=4)
        assert "cannot be loaded" not in line, way
    judge = LocalJudge(str(model))
    with pytest.raises(CheckpointError):
        judge.judge([("how?", "like this")], lambda index, verdict: None)
    quantized(model)
    for load in (load_model, load_weights):
        with pytest.raises(CheckpointError) as caught:
            load(find_checkpoint(str(model)), "cpu", placement=Placement(device_map="auto"))
        assert "cannot be loaded" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_changes_between_check_and_load_is_refused(model: Path, monkeypatch) -> None:
    import abliterate.models.loading as loading

    read, times = loading.read_shards, count(1)

    def slow(folder: Path) -> object:
        found, now = read(folder), next(times)
        os.utime(folder / SINGLE, ns=(now, now))
        return found

    monkeypatch.setattr(loading, "read_shards", slow)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        load_model(str(model), "cpu")


def test_the_hub_cache_is_loaded_through_its_links(tiny, tmp_path: Path) -> None:
    entry = tmp_path / "models--org--name"
    snapshot = entry / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    for number, file in enumerate(sorted(tiny("llama", True).iterdir())):
        (entry / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    here, there = (
        load_model(str(snapshot), "cpu").model,
        load_model(str(tiny("llama")), "cpu").model,
    )
    there = dict(there.named_parameters())
    assert all(torch.equal(p, there[name]) for name, p in here.named_parameters())


def test_pickles_beside_the_weights_are_never_opened(model: Path) -> None:
    import sys

    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (model / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "x", "target_modules": ["o_proj"]}
    (model / "adapter_config.json").write_text(json.dumps(adapter))
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    load_model(str(model), "cpu")
    assert not any(name.endswith(".bin") for name in opened)


def test_an_index_beside_a_single_file_is_not_followed(model: Path) -> None:
    """The single file is what loads; an index that says something else changes nothing."""
    (model / INDEX).write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))
    assert load_model(str(model), "cpu").model is not None


def test_a_lone_shard_of_another_name_is_not_loaded(model: Path, fails, tmp_path: Path) -> None:
    (model / SINGLE).rename(model / "weights.safetensors")
    with pytest.raises(AbliterateError):
        load_model(str(model), "cpu")
