"""``export`` and ``--direction``: the direction in files of other programs, and back."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from abliterate import ablate, add, load_direction

LAYER = 2


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What ``select`` leaves, as far as an export reads it."""
    folder = tmp_path / "run"
    folder.mkdir()
    vector = 5 * torch.randn(48, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    metadata = {"layer": str(LAYER), "position": "-3", "model": "m"}
    save_file({"direction": vector}, folder / "direction.safetensors", metadata)
    (folder / "extract.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def _export(cli: Callable, run: Path, to: str) -> Path:
    result = cli("export", run, "--to", to, "--json")
    assert result.code == 0, result.err
    assert result.json["layer"] == LAYER
    return Path(result.json["file"])


@pytest.mark.parametrize("to", ["gguf", "steering-vectors", "npz"])
def test_an_exported_direction_reads_back(to: str, tiny, cli, run: Path, tmp_path: Path) -> None:
    if to == "gguf":
        pytest.importorskip("gguf")
    file, original = _export(cli, run, to), load_direction(run)
    back = load_direction(file)
    assert back.layer == LAYER
    assert back.position == (-3 if to == "npz" else None)
    assert torch.allclose(back.vector, original.vector, rtol=1e-7)
    assert float(torch.cosine_similarity(back.vector, original.vector, dim=0)) > 1 - 1e-12
    again = file.read_bytes()
    assert _export(cli, run, to).read_bytes() == again  # over its own file, to the same bytes
    out = tmp_path / "out"
    made = cli("orthogonalize", tiny("llama"), "--direction", file, "-o", out)
    assert made.code == 0, made.err
    assert cli("verify", out, "--direction", file, "--source", tiny("llama")).code == 0


def test_a_control_vector_is_what_llama_cpp_and_repeng_read(cli, run: Path) -> None:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(_export(cli, run, "gguf"))

    def text(key: str) -> str:
        field = reader.get_field(key)
        return bytes(field.parts[field.data[0]]).decode()

    assert text("general.architecture") == "controlvector"
    assert text("controlvector.model_hint") == "llama"
    (tensor,) = reader.tensors
    assert tensor.name == f"direction.{LAYER - 1}"
    assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
    assert list(tensor.shape) == [48]


def test_a_vector_acts_behind_the_block_before_its_layer(tiny, cli, run: Path) -> None:
    """Where steering-vectors, repeng and llama.cpp add it: the output of block L - 1."""
    held = load_file(_export(cli, run, "steering-vectors"))
    ((name, vector),) = held.items()
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad(), add(model, load_direction(run).vector, LAYER, 0.7):
        expected = model(ids).logits

    def shift(module, args, output):
        return (output[0] + 0.7 * vector, *output[1:]) if isinstance(output, tuple) else (
            output + 0.7 * vector)  # fmt: skip

    block = model.model.layers[int(name.removeprefix("layer_activations."))]
    handle = block.register_forward_hook(shift)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, expected, atol=1e-4)
        handle.remove()
        assert not torch.allclose(model(ids).logits, expected, atol=1e-2)


def test_steering_vectors_adds_it_where_add_does(tiny, cli, run: Path) -> None:
    library = pytest.importorskip("steering_vectors")
    held = load_file(_export(cli, run, "steering-vectors"))
    steering = library.SteeringVector({int(name.split(".")[1]): r for name, r in held.items()})
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        with add(model, load_direction(run).vector, LAYER, 0.7):
            expected = model(ids).logits
        with steering.apply(model, multiplier=0.7):
            assert torch.allclose(model(ids).logits, expected, atol=1e-4)
        assert not torch.allclose(model(ids).logits, expected, atol=1e-2)


_IDS = torch.arange(5, 25).unsqueeze(0)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_transformer_lens_steers_at_the_hook_points_of_the_page(
    kind: str, tiny, cli, run: Path
) -> None:
    lens = pytest.importorskip("transformer_lens.model_bridge", exc_type=ImportError)
    r = torch.from_numpy(np.load(_export(cli, run, "npz"))["direction"])
    model = AutoModelForCausalLM.from_pretrained(tiny(kind), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny(kind))
    unit = (r / r.norm()).float()
    with torch.no_grad():
        plain = model(_IDS).logits
        with add(model, r, LAYER, 0.7):
            added = model(_IDS).logits
        with ablate(model, r):
            ablated = model(_IDS).logits
    bridge = lens.TransformerBridge.boot_transformers(
        str(tiny(kind)), hf_model=model, tokenizer=tokenizer, device="cpu"
    )

    def without(value: torch.Tensor, hook: object) -> torch.Tensor:
        return value - (value @ unit)[..., None] * unit

    def logits(*hooks: tuple[str, Callable]) -> torch.Tensor:
        with torch.no_grad():
            return bridge.run_with_hooks(_IDS, fwd_hooks=list(hooks), return_type="logits")

    assert torch.allclose(logits(), plain, atol=1e-4)
    for name in (f"blocks.{LAYER}.hook_resid_pre", f"blocks.{LAYER - 1}.hook_resid_post"):
        got = logits((name, lambda resid, hook: resid + 0.7 * r.float()))
        assert torch.allclose(got, added, atol=1e-4), name
    places = ["hook_embed"]
    for layer in range(4):
        places += [f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.hook_mlp_out"]
    assert torch.allclose(logits(*((name, without) for name in places)), ablated, atol=1e-4)
    assert min((ablated - plain).abs().max(), (added - plain).abs().max()) > 0.1


def test_nnsight_steers_at_the_output_of_the_page(tiny, cli, run: Path) -> None:
    nnsight = pytest.importorskip("nnsight", exc_type=ImportError)
    r = torch.from_numpy(np.load(_export(cli, run, "npz"))["direction"])
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    with torch.no_grad():
        plain = model(_IDS).logits
        with add(model, r, LAYER, 0.7):
            added = model(_IDS).logits
        with ablate(model, r):
            ablated = model(_IDS).logits
    seen = nnsight.NNsight(model)
    shift, unit = 0.7 * r.float(), (r / r.norm()).float()
    with torch.no_grad(), seen.trace(_IDS):
        seen.model.layers[LAYER - 1].output = seen.model.layers[LAYER - 1].output + shift
        got = seen.output.logits.save()
    assert torch.allclose(got, added, atol=1e-4)
    with torch.no_grad(), seen.trace(_IDS):
        embedded = seen.model.embed_tokens.output
        seen.model.embed_tokens.output = embedded - (embedded @ unit)[..., None] * unit
        for block in seen.model.layers:
            term = block.self_attn.o_proj.output
            block.self_attn.o_proj.output = term - (term @ unit)[..., None] * unit
            term = block.mlp.output
            block.mlp.output = term - (term @ unit)[..., None] * unit
        got = seen.output.logits.save()
    assert torch.allclose(got, ablated, atol=1e-4)
    assert min((ablated - plain).abs().max(), (added - plain).abs().max()) > 0.1


def test_npz_says_where_it_acts(cli, run: Path) -> None:
    with np.load(_export(cli, run, "npz"), allow_pickle=False) as file:
        assert str(file["hook_point"]) == "resid_pre"
        assert int(file["layer"]) == LAYER
        assert file["direction"].dtype == np.float64


def test_what_cannot_be_exported_is_refused(cli, fails, run: Path, tmp_path: Path) -> None:
    assert "gguf, steering-vectors or npz" in fails("export", run, "--to", "onnx", code=2)
    alone = tmp_path / "direction.safetensors"
    save_file({"direction": torch.ones(48)}, alone)
    assert "-o FILE" in fails("export", alone, "--to", "npz", code=2)
    line = fails("export", alone, "--to", "gguf", "-o", tmp_path / "r.gguf", code=3)
    assert "does not record its layer" in line
    save_file({"direction": torch.ones(48)}, alone, {"layer": "1"})
    line = fails("export", alone, "--to", "gguf", "-o", tmp_path / "r.gguf", code=3)
    assert "begin at block 2" in line
    other = tmp_path / "notes.npz"
    other.write_text("mine")
    line = fails("export", run, "--to", "npz", "-o", other, code=2)
    assert "no earlier output of `abliterate export`" in line
    assert other.read_text() == "mine"
    assert "ends in .npz" in fails("export", run, "--to", "npz", "-o", tmp_path / "r.gguf", code=2)
    weights = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(3)}, weights)
    before = weights.read_bytes()
    assert fails("export", run, "--to", "steering-vectors", "-o", weights, code=2)
    assert weights.read_bytes() == before


