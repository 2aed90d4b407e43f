"""Every shape and storage of a writer: boxes, several directions, fused experts, FP8, MXFP4."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.checkpoints.shards import read_shards
from abliterate.editing import matrix_orthogonalization, planning
from abliterate.editing.edit_plan import EditPlan, TensorEdit, make_plan

WIDTH = 64


@pytest.fixture(scope="module")
def direction(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    vector = torch.randn(48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    save_file({"direction": vector, "wide": torch.ones(WIDTH)}, path)
    return path


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def basis(count: int = 1, seed: int = 9) -> torch.Tensor:
    matrix = random(WIDTH, count, seed=seed).double()
    return torch.linalg.qr(matrix).Q.T.contiguous()


def without(matrix: torch.Tensor, axis: int, rows: torch.Tensor) -> torch.Tensor:
    """``matrix`` with the span of ``rows`` projected out along an axis, in float64."""
    moved = matrix.double().movedim(axis, -1)
    return (moved - moved @ rows.T @ rows).movedim(-1, axis)


@pytest.fixture
def edit(monkeypatch, tmp_path: Path, direction: Path, cli) -> Callable[..., dict]:
    """Run a plan made by hand over a checkpoint of given tensors; returns the output's tensors."""

    def run(
        tensors: dict[str, torch.Tensor], edits: list[TensorEdit], *options: str, config=None
    ) -> dict[str, torch.Tensor]:
        source, out = tmp_path / "source", tmp_path / "out"
        source.mkdir(exist_ok=True)
        save_file(tensors, source / "model.safetensors")
        (source / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))

        def plan(*args: object) -> EditPlan:
            return EditPlan(read_shards(source), tuple(edits))

        monkeypatch.setattr(planning, "make_plan", plan)
        result = cli("orthogonalize", source, "--direction", direction, "-o", out, "--json",
                     "--overwrite", *options)  # fmt: skip
        assert result.code == 0, result.err
        run.record = result.json
        return load_file(out / "model.safetensors")

    return run


_BOXES = [
    ((WIDTH,), 0, None),
    ((WIDTH, 40), 0, None),
    ((40, WIDTH), 1, None),
    ((3, WIDTH, 20), 1, None),
    ((3, 20, WIDTH), 2, None),
    ((WIDTH, 20, 1), 0, None),
    ((1, WIDTH, 1), 1, None),
    ((WIDTH, 5, 7), 0, None),
    ((40, WIDTH), 1, ((10, 25), (0, WIDTH))),
    ((WIDTH, 40), 0, ((0, WIDTH), (7, 30))),
    ((5, WIDTH, 20), 1, ((1, 3), (0, WIDTH), (0, 20))),
    ((5, WIDTH, 20), 1, ((1, 3), (0, WIDTH), (4, 9))),
    ((5, 20, WIDTH), 2, ((1, 3), (2, 19), (0, WIDTH))),
    ((2, 3, WIDTH, 4, 5), 2, ((0, 2), (1, 2), (0, WIDTH), (1, 4), (2, 3))),
]


@pytest.mark.parametrize("block", [1 << 19, 150])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_axis_box_and_dtype(block: int, dtype: torch.dtype, edit, monkeypatch) -> None:
    monkeypatch.setattr(matrix_orthogonalization, "_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(
        "abliterate.checkpoints.disk_matrix._MAX_COLUMNS", 17 if block < 1000 else 1 << 18
    )
    monkeypatch.setattr("abliterate.editing.shard_tasks._EDIT_BYTES", 4 * block)
    rows = basis(2)
    tensors = {f"t{i}": random(*shape, seed=i).to(dtype) for i, (shape, *_) in enumerate(_BOXES)}
    tensors["other"] = random(7, 3).to(dtype)
    edits = [
        TensorEdit(f"t{i}", axis, rows[: 1 + i % 2], "mlp", 0, region)
        for i, (_, axis, region) in enumerate(_BOXES)
    ]
    edited = edit(tensors, edits)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps * 8)
    for i, (shape, axis, region) in enumerate(_BOXES):
        box = tuple(slice(*ends) for ends in region or [(0, size) for size in shape])
        expected = tensors[f"t{i}"].double().clone()
        expected[box] = without(expected[box], axis, rows[: 1 + i % 2])
        assert torch.allclose(edited[f"t{i}"].double(), expected, atol=tolerance, rtol=0), i
        outside = torch.ones(shape, dtype=torch.bool)
        outside[box] = False
        assert torch.equal(edited[f"t{i}"][outside], tensors[f"t{i}"][outside])
        assert edited[f"t{i}"].dtype == dtype
        entry = edit.record["tensors"][i]
        part = tensors[f"t{i}"].double()[box]
        kept = without(part, axis, rows[: 1 + i % 2])
        share = float((part - kept).norm() / part.norm())
        assert entry["before"] == pytest.approx(share, rel=1e-2)
    assert torch.equal(edited["other"], tensors["other"])


