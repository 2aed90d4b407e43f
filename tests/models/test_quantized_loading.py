"""Models in 8 and 4 bits: looked at as they are, edited in their original files."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import abliterate
from abliterate import extras
from abliterate.checkpoints.checkpoint import find_checkpoint
from abliterate.errors import CheckpointError, UsageError
from abliterate.inference.attention_heads import out_projections
from abliterate.models.device_placement import Placement
from abliterate.models.loading import load_config, load_model
from abliterate.models.quantized_loading import keep_precision, loading_failure, quantizer_options
from abliterate.offload.open_model import needed_memory
from abliterate.resources import demo_model_dir
from abliterate.writers import find_writers
from abliterate.writers.residual_stream import leak

# Its import takes seconds, which every worker would spend that collects this file.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="the extra [quantized] is not installed",
)

MODEL = str(demo_model_dir())
SMALL = ("--n-train", "16", "--positions=-2,-1", "-q")


def _record(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def _directions(run: Path) -> torch.Tensor:
    means = load_file(run / "directions.safetensors")
    return (means["mean_harmful"] - means["mean_harmless"]).flatten(0, 1)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's means in full precision."""
    from abliterate.cli.app import main

    run = tmp_path_factory.mktemp("plain") / "run"
    assert main(["extract", MODEL, "-o", str(run), *SMALL]) == 0
    return run


def _check_quantised(run: Path, plain: Path, bits: int) -> None:
    """The means of ``run`` are those of a model in so few bits: near the plain one's, not them."""
    record = _record(run, "extract.json")
    assert record["quantization"]["method"] == "bitsandbytes"
    assert record["quantization"]["bits"] == bits
    assert record["settings"]["model"]["load_in"] == f"{bits}bit"
    ours, theirs = _directions(run), _directions(plain)
    real = theirs.norm(dim=1) > 1e-3 * theirs.norm(dim=1).max()
    cosines = torch.nn.functional.cosine_similarity(ours[real], theirs[real], dim=1)
    assert 0.95 < float(cosines.min()) < 0.999999
    # Later stages take it from the record.
    selected = _record(run, "selection.json")
    assert selected["quantization"] == record["quantization"]
    assert selected["winner"] is not None