def _broken(folder: Path) -> dict[str, Path]:
    """Files of strangers, each with one thing wrong."""
    names = (
        "pickled.npz",
        "none.npz",
        "torn.npz",
        "two.safetensors",
        "sub.safetensors",
        "wide.npz",
    )
    files = {name: folder / name for name in names}
    np.savez(files["pickled.npz"], direction=np.array([{"a": 1}], dtype=object))
    np.savez(files["none.npz"], other=np.ones(48))
    np.savez(files["wide.npz"], direction=np.ones((2, 48)))
    files["torn.npz"].write_bytes(files["none.npz"].read_bytes()[:60])
    both = {f"layer_activations.{n}": np.ones(45 + n, np.float32) for n in (2, 3)}
    save_arrays(both, files["two.safetensors"])
    one = {"layer_activations.3": np.ones(48, np.float32)}
    save_arrays(one, files["sub.safetensors"], {"layer_type": "mlp"})
    bare = folder / "bare.npz"
    bare.write_bytes(pickle.dumps([1, 2]))
    vector = np.ones(48)
    wrong = {
        "layer": {"layer": -5}, "deep": {"layer": 10**18}, "half": {"layer": 1.5},
        "layers": {"layer": [1, 2]}, "word": {"layer": "two"}, "position": {"position": 3},
        "hook": {"hook_point": "resid_post"}, "pickled layer": {"layer": np.array([{}])},
    }  # fmt: skip
    for name, more in wrong.items():
        files[name] = folder / f"{name}.npz"
        np.savez(files[name], direction=vector, **more)
    twice = {f"layer_activations.{n}": np.ones(48, np.float32) for n in ("1", "01")}
    files["twice"], files["far"] = folder / "twice.safetensors", folder / "far.safetensors"
    save_arrays(twice, files["twice"])
    save_arrays({"layer_activations.5000": np.ones(48, np.float32)}, files["far"])
    header = io.BytesIO()
    shape = {"descr": "<f8", "fortran_order": False, "shape": (10**15,)}
    np.lib.format.write_array_header_1_0(header, shape)
    content = {"large": header.getvalue() + vector.tobytes(), "raw": b"no array"}
    for name, held in content.items():
        files[name] = folder / f"{name}.npz"
        with zipfile.ZipFile(files[name], "w") as archive:
            archive.writestr("direction.npy", held)
    files["method"] = folder / "method.npz"  # of compression: 77
    torn = bytearray(files["raw"].read_bytes())
    for mark, at in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        torn[torn.index(mark) + at] = 77
    files["method"].write_bytes(torn)
    return files | {"bare.npz": bare}


