"""``verify`` says yes to a complete edit and no to every way in which one can be incomplete."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures.zoo import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Change = Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], None]


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a single-file checkpoint, metadata kept."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)


class Edited:
    """A source, its edited copy and the direction between them."""

    def __init__(self, cli, source: Path, folder: Path, seed: int = 1) -> None:
        self.cli, self.source, self.out = cli, source, folder / "edited"
        self.direction = folder / "direction.safetensors"
        config = json.loads((source / "config.json").read_text())
        width = config.get("hidden_size") or config["n_embd"]
        generator = torch.Generator().manual_seed(seed)
        vector = torch.randn(width, generator=generator, dtype=torch.float64)
        save_file({"direction": vector}, self.direction)
        result = cli("orthogonalize", source, "--direction", self.direction, "-o", self.out)
        assert result.code == 0, result.err

    def verify(self, *options: str | Path):
        return self.cli("verify", self.out, "--direction", self.direction, "--json", *options)

    def restore(self, name: str, rows: slice = slice(None)) -> None:
        original = load_file(self.source / "model.safetensors")[name]
        _rewrite(self.out, lambda tensors: tensors[name][rows].copy_(original[rows]))

    def dirty(self) -> set[str]:
        result = self.verify()
        assert result.code == 6
        assert result.json["passed"] is False
        return {w["name"] for w in result.json["writers"] if not w["clean"]}


def _save(model_type: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    tiny_model(model_type).to(dtype).save_pretrained(folder / "source")
    return folder / "source"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt_oss", "gemma2", "bloom"])
def test_a_complete_edit_passes_in_every_dtype(
    model_type: str, dtype: torch.dtype, cli, tmp_path: Path
) -> None:
    edited = Edited(cli, _save(model_type, tmp_path, dtype), tmp_path)
    result = edited.verify("--source", edited.source)
    assert result.code == 0, result.json
    assert result.json["passed"] is True
    assert all(w["residual"] <= w["bound"] for w in result.json["writers"])


@pytest.mark.parametrize(
    ("model_type", "name", "rows"),
    [
        ("llama", "model.embed_tokens.weight", slice(5, 6)),  # one token of the embedding
        ("llama", "model.layers.2.self_attn.o_proj.weight", slice(None)),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight", slice(None)),
        ("gpt_oss", "model.layers.3.mlp.experts.down_proj_bias", slice(2, 3)),  # of one expert
        ("gpt2", "transformer.wpe.weight", slice(None)),
        ("gpt2", "transformer.h.1.mlp.c_proj.bias", slice(None)),
        ("mamba2", "backbone.layers.0.mixer.out_proj.weight", slice(None)),
        ("gemma2", "model.layers.0.mlp.down_proj.weight", slice(None)),
    ],
)
def test_a_single_writer_left_out_is_named(
    model_type: str, name: str, rows: slice, cli, tmp_path: Path
) -> None:
    edited = Edited(cli, _save(model_type, tmp_path), tmp_path)
    edited.restore(name, rows)
    assert edited.dirty() == {name}


def test_the_plain_direction_is_not_enough_behind_a_post_norm(cli, tmp_path: Path) -> None:
    """What other tools write for Gemma 2: r projected out, though a gain puts it back."""
    edited = Edited(cli, _save("gemma2", tmp_path), tmp_path)
    source = load_file(edited.source / "model.safetensors")
    unit = load_file(edited.direction)["direction"]
    unit = (unit / unit.norm()).float()

    def plain(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in source.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensors[name] = tensor - torch.outer(unit, unit @ tensor)

    _rewrite(edited.out, plain)
    assert len(edited.dirty()) == 2 * json.loads(
        (edited.source / "config.json").read_text()
    )["num_hidden_layers"]  # fmt: skip


def test_another_direction_and_the_source_itself_fail(cli, tmp_path: Path) -> None:
    edited = Edited(cli, _save("llama", tmp_path), tmp_path)
    save_file({"direction": torch.randn(48)}, tmp_path / "other.safetensors")
    other = ("--direction", tmp_path / "other.safetensors", "--json")
    assert cli("verify", edited.out, *other).code == 6
    result = cli("verify", edited.source, "--direction", edited.direction)
    assert result.code == 6
    assert "still writes: model.embed_tokens.weight" in result.out
    assert "FAILED" in result.out
    assert "passed" in cli("verify", edited.out, "--direction", edited.direction).out


def test_a_partial_edit_fails_and_its_record_says_why(cli, tmp_path: Path) -> None:
    edited = Edited(cli, _save("llama", tmp_path), tmp_path)
    base = ("--direction", edited.direction)
    partial = tmp_path / "partial"
    assert cli("orthogonalize", edited.source, *base, "-o", partial, "--scale", "0.8").code == 0
    result = cli("verify", partial, *base)
    assert result.code == 6
    assert "the edit's own record: scale 0.8" in result.out
    assert edited.verify().json["limits"] == []


def test_every_other_difference_from_the_source_is_named(cli, tmp_path: Path) -> None:
    edited = Edited(cli, _save("llama", tmp_path), tmp_path)

    def meddle(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][7] += 1e-6
        tensors["model.extra"] = torch.ones(3)

    _rewrite(edited.out, meddle)
    assert edited.verify().code == 0  # the writers are clean all the same
    result = edited.verify("--source", edited.source)
    assert result.code == 6
    assert result.json["changed"] == ["model.norm.weight"]
    assert result.json["added"] == ["model.extra"]
    shutil.rmtree(edited.source)
    result = edited.verify("--source", edited.source)
    assert result.code == 4


def test_the_leak_on_real_prompts_is_within_its_promise(tiny, cli, tmp_path: Path) -> None:
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-3)):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        edited = Edited(cli, tiny("qwen2", False, dtype), folder)
        result = edited.verify("--source", edited.source, "--forward", "--n-prompts", "4")
        assert result.code == 0, result.err
        assert result.json["leak_bound"] == bound
        assert 0 < result.json["leak"] <= bound
    edited.restore("model.layers.1.self_attn.o_proj.weight")
    assert edited.verify("--forward", "--n-prompts", "4").json["leak"] > 0.01


def test_writers_lists_parameters_tensors_and_directions(cli, tmp_path: Path) -> None:
    source = _save("gemma2", tmp_path)
    document = cli("writers", source, "--json").json
    rows = {row["parameter"]: row for row in document["writers"]}
    assert document["exact"] is True
    assert document["d_model"] == 48
    assert rows["model.embed_tokens.weight"]["direction"] == "r"
    down = rows["model.layers.1.mlp.down_proj.weight"]
    assert down["direction"] == "(1 + model.layers.1.post_feedforward_layernorm.weight) * r"
    assert (down["axis"], down["kind"], down["layer"]) == (0, "mlp", 1)
    # Experts are one parameter in memory and many tensors on disk.
    moe = cli("writers", _save("mixtral", tmp_path / "moe"), "--json").json
    (expert,) = (r for r in moe["writers"] if r["layer"] == 0 and r["kind"] == "expert")
    assert len(expert["shape"]) == 3
    assert [name.split(".")[-3] for name in expert["tensors"]] == ["0", "1", "2", "3"]
    table = cli("writers", source).out
    assert "model.layers.3.self_attn.o_proj.weight" in table
    assert "exact (leak on a shrunken random copy" in table


def test_writers_needs_config_and_index_alone(cli, tmp_path: Path) -> None:
    """The same tensors without a shard in place, and without an index too."""
    tiny_model("mixtral").save_pretrained(tmp_path / "source", max_shard_size="50KB")
    expected = cli("writers", tmp_path / "source", "--json").json
    for shard in (tmp_path / "source").glob("*.safetensors"):
        shard.unlink()
    assert cli("writers", tmp_path / "source", "--json").json == expected
    (tmp_path / "source" / "model.safetensors.index.json").unlink()
    assert cli("writers", tmp_path / "source", "--json").json == expected


def test_writers_names_what_stands_in_the_way(cli, tmp_path: Path) -> None:
    document = cli("writers", _save("doge", tmp_path), "--json").json
    assert document["exact"] is False
    assert "input_residual" in document["reason"]
    assert document["leak"] > 1e-3


def test_an_adapter_of_ours_is_told_from_a_checkpoint(tiny, cli, fails, tmp_path: Path) -> None:
    """One line, whose command says what the adapter does to its base."""
    model, path = tiny("llama"), tmp_path / "direction.safetensors"
    save_file({"direction": torch.arange(48.0)}, path)
    adapter = tmp_path / "an adapter"
    made = cli("orthogonalize", model, "--direction", path, "-o", adapter, "--as-lora")
    assert made.code == 0, made.err
    for source in ((), ("--source", model)):
        line = fails("verify", adapter, "--direction", path, *source, code=4)
        assert f"{adapter} holds a PEFT adapter" in line
        named = shlex.split(line.split("`")[1])
        assert named[:3] == ["abliterate", "audit", str(adapter)]
    found = cli(*named[1:], "--json")
    assert found.code == 7, found.err
    assert found.json["verdict"] == "edited"


def test_a_wrong_position_is_the_options_fault(tiny, cli, fails, tmp_path: Path) -> None:
    model, run, out = tiny("llama"), tmp_path / "run", tmp_path / "out"
    run.mkdir()
    generator = torch.Generator().manual_seed(5)
    means = {
        name: torch.randn(2, 4, 48, generator=generator, dtype=torch.float64)
        for name in ("mean_harmful", "mean_harmless")
    }
    save_file(means, run / "directions.safetensors", {"positions": "[-2, -1]"})
    at = ("--direction", run, "--position")
    assert cli("orthogonalize", model, *at, "-2", "-o", out).code == 0
    assert cli("verify", out, "--source", model, *at, "-2").code == 0
    for position, told in (
        ("-3", "--position -3: "),
        ("2", "--position: must be below 0, not 2"),
        ("-1", "--position=-1: "),
    ):
        line = fails("verify", out, "--source", model, *at, position, code=2)
        assert line.startswith(f"error: {told}")
    file = ("--direction", run / "directions.safetensors", "--position", "-2")
    assert "give the folder of extract as --direction" in fails("verify", out, *file, code=2)