def test_stages_look_at_a_model_in_eight_bits_and_the_edit_is_of_the_files(
    plain_run: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    run = tmp_path / "run"
    assert cli("extract", MODEL, "-o", run, *SMALL, "--load-in", "8bit").code == 0
    assert cli("select", run, "--n-val", "8", "-q").code == 0
    _check_quantised(run, plain_run, 8)
    edited = tmp_path / "edited"
    assert cli("orthogonalize", MODEL, "--direction", run, "-q", "-o", edited).code == 0
    assert cli("verify", edited, "--source", MODEL, "--direction", run).code == 0
    assert "quantization_config" not in _record(edited, "config.json")


def test_run_in_four_bits_evaluates_hooks_and_edited_files_in_four_bits(
    plain_run: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    run = tmp_path / "run"
    command = ("run", MODEL, "-o", run, *SMALL[:-1], "--n-val", "8", "--n-test", "2",
               "--max-new-tokens", "3", "--load-in", "4bit")  # fmt: skip
    result = cli(*command)
    assert result.code == 0, result.err
    assert result.err.count("bitsandbytes 4bit") >= 2  # the model, and the edited one
    _check_quantised(run, plain_run, 4)
    assert cli("verify", run / "model", "--source", MODEL, "--direction", run).code == 0
    rows = _record(run, "evaluation.json")["interventions"]
    baseline, hooks, edited = (
        rows[name]["harmful"]["refusal_metric"] for name in ("baseline", "ablate", "orthogonalized")
    )
    assert baseline > hooks + 5
    # Both lack the direction; the numbers that the edited matrices are rounded to are others.
    assert edited == pytest.approx(hooks, abs=3)
    assert "loaded" not in cli(*command).err  # all is up to date


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_nothing_writes_along_an_ablated_direction_in_a_quantised_model(load_in: str) -> None:
    model = load_model(MODEL, "cpu", "float32", load_in=load_in).model
    plan = find_writers(model)
    vector = torch.randn(128, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([[1, 5, 9, 33, 70, 2]])
    assert leak(model, vector, ids, plan.blocks) > 1e-2
    with abliterate.ablate(model, vector):
        assert leak(model, vector, ids, plan.blocks) < 1e-5


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_heads_are_read_from_what_a_quantised_projection_does(load_in: str) -> None:
    unit = torch.randn(128, generator=torch.Generator().manual_seed(4)).double()
    unit = unit / unit.norm()
    ours, theirs = (
        out_projections(load_model(MODEL, "cpu", "float32", load_in=kind).model, unit)
        for kind in (load_in, "none")
    )
    assert len(ours) == len(theirs) == 8
    for one, other in zip(ours, theirs, strict=True):
        assert one.reader.shape == other.reader.shape
        off = (one.reader - other.reader).norm() / other.reader.norm()
        assert 0 < off < 0.15


def test_four_bit_products_keep_to_the_dtype_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with AVX-512 for bfloat16 packs matrices for products in bfloat16, if they divide."""
    from bitsandbytes.nn import Linear4bit

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = load_model(MODEL, "cpu", "float32", load_in="4bit").model
    fours = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(fours) == 7 * 8
    assert not any(module.support_avx512bf16_for_cpu for module in fours)
    assert not any(getattr(m.weight.quant_state, "packing_format_for_cpu", 0) for m in fours)

    def four(rows: int, columns: int, dtype: torch.dtype) -> Any:
        made = Linear4bit(columns, rows, compute_dtype=dtype, quant_type="nf4")
        return made.to("cpu")

    bf16 = torch.bfloat16
    shapes = [(64, 128, bf16), (48, 128, bf16), (64, 96, bf16), (64, 128, torch.float32)]
    some = torch.nn.ModuleList(four(*shape) for shape in shapes)
    keep_precision(some)
    assert [one.support_avx512bf16_for_cpu for one in some] == [True, False, False, False]


def test_no_compiled_code_is_fetched_from_a_hub(tmp_path: Path) -> None:
    """bitsandbytes asks the package kernels for some when it is imported, on some CPUs."""
    (tmp_path / "kernels.py").write_text(
        "def get_kernel(*args, **options):\n    open('fetched', 'w').close()\n    raise OSError\n"
    )
    code = (
        "import abliterate, sys\n"
        f"abliterate.load({MODEL!r}, device='cpu', load_in='4bit')\n"
        "import kernels; print(kernels.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path[1:]])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "kernels.py" in done.stdout  # whoever else asks for it gets it
    assert not (tmp_path / "fetched").exists()


@pytest.mark.parametrize("load_in", ["3bit", "8-bit", "", "4"])
def test_bits_that_there_are_not_are_refused(load_in: str) -> None:
    with pytest.raises(UsageError, match="must be none, 8bit or 4bit, not"):
        load_model(MODEL, "cpu", "float32", load_in=load_in)


def test_a_conversation_with_a_model_in_four_bits(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("How do I bake bread?\n"))
    result = cli("chat", MODEL, "--load-in", "4bit", "--max-new-tokens", "6", "--json")
    assert result.code == 0
    assert "bitsandbytes 4bit" in result.err
    assert result.json["turns"]


def test_a_checkpoint_that_bitsandbytes_stored_is_loaded_as_it_is(
    tmp_path: Path, cli: Callable[..., Any], fails: Callable[..., str]
) -> None:
    loaded = load_model(MODEL, "cpu", "float32", load_in="4bit")
    stored = tmp_path / "stored"
    loaded.model.save_pretrained(stored)
    loaded.tokenizer.save_pretrained(stored)
    run = tmp_path / "run"
    result = cli("extract", stored, "-o", run, *SMALL)
    assert result.code == 0, result.err
    assert _record(run, "extract.json")["quantization"]["bits"] == 4
    line = fails("extract", stored, "-o", run, *SMALL, "--load-in", "8bit", code=2)
    assert "is quantised already (bitsandbytes): leave it out" in line
    line = fails("extract", stored, "-o", run, *SMALL, "--offload", code=4)
    assert "is quantised, which --offload cannot run" in line


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}, "optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, "gptqmodel"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "hqq", "quant_config": {}}, "hqq"),
    ],
)
def test_a_stored_method_that_cannot_be_loaded_is_told_in_one_line(
    settings: dict[str, Any], package: str, tiny: Callable[..., Path], tmp_path: Path,
    fails: Callable[..., str],
) -> None:  # fmt: skip
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny().iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = _record(model, "config.json") | {"quantization_config": settings}
    (model / "config.json").write_text(json.dumps(config))
    line = fails("extract", model, "-o", tmp_path / "run", "-q", code=4)
    assert f"model is quantised ({settings['quant_method']}), which cannot be used here" in line
    assert package in line
    assert "use the checkpoint that it was made from" in line


def test_a_dtype_that_the_installed_safetensors_lacks_is_told_as_such(
    tiny: Callable[..., Path],
) -> None:
    """What safetensors 0.4 says of E8M0, and what later ones say of what they do not know."""
    checkpoint = find_checkpoint(str(tiny()))
    config = load_config(checkpoint)
    config.quantization_config = {"quant_method": "fp8"}
    for reason in ("InvalidHeaderDeserialization", "invalid JSON in header: unknown variant `F8`"):
        error = SafetensorError(f"Error while deserializing header: {reason}")
        line = str(loading_failure("none", checkpoint, config, error))
        assert f"{checkpoint.name} is quantised (fp8), which cannot be used here: the inst" in line
        assert "safetensors does not know a dtype of its tensors (upgrade it)" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--offload",), "--offload reads the layers from disk as they are, --load-in 4bit keeps"),
        (("--dtype", "float64"), "--load-in 4bit and --dtype float64 exclude each other"),
        (("--device-map", '{"": "disk"}'), "may not put some modules on the CPU or the disk"),
    ],
)
def test_what_excludes_load_in_is_told_in_one_line(
    options: tuple[str, ...], said: str, tmp_path: Path, fails: Callable[..., str]
) -> None:
    command = ("extract", MODEL, "-o", tmp_path / "run", *SMALL, "--load-in", "4bit")
    assert said in fails(*command, *options, code=2)


def test_ranks_do_not_divide_quantised_matrices() -> None:
    checkpoint, together = find_checkpoint(MODEL), Placement(tensor_parallel=True)
    config = load_config(checkpoint)
    where = (torch.float32, torch.device("cpu"), together)
    with pytest.raises(UsageError, match="load_in 8bit and tensor_parallel exclude each"):
        quantizer_options("8bit", checkpoint, config, *where)
    assert quantizer_options("none", checkpoint, config, *where) == {}
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(CheckpointError, match=r"is quantised \(gptq\), which tensor_parallel"):
        quantizer_options("none", checkpoint, config, *where)


def test_a_device_map_may_hold_a_model_in_four_bits(
    tmp_path: Path, cli: Callable[..., Any]
) -> None:
    options = ("--load-in", "4bit", "--device-map", '{"": "cpu"}')
    result = cli("extract", MODEL, "-o", tmp_path / "run", *SMALL, *options)
    assert result.code == 0, result.err
    assert _record(tmp_path / "run", "extract.json")["quantization"]["bits"] == 4


def test_without_bitsandbytes_the_extra_is_named_before_anything_is_looked_for(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    plain = extras.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else plain(name, *rest),
    )
    line = fails("extract", "no/such-model", "-o", "x", "--load-in", "4bit", code=2)
    assert line == ("error: --load-in 4bit needs bitsandbytes: pip install 'abliterate[quantized]'")


def test_what_is_needed_counts_the_matrices_of_the_blocks_as_small() -> None:
    checkpoint = find_checkpoint(MODEL)
    whole, eight, four = (
        needed_memory(checkpoint, torch.bfloat16, kind) for kind in ("none", "8bit", "4bit")
    )
    model = load_model(checkpoint, "cpu", "bfloat16").model
    outside = sum(p.numel() for n, p in model.named_parameters() if "layers" not in n) * 2
    assert 0.45 < (eight - outside) / (whole - outside) < 0.55
    assert 0.25 < (four - outside) / (whole - outside) < 0.32


def test_a_model_that_is_too_large_in_four_bits_is_refused(
    tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from abliterate.offload import open_model

    monkeypatch.setattr(open_model, "free_memory", lambda device: 1_000_000)
    line = fails("extract", MODEL, "-o", tmp_path / "run", *SMALL, "--load-in", "4bit", code=2)
    assert "--load-in needs the model in memory" in line