def test_files_that_hold_no_single_direction_are_refused(tiny, fails, tmp_path: Path) -> None:
    for file in _broken(tmp_path).values():
        line = fails("verify", tiny("llama"), "--direction", file, code=3)
        assert str(file) in line
        assert "allow_pickle=`" not in line  # numpy's advice


def _other_kinds(place: Path) -> dict[str, tuple[bytes, str]]:
    """By name, files that hold no direction that is read, and what is said of each."""
    vector, packed = torch.ones(48), io.BytesIO()
    np.save(packed, np.ones(48))
    torch.save(vector, place / "new")
    torch.save(vector, place / "old", _use_new_zipfile_serialization=False)
    saved = place / "saved.npz"
    np.savez(saved, direction=np.ones(48))
    pickled = "is a PyTorch pickle (torch.save): which is never opened here"
    return {
        "r.pt": ((place / "new").read_bytes(), pickled),
        "r.bin": ((place / "old").read_bytes(), pickled),
        "r2.npz": ((place / "new").read_bytes(), pickled),
        "r.safetensors": ((place / "new").read_bytes(), "is a PyTorch pickle"),
        "r.pkl": (pickle.dumps([1.0] * 48), "is a pickle: which is never opened here"),
        "r.ckpt": (b"\0\xff" * 9, "is named as a pickle and damaged"),
        "r.npy": (packed.getvalue(), "is one numpy array (.npy): save it with numpy.savez("),
        "r.zip": (saved.read_bytes(), "is a zip of numpy arrays (.npz): name it .npz"),
        "r.dat": (b"GGUF" + b"\0" * 40, "is a GGUF file: name it .gguf"),
        "r.gguf": (save({"direction": vector}), "is a safetensors file: name it .safetensors"),
        "r.json": (b"[1.0, 2.0]", "is a JSON list: give a run folder"),
        "config.json": (b'{"model_type": "x", "bos": 1}', "(it has: bos, model_type)"),
        "r.html": (b"<!doctype html><p>", "is a web page: give"),
        "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "`git lfs pull`"),
        "r.txt": ("ä".encode() * 400, "is text: give a run folder, a safetensors file"),
        "none.safetensors": (b"", "is empty: give"),
        "r.gz": (b"\x1f\x8b\x08" + b"\0" * 20, "is packed with gzip"),
    }  # fmt: skip


def test_a_file_of_another_kind_is_told_what_it_is_and_what_is_read(
    tiny, fails, tmp_path: Path
) -> None:
    for name, (content, said) in _other_kinds(tmp_path).items():
        file = tmp_path / name
        file.write_bytes(content)
        line = fails("verify", tiny("llama"), "--direction", file, code=3)
        assert f"{file} is " in line
        assert said in line, line
        assert "abliterate.json of an edit" in line or name == "config.json"
    line = fails("verify", tiny("llama"), "--direction", tiny("llama"), code=3)
    assert "is a checkpoint, which holds no direction: give a run folder" in line


def test_control_vectors_of_strangers_are_refused(tiny, fails, run: Path, cli, tmp_path) -> None:
    gguf = pytest.importorskip("gguf")
    good = _export(cli, run, "gguf").read_bytes()
    for name, content in {
        "torn": good[:-20],
        "header": good[:40],
        "many": good[:16] + (2**60).to_bytes(8, "little") + good[24:],
        "text": b"mine",
        "empty": b"",
        "model": good.replace(b"controlvector", b"controlvektor"),
    }.items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(content)
        line = fails("verify", tiny("llama"), "--direction", file, code=3)
        assert str(file) in line
        assert ('GGUF file of "controlvektor"' in line) == (name == "model")
    several = tmp_path / "several.gguf"
    writer = gguf.GGUFWriter(several, "controlvector")
    for block in (1, 2):
        writer.add_tensor(f"direction.{block}", np.ones(48, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = cli("verify", tiny("llama"), "--direction", several, "--json")  # of layers 2 and 3
    assert result.code == 6, result.err
    layers = {writer["name"].split(".")[2] for writer in result.json["writers"]}
    assert layers == {"weight", "2", "3"}
