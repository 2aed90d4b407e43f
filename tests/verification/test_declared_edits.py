"""``verify --source``: every tensor is what the edit says, and everything else is the source's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures.zoo import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from abliterate.verification import edit_check

Tensors = dict[str, torch.Tensor]
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def _direction(folder: Path, width: int = 48, seed: int = 1) -> Path:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(width, generator=generator, dtype=torch.float64)
    path = folder / f"direction{seed}.safetensors"
    save_file({"direction": vector}, path, {"layer": "2", "position": "-1"})
    return path


def _unit(path: Path) -> torch.Tensor:
    vector = load_file(path)["direction"]
    return vector / vector.norm()


def _rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)


def _verdict(out: str) -> list[str]:
    """The lines that say what is wrong."""
    words = ("wrong:", "not the edit:", "still writes:", "changed:", "missing:", "added:")
    return [line for line in out.splitlines() if line.startswith(words)]


class Case:
    """A source and its edited copy, which tests spoil in copies."""

    def __init__(self, cli, source: Path, folder: Path, *options: str) -> None:
        self.cli, self.source, self.folder = cli, source, folder
        self.direction, self.out = _direction(folder), folder / "edited"
        self.base = ("--direction", self.direction)
        result = cli("orthogonalize", source, *self.base, "-o", self.out, *options)
        assert result.code == 0, result.err

    def copy(self) -> Path:
        target = self.folder / "copy"
        shutil.rmtree(target, ignore_errors=True)
        return shutil.copytree(self.out, target)

    def verify(self, out: Path, *options: str | Path):
        return self.cli("verify", out, *self.base, "--source", self.source, *options)

    def caught(self, out: Path) -> str:
        """The single line that says what is wrong with a checkpoint."""
        result = self.verify(out)
        assert result.code == 6, result.out + result.err
        (line,) = _verdict(result.out)
        return line


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_verify_catches_every_spoiled_writer(dtype, tiny, cli, tmp_path: Path) -> None:
    case = Case(cli, tiny("llama", False, dtype), tmp_path)
    assert case.verify(case.out).code == 0
    source, unit = load_file(case.source / "model.safetensors"), _unit(case.direction)
    other = _unit(_direction(tmp_path, seed=2))
    old, wide = source[O_PROJ], source[O_PROJ].double()
    part = torch.outer(unit, unit @ wide)
    noise = torch.randn(48, 48, generator=torch.Generator().manual_seed(3)).double()
    noise = noise / noise.norm() * wide.norm()
    spoiled = {
        "is zero": torch.zeros_like(wide),
        "values are not": noise - torch.outer(unit, unit @ noise),
        "lost -1 of the direction, not 1": wide + part,
        "lost 0.9 of the direction, not 1": wide - 0.9 * part,
        "values are not the source's": wide - torch.outer(other, other @ wide),
        "values are not the source's less": wide - torch.outer(wide @ unit, unit),
        "was not edited": wide,
        "holds NaN": wide * torch.nan,
    }
    for message, value in spoiled.items():
        out = case.copy()
        _rewrite(out, lambda tensors, new=value: tensors.update({O_PROJ: new.to(dtype)}))
        line = case.caught(out)
        assert line.startswith(f"not the edit: {O_PROJ} ")
        assert message in line
    assert old.dtype == dtype


def test_verify_catches_every_other_change(tiny, cli, tmp_path: Path) -> None:
    case = Case(cli, tiny("llama", False, torch.bfloat16), tmp_path)

    def flip(tensors: Tensors) -> None:
        tensors["lm_head.weight"].view(torch.int16)[3, 4] ^= 1

    def template(out: Path) -> None:
        path = next(p for p in out.iterdir() if "<|start|>" in p.read_text(errors="ignore"))
        path.write_text(path.read_text().replace("<|start|>", "<|begin|>"))

    def config(out: Path) -> None:
        document = json.loads((out / "config.json").read_text()) | {"rms_norm_eps": 0.1}
        (out / "config.json").write_text(json.dumps(document))

    def tokenizer(out: Path) -> None:
        content = bytearray((out / "tokenizer.json").read_bytes())
        content[-3] ^= 1
        (out / "tokenizer.json").write_bytes(content)

    spoilers: dict[str, Callable[[Path], object]] = {
        "changed: lm_head.weight": lambda out: _rewrite(out, flip),
        "changed: model.norm.weight": lambda out: _rewrite(
            out, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].float()})
        ),
        "added: model.more": lambda out: _rewrite(
            out, lambda t: t.update({"model.more": torch.ones(2)})
        ),
        "missing: model.norm.weight": lambda out: _rewrite(
            out, lambda t: t.pop("model.norm.weight")
        ),
        "wrong: tokenizer.json is not the source's": tokenizer,
        "is not the source's": template,
        "wrong: tokenizer_config.json is missing": lambda out: (
            out / "tokenizer_config.json"
        ).unlink(),
        "wrong: other.jinja is not of the source": lambda out: (out / "other.jinja").write_text(""),
        "wrong: more.bin is not of the source": lambda out: (out / "more.bin").write_text(""),
        "wrong: config.json says rms_norm_eps: 0.1": config,
    }
    for message, spoil in spoilers.items():
        out = case.copy()
        spoil(out)
        assert message in case.caught(out)
    out = case.copy()
    (out / "NOTES.md").write_text("harmless")
    (out / ".gitattributes").write_text("")
    assert case.verify(out).code == 0


def test_verify_catches_layers_off_by_one(tiny, cli, tmp_path: Path) -> None:
    case = Case(cli, tiny(), tmp_path, "--layers", "1-2", "--components", "mlp")
    result = case.verify(case.out)
    assert result.code == 0, result.out
    assert "writers are as they were" in result.out
    shifted = tmp_path / "shifted"
    base = ("orthogonalize", case.source, *case.base, "-o", shifted, "--components", "mlp")
    assert cli(*base, "--layers", "2-3").code == 0
    shutil.copy(case.out / "abliterate.json", shifted / "abliterate.json")
    result = case.verify(shifted)
    assert result.code == 6
    assert [line.partition(" is the")[0] for line in _verdict(result.out)] == [
        f"not the edit: {DOWN}", "changed: model.layers.3.mlp.down_proj.weight",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", ("--scale", "0.5")),
        ("llama-bias", ("--scale=-1",)),
        ("llama-bias", ("--norm-preserve",)),
        ("llama", ("--norm-preserve", "--scale", "1.2", "--layers", "0-1")),
        ("llama", ("--add", "-0.5")),
        ("llama-bias", ("--add", "2")),
        ("qwen2", ("--tied-embeddings", "share")),
        ("qwen2", ("--tied-embeddings", "skip")),
        ("gemma", ("--components", "embedding")),
    ],
)
def test_verify_accepts_each_option_of_the_editor(
    kind: str, options: tuple[str, ...], tiny, cli, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(edit_check, "_READ", 900)  # blocks that end in the middle of things
    monkeypatch.setattr(edit_check, "_COMPUTED", 300)
    case = Case(cli, tiny(kind, True, torch.bfloat16), tmp_path, *options)
    result = case.verify(case.out)
    assert result.code == 0, result.out
    assert "the edit's own record" in result.out
    record = json.loads((case.out / "abliterate.json").read_text())
    record["options"] = dict.fromkeys(record["options"]) | {
        "tied_embeddings": "untie", "scale": 1.0, "leave_behind": [],
    }  # fmt: skip
    (case.out / "abliterate.json").write_text(json.dumps(record))
    assert case.verify(case.out).code == 6  # the same files are no plain edit


@pytest.mark.parametrize("model_type", ["gpt_oss", "gemma2", "mixtral"])
@pytest.mark.parametrize("options", [(), ("--norm-preserve",)])
def test_verify_checks_experts_and_gains(
    model_type: str, options: tuple[str, ...], cli, tmp_path: Path
) -> None:
    tiny_model(model_type).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    case = Case(cli, tmp_path / "source", tmp_path, *options)
    assert case.verify(case.out).code == 0
    source, unit = load_file(case.source / "model.safetensors"), _unit(case.direction)
    name = {
        "gpt_oss": "model.layers.2.mlp.experts.down_proj",
        "gemma2": "model.layers.2.mlp.down_proj.weight",
        "mixtral": "model.layers.2.block_sparse_moe.experts.1.w2.weight",
    }[model_type]

    def spoil(tensors: Tensors) -> None:
        if model_type == "gemma2":  # r itself, without the gain
            wide = source[name].double()
            tensors[name] = (wide - torch.outer(unit, unit @ wide)).bfloat16()
        elif model_type == "gpt_oss":
            tensors[name][3] = source[name][3]  # one expert of a fused stack
        else:
            tensors[name] = source[name]

    out = case.copy()
    _rewrite(out, spoil)
    line = case.caught(out)
    assert line.startswith(f"not the edit: {name} ")
    if model_type == "gpt_oss":
        assert "first at [3, " in line


def _fp8(matrix: torch.Tensor, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = -(-matrix.shape[0] // size), -(-matrix.shape[1] // size)
    values = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            tile = (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
            scales[i, j] = matrix[tile].abs().max() / 448
            values[tile] = (matrix[tile] / scales[i, j]).clamp(-448, 448).to(values.dtype)
    return values, scales


@pytest.fixture
def fp8(tiny, tmp_path: Path) -> Path:
    folder = shutil.copytree(tiny("llama"), tmp_path / "fp8")

    def quantize(tensors: Tensors) -> None:
        for name in [name for name in tensors if "proj" in name]:
            tensors[name], tensors[f"{name}_scale_inv"] = _fp8(tensors[name])

    _rewrite(folder, quantize)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("choice", ["requantize", "dequantize"])
def test_verify_accepts_quantized_edits_and_catches_spoiled_ones(
    choice: str, fp8: Path, cli, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(edit_check, "_READ", 900)
    case = Case(cli, fp8, tmp_path, f"--{choice}")
    result = case.verify(case.out, "--json")
    assert result.code == 0, result.json
    assert cli("verify", case.out, *case.base).code == 0
    again, scale = f"{DOWN}_scale_inv", 1.0

    def zero(tensors: Tensors) -> None:
        tensors[DOWN] = torch.zeros_like(tensors[DOWN].float()).to(tensors[DOWN].dtype)
        if again in tensors:  # huge steps, in which zero would be near enough to anything
            tensors[again] *= 1e6

    def flat(tensors: Tensors) -> None:
        tensors[again if again in tensors else DOWN] *= 1.3

    def old(tensors: Tensors) -> None:
        source = load_file(fp8 / "model.safetensors")
        if again in tensors:
            tensors[DOWN], tensors[again] = source[DOWN], source[again]
        else:
            wide = source[again].repeat_interleave(16, 0).repeat_interleave(16, 1)
            rows, columns = source[DOWN].shape
            tensors[DOWN] = (source[DOWN].float() * wide[:rows, :columns] * scale).bfloat16()

    for spoil in (zero, flat, old):
        out = case.copy()
        _rewrite(out, spoil)
        assert case.caught(out).startswith(f"not the edit: {DOWN} ")


def test_verify_of_a_foreign_edit_says_what_it_could_not_check(tiny, cli, tmp_path: Path) -> None:
    """No record: as another tool would have saved it, config and tokenizer written anew."""
    case = Case(cli, tiny("qwen2"), tmp_path, "--tied-embeddings", "share")
    out = case.copy()
    (out / "abliterate.json").unlink()
    (out / "tokenizer_config.json").unlink()
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"transformers_version": "0"}))
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    result = case.verify(out)
    assert result.code == 0, result.out
    assert "holds no abliterate.json" in result.out
    assert "tied embeddings: share" in result.out
    (out / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0, "hidden_act": "gelu"}))
    assert "hidden_act" in case.caught(out)
    (out / "config.json").write_text(json.dumps(config))
    _rewrite(out, lambda tensors: tensors[DOWN].zero_())
    assert case.caught(out) == f"not the edit: {DOWN} is zero"


def test_verify_refuses_a_record_that_is_none(tiny, cli, fails, tmp_path: Path) -> None:
    case = Case(cli, tiny("llama"), tmp_path)
    record = json.loads((case.out / "abliterate.json").read_text())
    base = ("verify", case.out, *case.base, "--source", case.source)
    for options in (None, {"scale": "1"}, {"scale": 0}, {"layers": "9-1"}, {"quantized": "x"}):
        (case.out / "abliterate.json").write_text(json.dumps(record | {"options": options}))
        assert "no record of an edit" in fails(*base, code=3)
    (case.out / "abliterate.json").write_text(json.dumps(record | {"options": {"layers": "9"}}))
    assert "layers 0 to 3" in fails(*base, code=4)
    other = _direction(tmp_path, seed=5)
    (case.out / "abliterate.json").write_text(json.dumps(record))
    result = cli("verify", case.out, "--direction", other, "--source", case.source)
    assert result.code == 6
    assert "records another direction than the one given" in _verdict(result.out)[0]