def test_two_boxes_of_one_tensor_with_different_directions(edit) -> None:
    first, second = basis(1, 3), basis(2, 4)
    tensor = random(WIDTH, 30).bfloat16()
    boxes = [((0, WIDTH), (0, 10)), ((0, WIDTH), (12, 30))]
    edited = edit(
        {"w": tensor},
        [TensorEdit("w", 0, rows, "mlp", 0, box) for rows, box in
         zip((first, second), boxes, strict=True)],
    )["w"].double()  # fmt: skip
    wide = tensor.double()
    assert torch.allclose(edited[:, :10], without(wide[:, :10], 0, first), atol=2e-2)
    assert torch.equal(edited[:, 10:12], wide[:, 10:12])
    assert torch.allclose(edited[:, 12:], without(wide[:, 12:], 0, second), atol=2e-2)


def test_the_number_of_threads_does_not_change_a_byte(edit, monkeypatch) -> None:
    monkeypatch.setattr("abliterate.editing.shard_tasks._EDIT_BYTES", 5000)
    monkeypatch.setattr(matrix_orthogonalization, "_BLOCK_ELEMENTS", 999)
    tensors = {"a": random(300, WIDTH).bfloat16(), "b": random(WIDTH, 300).bfloat16()}
    edits = [TensorEdit("a", 1, basis(), "mlp", 0), TensorEdit("b", 0, basis(), "mlp", 0)]
    one = edit(tensors, edits, "--jobs", "1")
    record = edit.record
    many = edit(tensors, edits, "--jobs", "5")
    assert all(torch.equal(one[name], many[name]) for name in one)
    assert edit.record["tensors"] == record["tensors"]


# FP8 and MXFP4 by the book, independently of the editor.


