"""The edited checkpoint: ablation's logits, every writer clean, every other byte untouched."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from architectures.zoo import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from abliterate import ablate
from abliterate.inference.forward import capture_resid_pre

IDS = torch.randint(0, 512, (3, 11), generator=torch.Generator().manual_seed(5))
WRITERS = re.compile(r"embed_tokens|self_attn\.o_proj|mlp\.down_proj")


@pytest.fixture(scope="module")
def direction(tmp_path_factory) -> Path:
    """A direction file with entries of very different size, not normalised."""
    generator = torch.Generator().manual_seed(11)
    vector = torch.randn(48, generator=generator, dtype=torch.float64) * torch.arange(1, 49) / 7
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    save_file({"direction": vector}, path, {"position": "-1", "layer": "2"})
    return path


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.double()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["llama", "llama-bias", "qwen2", "gemma", "mistral"])
def test_edited_model_equals_the_ablated_one(
    kind: str, sharded: bool, tiny, cli, direction: Path, tmp_path: Path
) -> None:
    source, out = tiny(kind, sharded), tmp_path / "out"
    result = cli("orthogonalize", source, "--direction", direction, "-o", out, "--json")
    assert result.code == 0, result.err
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    edited, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    vector = load_file(direction)["direction"]
    with ablate(original, vector):
        expected = _logits(original)
    assert (_logits(edited.eval()) - expected).abs().max() <= 1e-4
    assert (_logits(original) - expected).abs().max() > 0.1  # the direction matters

    unit = vector / vector.norm()
    with torch.no_grad(), capture_resid_pre(edited, range(IDS.shape[1])) as captured:
        edited(IDS)
        stream = captured().double()
    assert ((stream @ unit).abs() / stream.norm(dim=-1)).max() <= 1e-5

    before, after = _tensors(source), _tensors(out)
    tied = kind in ("qwen2", "gemma")
    assert set(after) - set(before) == ({"lm_head.weight"} if tied else set())
    if tied:
        assert torch.equal(after["lm_head.weight"], before["model.embed_tokens.weight"])
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    named = {tensor["name"] for tensor in result.json["tensors"]}
    biased = 8 if kind == "llama-bias" else 0
    assert len(named) == 1 + 2 * 4 + biased
    for name, tensor in before.items():
        assert bool(WRITERS.search(name)) == (name in named)
        assert torch.equal(tensor, after[name]) == (name not in named), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_and_the_record_measures_what_rounding_leaves(
    dtype: torch.dtype, tiny, cli, direction: Path, tmp_path: Path
) -> None:
    source, out = tiny("llama-bias", False, dtype), tmp_path / "out"
    result = cli("orthogonalize", source, "--direction", direction, "-o", out, "--json")
    assert result.code == 0, result.err
    unit = load_file(direction)["direction"]
    unit = unit / unit.norm()
    before, after = _tensors(source), _tensors(out)
    for entry in result.json["tensors"]:
        for side, tensors in (("before", before), ("after", after)):
            matrix = tensors[entry["name"]].double()
            along = torch.tensordot(unit, matrix, dims=([0], [entry["axis"]]))
            assert entry[side] == pytest.approx(float(along.norm() / matrix.norm()), rel=5e-2)
        assert after[entry["name"]].dtype == dtype
        assert entry["after"] < 2e-3 < entry["before"]


def test_blocks_of_rows_give_the_same_bytes_as_whole_matrices(
    tiny, cli, direction: Path, tmp_path: Path, monkeypatch
) -> None:
    from abliterate.editing import matrix_orthogonalization

    outs = []
    for name, size in (("whole", 1 << 19), ("blocks", 150)):  # 1 to 3 rows at a time
        monkeypatch.setattr(matrix_orthogonalization, "_BLOCK_ELEMENTS", size)
        outs.append(tmp_path / name)
        source = tiny("llama-bias", True)
        assert cli("orthogonalize", source, "--direction", direction, "-o", outs[-1]).code == 0
    for name, tensor in _tensors(outs[0]).items():
        assert torch.allclose(tensor, _tensors(outs[1])[name], atol=1e-6), name


def test_headers_metadata_and_other_files_are_kept(
    tiny, cli, direction: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "assets").mkdir(parents=True)
    for file in tiny("qwen2", True).iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "LICENSE").write_text("terms")
    (source / "assets" / "vocab.txt").write_text("a")
    (source / "pytorch_model.bin").write_bytes(b"unedited")
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n# Base\n")
    result = cli("orthogonalize", source, "--direction", direction, "-o", out)
    assert result.code == 0, result.err
    assert "pytorch_model.bin" in result.err
    assert not (out / "pytorch_model.bin").exists()
    assert (out / "LICENSE").read_text() == "terms"
    assert (out / "assets" / "vocab.txt").read_text() == "a"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json",
                 "chat_template.jinja"):  # fmt: skip
        assert (out / name).read_bytes() == (source / name).read_bytes()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    old = json.loads((source / "model.safetensors.index.json").read_text())
    holder = old["weight_map"]["model.embed_tokens.weight"]
    assert index["weight_map"] == {**old["weight_map"], "lm_head.weight": holder}
    assert index["metadata"]["total_size"] == old["metadata"]["total_size"] + 512 * 48 * 4
    for shard in set(old["weight_map"].values()):
        with safe_open(source / shard, "pt") as a, safe_open(out / shard, "pt") as b:
            assert a.metadata() == b.metadata()
            extra = ["lm_head.weight"] if shard == holder else []
            assert sorted(b.keys()) == sorted([*a.keys(), *extra])
    card = (out / "README.md").read_text()
    assert "Safety refusals were removed" in card
    assert "base_model: source" in card
    assert "license: mit" in card
    record = json.loads((out / "abliterate.json").read_text())
    assert record["direction"]["layer"] == 2
    assert record["untied"] == ["lm_head.weight"]


def test_an_architecture_that_cannot_be_exact_is_refused_unless_its_leak_is_allowed(
    fails, cli, direction: Path, tmp_path: Path
) -> None:
    """XGLM adds fixed sinusoids, which no edit of the weights can reach."""
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_model("xglm").save_pretrained(source)
    base = ("orthogonalize", source, "--direction", direction, "-o", out)
    line = fails(*base, code=4)
    assert "'xglm' cannot be made exact: model.embed_positions: adds the buffer" in line
    leak = float(re.search(r"a leak of (\S+) would remain", line)[1])
    assert 0.01 < leak < 1
    assert fails(*base, "--allow-leak", str(leak / 2), code=4) == line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    result = cli(*base, "--allow-leak", str(leak * 1.1), "--json")
    assert result.code == 0, result.err
    assert "not exact" in result.err
    assert result.json["leak_of_plan"] == pytest.approx(leak, rel=0.1)


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_bad_targets_are_refused(tiny, fails, cli, direction: Path, tmp_path: Path) -> None:
    source = _copy(tiny("llama"), tmp_path / "source")
    base = ("orthogonalize", source, "--direction", direction)
    assert "overlaps" in fails(*base, "-o", source, code=2)
    assert "overlaps" in fails(*base, "-o", source / "inside", code=2)
    assert "overlaps" in fails(*base, "-o", tmp_path, "--overwrite", code=2)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious.txt").write_text("keep")
    assert "--overwrite" in fails(*base, "-o", taken, code=2)
    assert (taken / "precious.txt").read_text() == "keep"
    assert "not made by" in fails(*base, "-o", taken, "--overwrite", code=2)
    assert (taken / "precious.txt").read_text() == "keep"
    (taken / "precious.txt").unlink()
    assert cli(*base, "-o", taken, "--overwrite").code == 0  # an empty folder
    assert cli(*base, "-o", taken, "--overwrite").code == 0  # an edited checkpoint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "taken"]
    blocked = tmp_path / "file"
    blocked.write_text("")
    fails(*base, "-o", blocked / "out", code=4)


def test_bad_directions_are_refused(tiny, fails, tmp_path: Path) -> None:
    def attempt(name: str, tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, tmp_path / name)
        return fails("orthogonalize", tiny("llama"), "--direction", tmp_path / name, "-o",
                     tmp_path / "out", code=3)  # fmt: skip

    assert "[47]" in attempt("short", {"direction": torch.ones(47)})
    assert "zero" in attempt("zero", {"direction": torch.zeros(48)})
    assert "NaN" in attempt("nan", {"direction": torch.full((48,), float("nan"))})
    assert "no tensor 'direction'" in attempt("other", {"steering": torch.ones(48)})
    assert "one vector" in attempt("matrix", {"direction": torch.ones(48, 1)})
    assert "one vector" in attempt("integers", {"direction": torch.ones(48, dtype=torch.int64)})
    (tmp_path / "text").write_text("no tensors")
    base = ("orthogonalize", tiny("llama"), "-o", tmp_path / "out", "--direction")
    assert "text is text: give a run folder" in fails(*base, tmp_path / "text", code=3)
    assert "does not exist" in fails(*base, tmp_path / "missing", code=3)
    (tmp_path / "run").mkdir()
    assert "abliterate select" in fails(*base, tmp_path / "run", code=3)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def _shard(folder: Path) -> Path:
    return next(p for p in sorted(folder.glob("*.safetensors")))


def _rewrite_header(path: Path, change) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])


def _poison(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("inf")
    save_file(tensors, path, {"format": "pt"})


def _reshape(header: dict) -> None:
    header["model.embed_tokens.weight"]["shape"] = [48, 512]


def _rename(header: dict) -> None:
    header["model.layers.1.self_attn.o_proj.wait"] = header.pop(
        "model.layers.1.self_attn.o_proj.weight"
    )


def _overlap(header: dict) -> None:
    header["model.norm.weight"]["data_offsets"] = [0, 192]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), "should have"),
        (lambda p: p.write_bytes(b"\xff" * 64), "truncated"),
        (lambda p: p.write_bytes((4).to_bytes(8, "little") + b"{{{{"), "damaged header"),
        (lambda p: _rewrite_header(p, _reshape), "model.embed_tokens.weight"),
        (lambda p: _rewrite_header(p, _rename), "model.layers.1.self_attn.o_proj.weight"),
        (lambda p: _rewrite_header(p, _overlap), "overlaps another"),
        (_poison, "'model.layers.1.mlp.down_proj.weight'"),
    ],
)
def test_damaged_checkpoints_leave_nothing_behind(
    damage, message, tiny, fails, direction: Path, tmp_path: Path
) -> None:
    source = _copy(tiny("llama"), tmp_path / "source")
    damage(_shard(source))
    line = fails("orthogonalize", source, "--direction", direction, "-o", tmp_path / "out", code=4)
    assert message in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update({"model.norm.weight": "../x.safetensors"}), "no plain file name"),
        (lambda m: m.update({"model.norm.weight": "none.safetensors"}), "is missing"),
        (lambda m: m.pop("model.norm.weight"), "does not list tensor 'model.norm.weight'"),
        (lambda m: m.update({"ghost": sorted(m.values())[0]}), "'ghost'"),
    ],
)
def test_an_index_that_lies_is_refused(
    change, message, tiny, fails, direction: Path, tmp_path: Path
) -> None:
    source = _copy(tiny("llama", True), tmp_path / "source")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    line = fails("orthogonalize", source, "--direction", direction, "-o", tmp_path / "o", code=4)
    assert message in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_an_interrupted_edit_leaves_nothing_under_the_final_name(
    tiny, cli, direction: Path, tmp_path: Path, monkeypatch
) -> None:
    from abliterate.editing import orthogonalize

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(orthogonalize, "check_unchanged", interrupt)
    out = tmp_path / "out"
    result = cli("orthogonalize", tiny("llama"), "--direction", direction, "-o", out)
    assert result.code == 130
    assert "interrupted; 1 finished shard kept in" in result.err
    assert os.listdir(tmp_path) == ["out.partial"]
