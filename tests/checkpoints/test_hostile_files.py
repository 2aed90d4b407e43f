"""Checkpoints that lie: damaged headers and indices, links that leave, pickles, other formats."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from abliterate.checkpoints.safetensors_header import read_shard
from abliterate.checkpoints.shards import INDEX, read_shards
from abliterate.editing.orthogonalize import orthogonalize
from abliterate.errors import AbliterateError, CheckpointError
from abliterate.models.loading import Checkpoint

_TENSORS = {
    "model.embed_tokens.weight": torch.ones(4, 6),
    "model.norm.weight": torch.ones(6, dtype=torch.bfloat16),
    "empty": torch.ones(0, 3),
}


@pytest.fixture(scope="module")
def direction(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    save_file({"direction": torch.randn(48, generator=torch.Generator().manual_seed(2))}, path)
    return path


def copy(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def pack(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(start: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


_BAD_HEADERS = {
    "empty file": b"",
    "length alone": (100).to_bytes(8, "little"),
    "huge length": b"\xff" * 8 + b"{}",
    "length past the end": (3).to_bytes(8, "little") + b"{}",
    "no object": pack([1, 2]),
    "a number": pack(7),
    "not UTF-8": pack(b'{"\xff\xfe": 1}'),
    "half a surrogate": pack({"a\ud800": entry(0, 4, [])}, b"1234"),
    "control characters": pack({"a\x1b[2J": entry(0, 4, [1])}, b"1234"),
    "twice": pack(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
                  b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
    "overlap": pack({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, b"1234"),
    "gap": pack({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"123456789012"),
    "past the end": pack({"a": entry(0, 400, [100])}, b"1234"),
    "bytes left over": pack({"a": entry(0, 4, [1])}, b"12345"),
    "backwards": pack({"a": entry(4, 0, [0])}, b"1234"),
    "negative": pack({"a": entry(-4, 0, [1])}, b"1234"),
    "negative shape": pack({"a": entry(0, 4, [-1, -1])}, b"1234"),
    "fractions": pack({"a": entry(0, 4, [1.0])}, b"1234"),
    "booleans": pack({"a": entry(0, 4, [True])}, b"1234"),
    "strings": pack({"a": {"dtype": "F32", "shape": "1", "data_offsets": "04"}}, b"1234"),
    "three offsets": pack({"a": entry(0, 4, [1]) | {"data_offsets": [0, 4, 8]}}, b"1234"),
    "unknown dtype": pack({"a": entry(0, 4, [1], "F33")}, b"1234"),
    "a list as dtype": pack({"a": entry(0, 4, [1]) | {"dtype": ["F32"]}}, b"1234"),
    "wrong size": pack({"a": entry(0, 4, [2])}, b"1234"),
    "overflow": pack({"a": entry(0, 4, [2**62, 2**62, 4])}, b"1234"),
    "endless number": pack(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000
                           + b'],"data_offsets":[0,4]}}', b"1234"),
    "endless shape": pack({"a": entry(0, 4, [2**60] * 200_000)}, b"1234"),
    "deep nesting": pack(b"[" * 200_000),
    "metadata of numbers": pack({"__metadata__": {"a": 1}, "b": entry(0, 4, [1])}, b"1234"),
    "metadata as a list": pack({"__metadata__": ["a"], "b": entry(0, 4, [1])}, b"1234"),
    "NaN": pack(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"1234"),
}  # fmt: skip


@pytest.mark.parametrize("name", _BAD_HEADERS)
def test_lying_headers_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(_BAD_HEADERS[name])
    begun = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        read_shard(path)
    assert time.perf_counter() - begun < 2
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_headers_at_the_edge_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack({}))
    assert not read_shard(path).tensors
    path.write_bytes(pack({"__metadata__": None, "a": entry(0, 0, [0, 5]), "b": entry(0, 4, [])},
                          b"1234"))  # fmt: skip
    assert list(read_shard(path).tensors) == ["a", "b"]
    os.unlink(path)
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="no regular file"):
        read_shard(path)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "generation_config.json", "chat_template.jinja"]
)
def test_a_pipe_or_device_among_the_files_is_refused_before_a_library_reads_it(
    name: str, tiny, fails, direction: Path, tmp_path: Path
) -> None:
    folder = copy(tiny("llama"), tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for command in (
        ["extract", folder, "-o", tmp_path / "run"],
        ["verify", folder, "--direction", direction],
        ["plan", folder],
    ):
        assert f"{folder / name} is a pipe" in fails(*command, code=4)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert f"{folder / name} is a pipe, socket or device" in fails("plan", folder, code=4)


def mutate(raw: bytes, generator: random.Random) -> bytes:
    """A few bytes changed, moved, cut or doubled; mostly in the header."""
    data = bytearray(raw)
    reach = len(data) if generator.random() < 0.3 else min(len(data), 420)
    for _ in range(generator.choice((1, 1, 2, 4))):
        at = generator.randrange(max(1, min(reach, len(data)))) if data else 0
        match generator.randrange(7):
            case 0:
                data[at : at + 1] = bytes([generator.randrange(256)])
            case 1:
                data[at : at + 1] = generator.choice(
                    (b"0", b"9", b"-", b'"', b"[", b"}", b",", b"e")
                )
            case 2:
                del data[at : at + generator.choice((1, 2, 8, 100))]
            case 3:
                data[at:at] = data[at : at + generator.choice((1, 8, 60))]
            case 4:
                data = data[: generator.randrange(len(data) + 1)]
            case 5:
                data[:8] = generator.choice(
                    (generator.randrange(2**64), generator.randrange(600), 2**63, 0)
                ).to_bytes(8, "little")
            case 6:
                digits = str(generator.choice((0, 1, 2**31, 2**63, 2**64, 10**30))).encode()
                data[at : at + 1] = digits
    return bytes(data)


def test_thousands_of_damaged_files(tmp_path: Path) -> None:
    """Every one is read or refused in one line, at once; what is read has every byte it claims."""
    generator = random.Random(1)
    whole = save(_TENSORS, {"format": "pt"})
    folder = tmp_path / "model"
    folder.mkdir()
    path, index = folder / "a.safetensors", folder / INDEX
    weight_map = dict.fromkeys(_TENSORS, "a.safetensors")
    good_index = json.dumps({"metadata": {"total_size": 108}, "weight_map": weight_map}).encode()
    path.write_bytes(whole)
    index.write_bytes(good_index)
    messages: set[str] = set()
    read = refused = 0
    slowest = 0.0
    for number in range(6_000):
        of_index = number % 5 == 0
        target, content = (index, good_index) if of_index else (path, whole)
        target.write_bytes(mutate(content, generator))
        begun = time.perf_counter()
        try:
            shards = read_shards(folder)
        except CheckpointError as error:
            messages.add(str(error))
            refused += 1
        else:
            read += 1
            for tensor in shards.tensors.values():
                assert 8 <= tensor.start <= tensor.end <= tensor.file.stat().st_size
                assert tensor.file.parent == folder
        slowest = max(slowest, time.perf_counter() - begun)
        target.write_bytes(content)
    assert all(message.isprintable() for message in messages)
    assert read > 150
    assert refused > 3_000
    assert slowest < 2
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.safetensors", "model", INDEX]


def test_damaged_checkpoints_never_write_outside_out(tiny, direction: Path, tmp_path: Path) -> None:
    """The whole editor over damaged shards and indices: OUT whole or absent, nothing elsewhere."""
    from abliterate.direction_loading import load_direction

    vector = load_direction(direction)
    generator = random.Random(2)
    source = copy(tiny("llama", True), tmp_path / "source")
    files = [*sorted(source.glob("*.safetensors"))[:2], source / INDEX]
    messages: set[str] = set()
    edited = 0
    for _ in range(120):
        victim = generator.choice(files)
        original = victim.read_bytes()
        victim.write_bytes(mutate(original, generator))
        try:
            orthogonalize(Checkpoint("source", source), vector, tmp_path / "out")
            edited += 1
        except AbliterateError as error:
            messages.add(str(error))
        else:
            assert all(p.is_relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*"))
            for file in sorted((tmp_path / "out").iterdir()):
                file.unlink()
            (tmp_path / "out").rmdir()
        victim.write_bytes(original)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    assert edited < 100
    assert all(message.isprintable() for message in messages)


_BAD_NAMES = ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "x.bin", "",
              "a\\b.safetensors", "C:x.safetensors", "a\x00.safetensors", "\ud800.safetensors",
              "a" * 300 + ".safetensors", "..safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", _BAD_NAMES)
def test_an_index_cannot_point_outside(name: str, tiny, direction, fails, tmp_path: Path) -> None:
    source = copy(tiny("llama", True), tmp_path / "source")
    (tmp_path / "x.safetensors").write_bytes(b"secret")
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (source / INDEX).write_text(json.dumps(index))
    line = fails("orthogonalize", source, "--direction", direction, "-o", tmp_path / "o", code=4)
    assert INDEX in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "x.safetensors"]


def test_links_may_not_leave_the_checkpoint(tiny, direction, fails, cli, tmp_path: Path) -> None:
    source = copy(tiny("llama"), tmp_path / "source")
    base = ("orthogonalize", source, "--direction", direction, "-o", tmp_path / "out")
    (tmp_path / "secret.txt").write_text("secret")
    (source / "notes.txt").symlink_to(tmp_path / "secret.txt")
    assert "outside the checkpoint" in fails(*base, code=4)
    (source / "notes.txt").unlink()
    (source / "folder").symlink_to(tmp_path)
    assert "outside the checkpoint" in fails(*base, code=4)
    (source / "folder").unlink()
    (source / "loop").symlink_to("loop")
    assert "loop" in fails(*base, code=4)
    (source / "loop").unlink()
    weights = source / "model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    assert "put the file itself there" in fails(*base, code=4)
    weights.unlink()
    (tmp_path / "elsewhere.safetensors").rename(source / "named.bin2")
    weights.symlink_to("named.bin2")
    (source / "alias.txt").symlink_to("config.json")
    result = cli(*base)
    assert result.code == 0, result.err
    assert not (tmp_path / "out" / "alias.txt").is_symlink()
    assert (tmp_path / "out" / "alias.txt").read_bytes() == (source / "config.json").read_bytes()


def test_the_hub_cache_is_read_through_its_links(tiny, direction, cli, tmp_path: Path) -> None:
    entry = tmp_path / "models--org--name"
    snapshot = entry / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    for number, file in enumerate(sorted(tiny("llama", True).iterdir())):
        (entry / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    result = cli("orthogonalize", snapshot, "--direction", direction, "-o", tmp_path / "out")
    assert result.code == 0, result.err
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth"])
def test_pickles_are_never_opened(suffix: str, tiny, direction, fails, tmp_path: Path) -> None:
    source = copy(tiny("llama"), tmp_path / "source")
    (source / "model.safetensors").unlink()
    pickle = source / f"pytorch_model.{suffix}"
    pickle.write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    pickle.chmod(0)
    opened: list[str] = []
    import sys

    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    line = fails("orthogonalize", source, "--direction", direction, "-o", tmp_path / "o", code=4)
    assert "never opened" in line
    assert "save_pretrained" in line
    assert not any(name.endswith(pickle.name) for name in opened)


@pytest.mark.parametrize(
    ("method", "named"),
    [("gptq", "GPTQ"), ("awq", "AWQ"), ("bitsandbytes", "bitsandbytes"), ("hqq", "hqq")],
)
def test_other_quantizations_say_what_to_edit_instead(
    method: str, named: str, tiny, direction, fails, tmp_path: Path
) -> None:
    source = copy(tiny("llama"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (source / "config.json").write_text(json.dumps(config))
    line = fails("orthogonalize", source, "--direction", direction, "-o", tmp_path / "o", code=4)
    assert named in line
    assert "quantize the result" in line


def test_gguf_says_what_to_edit_instead(tiny, direction, fails, tmp_path: Path) -> None:
    source = copy(tiny("llama"), tmp_path / "source")
    (source / "model.safetensors").unlink()
    (source / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    line = fails("orthogonalize", source, "--direction", direction, "-o", tmp_path / "o", code=4)
    assert "GGUF" in line
    assert "converted from" in line
    (source / "config.json").unlink()
    line = fails("orthogonalize", source, "--direction", direction, "-o", tmp_path / "o", code=4)
    assert "GGUF" in line
    assert "converted from" in line