def to_fp8(matrix: torch.Tensor, size: int, scale_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    rows, columns = -(-matrix.shape[0] // size), -(-matrix.shape[1] // size)
    values = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, columns, dtype=scale_dtype)
    for i in range(rows):
        for j in range(columns):
            tile = (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
            scales[i, j] = matrix[tile].abs().max() / 448
            values[tile] = (matrix[tile] / scales[i, j].float()).clamp(-448, 448).to(values.dtype)
    return values, scales


def from_fp8(values: torch.Tensor, scales: torch.Tensor, size: int) -> torch.Tensor:
    wide = scales.double().repeat_interleave(size, 0).repeat_interleave(size, 1)
    return values.double() * wide[: values.shape[0], : values.shape[1]]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def fp8(request, tiny, tmp_path_factory) -> Path:
    """A tiny Llama whose linear layers are FP8 in blocks of 20 x 20."""
    folder = tmp_path_factory.mktemp("fp8")
    for file in tiny("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(tensor, 20, request.param)
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [20, 20]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_fp8_needs_a_choice(fp8: Path, direction: Path, fails, tmp_path: Path) -> None:
    base = ("orthogonalize", fp8, "--direction", direction, "-o", tmp_path / "out")
    line = fails(*base, code=4)
    assert "o_proj.weight" in line or "down_proj.weight" in line
    assert "--requantize" in line
    assert "--dequantize" in line
    assert line in fails("run", fp8, "-o", tmp_path / "run", code=4)  # before the first stage
    assert "exclude" in fails(*base, "--requantize", "--dequantize", code=2)
    assert not list(tmp_path.iterdir())


def test_fp8_writers_are_those_of_the_plain_model(fp8: Path, tiny, cli) -> None:
    quantized, plain = (cli("writers", source, "--json").json for source in (fp8, tiny("llama")))
    assert quantized == plain


def _in_fp8(source: Path, folder: Path, size: int) -> Path:
    """A copy of a checkpoint whose linear layers are FP8 in blocks of ``size`` x ``size``."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(tensor, size, torch.float32)
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [size, size]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


_FEW = ("--n-train", "8", "--positions=-1", "--refusal-token", "5", "--no-filter", "-q")


def test_products_that_the_machine_lacks_are_told_when_the_model_is_loaded(
    tiny, fails, tmp_path: Path, monkeypatch
) -> None:
    """As on a GPU without the package of FP8 kernels, of which transformers tells at the first
    product alone: here it is made to keep the matrices as on one."""
    from transformers.quantizers import quantizer_finegrained_fp8 as module

    kind = module.FineGrainedFP8HfQuantizer
    monkeypatch.setattr(kind, "validate_environment", lambda self, *args, **kwargs: None)
    fp8 = _in_fp8(tiny("llama"), tmp_path / "fp8", 8)
    line = fails("extract", fp8, "-o", tmp_path / "run", *_FEW, "--dtype", "bfloat16", code=4)
    assert f"{fp8} is quantised (fp8), which cannot be used here: " in line
    assert "kernel" in line
    assert line.endswith("mend that, or use the checkpoint that it was made from")
    assert not (tmp_path / "run").exists()
    for error in (ImportError("no kernels"), OSError("no hub"), RuntimeError("no build for sm_12")):

        def refuse(self, *args, error=error, **kwargs) -> None:
            raise error

        monkeypatch.setattr(kind, "validate_environment", refuse)
        line = fails("extract", fp8, "-o", tmp_path / "run", *_FEW, code=4)
        assert f"is quantised (fp8), which cannot be used here: {error}: mend that" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers multiplies FP8 there")
def test_fp8_is_loaded_for_its_activations(tiny, cli, tmp_path: Path) -> None:
    """Where the machine cannot multiply FP8, transformers widens it: to what it stands for."""
    fp8, plain = _in_fp8(tiny("llama"), tmp_path / "fp8", 8), tmp_path / "plain"
    stored = load_file(fp8 / "model.safetensors")
    plain.mkdir()
    for file in fp8.iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    wide = {
        name: from_fp8(tensor, stored[f"{name}_scale_inv"], 8).bfloat16()
        if f"{name}_scale_inv" in stored
        else tensor
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }
    save_file(wide, plain / "model.safetensors", {"format": "pt"})
    (plain / "config.json").write_bytes((tiny("llama") / "config.json").read_bytes())
    means = []
    for source in (fp8, plain):
        run = tmp_path / f"run of {source.name}"
        assert cli("extract", source, "-o", run, *_FEW, "--dtype", "bfloat16").code == 0
        means.append(load_file(run / "directions.safetensors")["mean_harmful"].flatten())
    assert torch.cosine_similarity(*means, dim=0) > 0.9999


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU need not widen FP8")
def test_fp8_that_would_be_widened_wrongly_is_refused(tiny, fails, tmp_path: Path) -> None:
    """The library spreads the scales of a matrix evenly, whatever the size of its blocks."""
    fp8 = _in_fp8(tiny("llama"), tmp_path / "fp8", 20)  # 48 rows: blocks of 20, 20 and 8
    line = fails("extract", fp8, "-o", tmp_path / "run", *_FEW, code=4)
    assert "proj.weight" in line
    assert "no multiples of its FP8 blocks (20 x 20)" in line


def test_fp8_is_edited_and_stored_again(fp8: Path, direction: Path, cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli(
        "orthogonalize", fp8, "--direction", direction, "-o", out, "--requantize", "--json"
    )
    assert result.code == 0, result.err
    before, after = (load_file(folder / "model.safetensors") for folder in (fp8, out))
    unit = load_file(direction)["direction"]
    unit = unit / unit.norm()
    named = {entry["name"]: entry for entry in result.json["tensors"]}
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        weight = name.removesuffix("_scale_inv")
        assert (after[name].view(torch.uint8).equal(tensor.view(torch.uint8))) == (
            weight not in named
        ), name
    for name, entry in named.items():
        if "proj" in name:
            old, new = (from_fp8(t[name], t[f"{name}_scale_inv"], 20) for t in (before, after))
            exact = without(old, 0, unit.unsqueeze(0))
            assert (new - exact).abs().max() <= exact.abs().max() / 16
            assert entry["before"] == pytest.approx(
                float((unit @ old).norm() / old.norm()), rel=1e-3
            )
            assert entry["after"] == pytest.approx(
                float((unit @ new).norm() / old.norm()), rel=1e-3
            )
            assert entry["after"] < 0.03 < entry["before"]
    assert result.json["promise"]["tensors_orthogonal"] is False
    assert "rounded again" in result.json["promise"]["limits"][0]
    assert (out / "config.json").read_bytes() == (fp8 / "config.json").read_bytes()


def test_fp8_becomes_bfloat16(fp8: Path, direction: Path, cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = cli(
        "orthogonalize", fp8, "--direction", direction, "-o", out, "--dequantize", "--json"
    )
    assert result.code == 0, result.err
    before, after = (load_file(folder / "model.safetensors") for folder in (fp8, out))
    unit = load_file(direction)["direction"]
    unit = (unit / unit.norm()).unsqueeze(0)
    edited = {entry["name"] for entry in result.json["tensors"] if "proj" in entry["name"]}
    assert set(before) - set(after) == {f"{name}_scale_inv" for name in edited}
    for name in edited:
        old = from_fp8(before[name], before[f"{name}_scale_inv"], 20)
        assert after[name].dtype == torch.bfloat16
        assert torch.allclose(after[name].double(), without(old, 0, unit), atol=1e-2)
    for name in set(after) - edited - {"model.embed_tokens.weight"}:
        assert after[name].view(torch.uint8).equal(before[name].view(torch.uint8))
    kept = json.loads((out / "config.json").read_text())["quantization_config"]
    assert kept["quant_method"] == "fp8"
    assert set(kept["modules_to_not_convert"]) == {n.removesuffix(".weight") for n in edited}
    assert max(entry["after"] for entry in result.json["tensors"]) < 2e-3


def test_fp8_scales_in_another_shard(fp8: Path, direction: Path, cli, tmp_path: Path) -> None:
    source, out, whole = tmp_path / "source", tmp_path / "out", tmp_path / "whole"
    source.mkdir()
    for file in fp8.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "model.safetensors").unlink()
    tensors = load_file(fp8 / "model.safetensors")
    scales = {name: t for name, t in tensors.items() if name.endswith("_scale_inv")}
    shards = {"a.safetensors": {n: t for n, t in tensors.items() if n not in scales},
              "b.safetensors": scales}  # fmt: skip
    for file, part in shards.items():
        save_file(part, source / file, {"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    base = ("orthogonalize", "--direction", direction, "--requantize")
    assert cli(*base, source, "-o", out).code == 0
    assert cli(*base, fp8, "-o", whole).code == 0
    expected = load_file(whole / "model.safetensors")
    moved = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert moved.keys() == expected.keys()
    for name, file in moved.items():
        found = load_file(out / file)[name]
        assert found.view(torch.uint8).equal(expected[name].view(torch.uint8)), name


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6.0])


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``[E, rows, columns]`` of ``[E, rows, groups, 16]`` bytes."""
    pairs = torch.stack((FP4[(blocks & 15).int()], FP4[(blocks >> 4).int()]), -1).flatten(-2)
    return (pairs.double() * torch.exp2(scales.double() - 127).unsqueeze(-1)).flatten(-2)


@pytest.fixture
def experts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    tensors = {"norm": random(5)}
    for name, rows, columns in (("down_proj", WIDTH, 96), ("gate_up_proj", 32, WIDTH)):
        shape = (3, rows, columns // 32)
        tensors[f"m.experts.{name}_blocks"] = torch.randint(
            0, 256, (*shape, 16), generator=generator, dtype=torch.uint8
        )
        tensors[f"m.experts.{name}_scales"] = torch.randint(
            118, 124, shape, generator=generator, dtype=torch.uint8
        )
    return tensors


_GPT_OSS = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}


def test_mxfp4_is_edited_and_stored_again(edit, experts) -> None:
    rows, name = basis(), "m.experts.down_proj"
    # As the model has it: [experts, in, out], the transpose of what lies on disk.
    plan = [TensorEdit(name, 2, rows, "expert", 0)]
    after = edit(experts, plan, "--requantize", config=_GPT_OSS)
    assert after.keys() == experts.keys()
    old = from_mxfp4(experts[f"{name}_blocks"], experts[f"{name}_scales"])
    new = from_mxfp4(after[f"{name}_blocks"], after[f"{name}_scales"])
    exact = without(old, 1, rows)
    assert (new - exact).norm() / exact.norm() < 0.12
    (entry,) = edit.record["tensors"]
    assert entry["name"] == f"{name}_blocks"
    assert entry["axis"] == 1
    share = float((rows @ new).norm() / old.norm())
    assert entry["after"] == pytest.approx(share, rel=1e-3)
    assert entry["after"] < entry["before"] / 3
    for other in ("norm", "m.experts.gate_up_proj_blocks", "m.experts.gate_up_proj_scales"):
        assert torch.equal(after[other], experts[other])


def test_mxfp4_of_some_experts_alone(edit, experts) -> None:
    rows, name = basis(), "m.experts.down_proj"
    boxes = [((1, 2), (0, WIDTH), (0, 96)), ((2, 3), (0, WIDTH), (0, 96))]
    plan = [TensorEdit(f"{name}_blocks", 1, rows, "expert", 0, box) for box in boxes]
    after = edit(experts, plan, "--requantize", config=_GPT_OSS)
    old = from_mxfp4(experts[f"{name}_blocks"], experts[f"{name}_scales"])
    new = from_mxfp4(after[f"{name}_blocks"], after[f"{name}_scales"])
    assert torch.equal(new[0], old[0])
    exact = without(old[1:], 1, rows)
    assert (new[1:] - exact).norm() / exact.norm() < 0.12


def test_mxfp4_rounding_keeps_what_it_can_hold(edit, experts) -> None:
    """Nothing lies along an axis that is zero: every value is stored as it was."""
    name = "m.experts.down_proj"
    experts[f"{name}_blocks"][:, 5] = 0
    rows = torch.zeros(1, WIDTH, dtype=torch.float64)
    rows[0, 5] = 1
    plan = [TensorEdit(f"{name}_blocks", 1, rows, "expert", 0)]
    after = edit(experts, plan, "--requantize", config=_GPT_OSS)
    old = from_mxfp4(experts[f"{name}_blocks"], experts[f"{name}_scales"])
    assert torch.equal(old, from_mxfp4(after[f"{name}_blocks"], after[f"{name}_scales"]))


def test_mxfp4_becomes_bfloat16(edit, experts, tmp_path: Path) -> None:
    rows, name = basis(), "m.experts.down_proj"
    plan = [TensorEdit(name, 2, rows, "expert", 0)]
    after = edit(experts, plan, "--dequantize", config=_GPT_OSS)
    assert after.keys() == {"norm", "m.experts.gate_up_proj", name}
    down = from_mxfp4(experts[f"{name}_blocks"], experts[f"{name}_scales"])
    assert after[name].shape == (3, 96, WIDTH)
    assert after[name].dtype == torch.bfloat16
    expected = without(down, 1, rows).transpose(1, 2)
    assert torch.allclose(after[name].double(), expected, atol=2e-3)
    gate = "m.experts.gate_up_proj"
    other = from_mxfp4(experts[f"{gate}_blocks"], experts[f"{gate}_scales"]).transpose(1, 2)
    assert torch.equal(after[gate].double(), other)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_plain_plan_is_what_the_architecture_gives(tiny) -> None:
    from abliterate.models.loading import Checkpoint

    plan = make_plan(Checkpoint("x", tiny("llama")), torch.ones(48))
    assert {edit.kind for edit in plan.edits} == {"embedding", "attention", "mlp"}
