"""The options: which tensors, how much, tied embeddings, the addition, adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from abliterate import ablate, add

IDS = torch.randint(0, 512, (3, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def direction(tmp_path_factory) -> Path:
    generator = torch.Generator().manual_seed(11)
    vector = torch.randn(48, generator=generator, dtype=torch.float64) * torch.arange(1, 49) / 7
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    save_file({"direction": vector}, path, {"position": "-1", "layer": "2"})
    return path


@pytest.fixture
def unit(direction: Path) -> torch.Tensor:
    vector = load_file(direction)["direction"]
    return vector / vector.norm()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.double()


@pytest.mark.parametrize(
    ("options", "edited"),
    [
        (("--layers", "1-2"), ["1.attention", "1.mlp", "2.attention", "2.mlp"]),
        (("--layers", "0,3", "--components", "mlp"), ["0.mlp", "3.mlp"]),
        (("--components", "embedding"), ["None.embedding"]),
        (("--layers", "3", "--components", "embedding,attention"),
         ["3.attention", "None.embedding"]),
    ],
)  # fmt: skip
def test_part_of_the_writers(options, edited, tiny, cli, direction, tmp_path: Path) -> None:
    source, out = tiny("llama", True), tmp_path / "out"
    result = cli("orthogonalize", source, "--direction", direction, "-o", out, "--json", *options)
    assert result.code == 0, result.err
    named = {entry["name"]: entry for entry in result.json["tensors"]}
    assert sorted(f"{e['layer']}.{e['kind']}" for e in named.values()) == edited
    before, after = tensors(source), tensors(out)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (name not in named)
    assert result.json["promise"]["stream_orthogonal"] is False
    assert result.json["promise"]["tensors_orthogonal"] is True
    assert "writers are as they were" in result.json["promise"]["limits"][0]
    assert "writers are as they were" in (out / "README.md").read_text()


def test_the_plain_edit_promises_all(tiny, cli, direction, tmp_path: Path) -> None:
    result = cli("orthogonalize", tiny(), "--direction", direction, "-o", tmp_path / "o", "--json")
    promise = result.json["promise"]
    assert promise == {
        "tensors_orthogonal": True, "stream_orthogonal": True, "remaining_share": 0, "limits": [],
    }  # fmt: skip


@pytest.mark.parametrize("scale", [0.8, 1.5, -1.0])
def test_scale_removes_a_share(scale: float, tiny, cli, direction, unit, tmp_path: Path) -> None:
    source, out = tiny("llama-bias"), tmp_path / "out"
    result = cli("orthogonalize", source, "--direction", direction, "-o", out, "--json",
                 f"--scale={scale}")  # fmt: skip
    assert result.code == 0, result.err
    before, after = tensors(source), tensors(out)
    for entry in result.json["tensors"]:
        old, new = (t[entry["name"]].double().movedim(entry["axis"], -1) for t in (before, after))
        expected = old - scale * (old @ unit).unsqueeze(-1) * unit
        assert torch.allclose(new, expected, atol=1e-6)
    assert result.json["promise"]["remaining_share"] == pytest.approx(1 - scale)
    assert result.json["options"]["scale"] == scale


def test_rows_keep_their_norm(tiny, cli, direction, unit, tmp_path: Path) -> None:
    source, out = tiny("llama"), tmp_path / "out"
    result = cli("orthogonalize", source, "--direction", direction, "-o", out, "--json",
                 "--norm-preserve")  # fmt: skip
    assert result.code == 0, result.err
    before, after = tensors(source), tensors(out)
    for entry in result.json["tensors"]:
        old, new = before[entry["name"]].double(), after[entry["name"]].double()
        assert torch.allclose(old.norm(dim=-1), new.norm(dim=-1), rtol=1e-5)
        assert not torch.equal(old, new)
        share = torch.tensordot(unit, new, dims=([0], [entry["axis"]])).norm() / old.norm()
        assert entry["after"] == pytest.approx(float(share), rel=1e-3, abs=1e-6)
        if entry["axis"] == 1:
            assert share < 1e-6  # scaling a row along the stream leaves it orthogonal
    assert result.json["promise"]["tensors_orthogonal"] is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_keep_their_norm_and_nothing_is_left_along_the_direction(
    dtype, tiny, cli, direction, unit, tmp_path: Path
) -> None:
    source, out = tiny("llama", False, dtype), tmp_path / "out"
    base = ("orthogonalize", source, "--direction", direction, "-o")
    result = cli(*base, out, "--norm-preserve", "columns", "--json")
    assert result.code == 0, result.err
    before, after = tensors(source), tensors(out)
    eps = torch.finfo(dtype).eps
    for entry in result.json["tensors"]:
        old, new = (t[entry["name"]].double().movedim(entry["axis"], -1) for t in (before, after))
        exact = old - (old @ unit).unsqueeze(-1) * unit
        exact = exact * (old.norm(dim=-1, keepdim=True) / exact.norm(dim=-1, keepdim=True))
        assert torch.allclose(new, exact, rtol=eps, atol=0)  # to the format's rounding
        assert float((new @ unit).norm() / new.norm()) < eps
    assert result.json["promise"]["tensors_orthogonal"] is True
    assert result.json["promise"]["stream_orthogonal"] is True
    assert result.json["options"]["norm_preserve"] == "columns"
    leaky = tmp_path / "rows"
    assert cli(*base, leaky, "--norm-preserve", "rows").code == 0
    alone = tmp_path / "alone"
    assert cli(*base, alone, "--norm-preserve").code == 0
    assert tensors(alone).keys() == tensors(leaky).keys()
    for name, tensor in tensors(alone).items():
        assert torch.equal(tensor, tensors(leaky)[name])


@pytest.mark.parametrize("choice", ["untie", "share", "skip"])
def test_tied_embeddings(choice: str, tiny, cli, direction, tmp_path: Path) -> None:
    source, out = tiny("qwen2", True), tmp_path / "out"
    result = cli("orthogonalize", source, "--direction", direction, "-o", out, "--json",
                 "--tied-embeddings", choice)  # fmt: skip
    assert result.code == 0, result.err
    before, after = tensors(source), tensors(out)
    embedding = "model.embed_tokens.weight"
    assert ("lm_head.weight" in after) == (choice == "untie")
    assert torch.equal(before[embedding], after[embedding]) == (choice == "skip")
    tied = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    assert tied == (choice != "untie")
    assert bool(result.json["promise"]["limits"]) == (choice != "untie")
    expected = load(source)
    if choice == "untie":
        with ablate(expected, load_file(direction)["direction"]):
            assert (logits(load(out)) - logits(expected)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "2-1"), "10-25"),
        (("--layers", "x"), "10-25"),
        (("--layers", "1,,2"), "10-25"),
        (("--layers", "2-9"), "layers 0 to 3"),
        (("--components", "mlp,heads"), "not 'heads'"),
        (("--components", "position,expert"), None),
        (("--components", "other"), "no tensor is left"),
        (("--scale", "0"), "other than zero"),
        (("--scale", "nan"), "other than zero"),
        (("--jobs", "0"), "jobs"),
        (("--tied-embeddings", "cut"), "untie"),
        (("--add", "0"), "other than zero"),
        (("--add", "1", "--scale", "2"), "--add"),
        (("--as-lora", "--norm-preserve"), "--as-lora"),
        (("--as-lora", "--norm-preserve", "columns"), "--as-lora"),
        (("--norm-preserve=cells",), "columns"),
        (("--device", "abacus"), "--device abacus"),
    ],
)
def test_wrong_options(options, message, tiny, fails, direction, tmp_path: Path) -> None:
    line = fails("orthogonalize", tiny("llama"), "--direction", direction, "-o", tmp_path / "out",
                 *options, code=2)  # fmt: skip
    assert message is None or message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["llama", "llama-bias"])
@pytest.mark.parametrize("coeff", [1.0, -0.5])
def test_the_addition_is_baked_in(
    kind: str, coeff: float, tiny, cli, direction, tmp_path: Path
) -> None:
    source, out = tiny(kind, True), tmp_path / "out"
    result = cli("orthogonalize", source, "--direction", direction, "-o", out, "--json",
                 f"--add={coeff}")  # fmt: skip
    assert result.code == 0, result.err
    expected = load(source)
    edited, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    plain = logits(expected)
    with add(expected, load_file(direction)["direction"], 2, coeff):
        assert (logits(edited.eval()) - logits(expected)).abs().max() < 1e-4
    assert (logits(edited) - plain).abs().max() > 0.1
    before, after = tensors(source), tensors(out)
    changed = "model.layers.1.mlp.down_proj.bias"
    assert [entry["name"] for entry in result.json["tensors"]] == [changed]
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (name != changed)
    assert "direction added" in (out / "README.md").read_text()
    assert result.json["options"]["add"] == coeff


def test_the_addition_needs_a_place(tiny, fails, direction, tmp_path: Path) -> None:
    base = ("-o", tmp_path / "out", "--add", "1", "--direction")
    line = fails("orthogonalize", tiny("mistral"), *base, direction, code=4)
    assert "'mistral' model has no bias" in line
    vector = load_file(direction)["direction"]
    save_file({"direction": vector}, tmp_path / "bare.safetensors")
    save_file({"direction": vector}, tmp_path / "first.safetensors", {"layer": "0"})
    assert "record its layer" in fails(
        "orthogonalize", tiny("llama"), *base, tmp_path / "bare.safetensors", code=3
    )
    assert "first" in fails(
        "orthogonalize", tiny("llama"), *base, tmp_path / "first.safetensors", code=3
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [(), ("--scale", "0.5", "--layers", "1-2")])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_adapter_equals_the_checkpoint(
    kind: str, options, tiny, cli, direction, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="the extra [lora] is not installed")
    source, adapter, whole = tiny(kind, True), tmp_path / "adapter", tmp_path / "whole"
    base = ("orthogonalize", source, "--direction", direction, *options, "--json")
    result = cli(*base, "-o", adapter, "--as-lora")
    assert result.code == 0, result.err
    assert cli(*base, "-o", whole).code == 0
    loaded = peft.PeftModel.from_pretrained(load(source), adapter).eval()
    assert (logits(loaded) - logits(load(whole))).abs().max() < 1e-4
    assert (logits(loaded) - logits(load(source))).abs().max() > 0.01
    assert "model.safetensors" not in {path.name for path in adapter.iterdir()}


def test_the_adapter_holds_the_exact_update(tiny, cli, direction, unit, tmp_path: Path) -> None:
    source, out = tiny("llama", True), tmp_path / "out"
    result = cli(
        "orthogonalize", source, "--direction", direction, "-o", out, "--as-lora", "--json"
    )
    assert result.code == 0, result.err
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "abliterate.json", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    before, adapter = tensors(source), tensors(out)
    name = "base_model.model.model.layers.1.mlp.down_proj"
    weight = before["model.layers.1.mlp.down_proj.weight"].double()
    update = adapter[f"{name}.lora_B.weight"].double() @ adapter[f"{name}.lora_A.weight"].double()
    assert torch.allclose(update, -torch.outer(unit, unit @ weight), atol=1e-6)
    name = "base_model.model.model.embed_tokens"
    weight = before["model.embed_tokens.weight"].double()
    up, down = (adapter[f"{name}.lora_embedding_{side}"].double() for side in "BA")
    assert torch.allclose((up @ down).T, -torch.outer(weight @ unit, unit), atol=1e-6)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (1, 1)
    assert len(config["target_modules"]) == 9
    assert "library_name: peft" in (out / "README.md").read_text()


def test_an_adapter_holds_no_biases(tiny, fails, direction, tmp_path: Path) -> None:
    line = fails("orthogonalize", tiny("llama-bias"), "--direction", direction, "-o",
                 tmp_path / "out", "--as-lora", code=4)  # fmt: skip
    assert ".bias'" in line
    assert "without --as-lora" in line
    assert not list(tmp_path.iterdir())


def test_a_finished_edit_with_other_options_is_not_up_to_date(
    tiny, direction, tmp_path: Path
) -> None:
    from abliterate.direction_loading import load_direction
    from abliterate.models.loading import Checkpoint
    from abliterate.pipeline.edit_stage import orthogonalize_stage
    from abliterate.run_folder import Session
    from abliterate.settings import load_settings

    checkpoint, vector = Checkpoint("x", tiny("llama")), load_direction(direction)

    def run(**options: object) -> float:
        session = Session(checkpoint, load_settings(options={"orthogonalize": options}))
        record = orthogonalize_stage(session, vector, tmp_path / "out", reuse=True)
        assert record["options"]["scale"] == options.get("scale", 1.0)
        return (tmp_path / "out").stat().st_ino

    first = run()
    assert run() == first
    second = run(scale=0.5)
    assert second != first
    assert run(scale=0.5) == second


def test_the_device_changes_rounding_at_most(tiny, cli, fails, direction, tmp_path: Path) -> None:
    base = ("orthogonalize", tiny("llama"), "--direction", direction, "-o")
    assert "nonsense" in fails(*base, tmp_path / "out", "--device", "nonsense", code=2)
    assert cli(*base, tmp_path / "cpu").code == 0
    result = cli(*base, tmp_path / "auto", "--device", "auto", "--json")
    assert result.code == 0, result.err
    auto, cpu = tensors(tmp_path / "auto"), tensors(tmp_path / "cpu")
    assert auto.keys() == cpu.keys()
    for name, tensor in auto.items():
        assert torch.allclose(tensor, cpu[name], atol=1e-5), name
    found = torch.accelerator.current_accelerator(check_available=True)
    assert result.json["options"]["device"] == str(found or "cpu")
