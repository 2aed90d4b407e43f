"""One model over several devices (``--device-map``) or ranks (``--tensor-parallel``) gives what it
gives on one device."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import check_close, torchrun
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3MoeConfig

from abliterate.cli.app import main
from abliterate.distributed.rank_group import RankGroup
from abliterate.errors import UnsupportedArchitectureError, UsageError
from abliterate.models import library_versions
from abliterate.models.device_placement import Placement, check_plan, find_placement, own_device
from abliterate.models.library_versions import has_distributed_tensors

SIZES = (
    "--n-train",
    "12",
    "--n-val",
    "9",
    "--n-test",
    "3",
    "--max-new-tokens",
    "5",
    "--controls",
    "1",
)
LOOSE = ("--no-filter", "--refusal-token", "40", "--kl-threshold", "1000",
         "--induce-threshold=-1000")  # fmt: skip


def moe_config() -> PreTrainedConfig:
    return Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=48,
        intermediate_size=80,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )


@pytest.fixture(scope="module")
def checkpoints(
    tiny: Any, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Llama with a bias on every projection, and Qwen3-MoE: random weights, on disk."""
    folder = tmp_path_factory.mktemp("qwen3-moe")
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(moe_config(), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            base = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(base + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, folder / file.name)
    return {"llama": tiny("llama-bias"), "qwen3-moe": folder}


@pytest.fixture(scope="module")
def on_one_device(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """What the pipeline makes of each on the CPU."""
    runs = {}
    for name, folder in checkpoints.items():
        runs[name] = tmp_path_factory.mktemp(name) / "run"
        assert main(["run", str(folder), "-o", str(runs[name]), *SIZES, *LOOSE]) == 0
    return runs


def check_same(run: Path, reference: Path) -> None:
    """Means to 1e-6 of their size, the same selection, scores and completions."""
    ours, theirs = (load_file(folder / "directions.safetensors") for folder in (run, reference))
    for name, mean in theirs.items():
        assert (ours[name] - mean).abs().max() <= 1e-6 * mean.abs().max()
    ours, theirs = (json.loads((f / "selection.json").read_text()) for f in (run, reference))
    assert ours["winner"] == theirs["winner"] is not None
    scored = 0
    for one, two in zip(ours["candidates"], theirs["candidates"], strict=True):
        assert one["computed"] == two["computed"]
        for metric in one["computed"]:
            scored += two[metric] is not None
            assert one[metric] == pytest.approx(two[metric], abs=1e-3)
    assert scored >= 30
    ours, theirs = (
        json.loads((f / "evaluation.json").read_text())["interventions"] for f in (run, reference)
    )
    assert list(theirs) == ["baseline", "ablate", "add", "orthogonalized"]
    for name, outcome in theirs.items():
        for kind in ("harmful", "harmless"):
            check_close(ours[name][kind], outcome[kind])
        check_close(ours[name]["kl_divergence"], outcome["kl_divergence"])


@pytest.mark.skipif(not has_distributed_tensors(), reason="transformers is older than 5.16")
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_tensor_parallel_ranks_give_what_one_process_gives(
    name: str, checkpoints, on_one_device, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    args = ("run", checkpoints[name], "-o", run, *SIZES, *LOOSE, "--tensor-parallel", "--json")
    done = torchrun(2, "-m", "abliterate", *args)
    assert done.code == 0, done.err[-2000:]
    assert json.loads(done.out)["select"]["winner"]
    # The model is really divided: all of it but norms, routers and biases.
    (share,) = {line.split("with ")[1] for line in done.err.splitlines() if "ranks with" in line}
    assert 50 <= int(share.split("%")[0]) <= 55, share
    check_same(run, on_one_device[name])


def test_tensor_parallelism_of_an_old_transformers_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library_versions, "has_distributed_tensors", lambda: False)
    with pytest.raises(UsageError, match=r"needs transformers 5\.16 or newer: upgrade it"):
        check_plan(moe_config(), RankGroup(size=2), Placement(tensor_parallel=True))


# Blocks in memory and on disk in turn: each starts where another device's output arrives.
MIXED = {
    "model.embed_tokens": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "cpu",
    "model.layers.3": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.mark.parametrize(
    ("name", "device_map", "where"),
    [
        ("llama", "auto", "cpu"),
        ("llama", json.dumps(MIXED), "disk, cpu"),
        ("qwen3-moe", json.dumps(MIXED), "disk, cpu"),  # experts are fused: written to disk anew
    ],
)
def test_device_maps_give_what_one_device_gives(
    name: str, device_map: str, where: str, checkpoints, on_one_device, tmp_path: Path, cli
) -> None:
    run = tmp_path / "run"
    result = cli("run", checkpoints[name], "-o", run, *SIZES, *LOOSE, "--device-map", device_map)
    assert result.code == 0, result.err
    assert f"(torch.float32, {where})" in result.err
    assert json.loads((run / "extract.json").read_text())["device"] == where
    check_same(run, on_one_device[name])
    # Where the weights lay is no setting of the next stage.
    shutil.copytree(run, tmp_path / "again")
    (tmp_path / "again" / "scores.safetensors").unlink()  # with it no model is opened
    result = cli("select", tmp_path / "again", "--n-val", "9", "--no-filter", *LOOSE[3:])
    assert "(torch.float32, cpu)" in result.err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--device-map", "auto", "--tensor-parallel"), 2, "exclude each other: choose one"),
        (("--device-map", "auto", "--device", "cpu"), 2, "and --device cpu exclude each other"),
        (("--device-map", "left"), 2, "auto, balanced, .* or a JSON object .* not 'left'"),
        (("--device", "mps"), 2, "--device mps is not on this machine, .* use auto or cpu$"),
        (("--device", "cuda:7"), 2, "--device cuda:7 is not on this machine, .* use auto or cpu$"),
        (("--device", "gpu"), 2, "--device gpu is no device that torch knows: use auto or cpu$"),
        (("--device", "cuda:x"), 2, "--device cuda:x is no device that torch knows: use auto"),
        (("--device-map", '{"": "cuda:0"}'), 2, "--device-map: 'cuda:0' of '' is not on this"),
        (("--device-map", '{"": 0}'), 2, "--device-map: '0' of '' is not on this machine"),
        (("--device-map", '{"": [0]}'), 2, "a JSON object of devices by module name"),
        (
            ("--device-map", '{"": "gpu"}'),
            2,
            "--device-map: 'gpu' of '' is no device that torch knows: use auto or cpu",
        ),
        (("--tensor-parallel",), 2, "torchrun --nproc-per-node N"),
    ],
)
def test_what_cannot_be_combined(
    options, code, message, checkpoints, fails, tmp_path: Path
) -> None:
    line = fails("extract", checkpoints["llama"], "-o", tmp_path / "run", *options, code=code)
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_what_a_launcher_cannot_be_combined_with(monkeypatch) -> None:
    ranks = RankGroup(rank=1, size=3)
    with pytest.raises(UsageError, match="a launcher started 3"):
        find_placement(ranks, "auto", "auto", False)
    parts = find_placement(ranks, "auto", None, True)
    assert parts.ranks.split("abcd") == list("abcd")  # all ranks hold the same prompts
    assert find_placement(ranks, "auto", None, False).ranks.split("abcdefgh") == list("beh")
    with pytest.raises(UsageError, match=r"3 ranks cannot share 4 attention heads"):
        check_plan(moe_config(), ranks, parts)
    config = moe_config()
    config.base_model_tp_plan = None
    with pytest.raises(UnsupportedArchitectureError, match=r"no tensor parallel plan for 'qwen3_m"):
        check_plan(config, RankGroup(size=2), Placement(tensor_parallel=True))
    check_plan(config, RankGroup(size=2), Placement())
    for name, value in (("LOCAL_RANK", "2"), ("LOCAL_WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert own_device(torch.device("cuda")) == torch.device("cuda", 2)
    assert own_device(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert own_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(UsageError, match=r"local rank 2 finds no cuda device .*--nproc-per-node 2"):
        own_device(torch.device("cuda"))
