"""plan: sizes from the configuration alone, and what follows from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from abliterate.capacity import machine_benchmark
from abliterate.capacity.resource_estimate import shape_of


def _parameters(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                count = 1
                for size in file.get_slice(name).get_shape():
                    count *= size
                total += count
    return total


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_sizes_are_those_of_the_files_and_need_no_weights(kind: str, tiny, cli, tmp_path) -> None:
    model = tiny(kind)
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    result = cli("plan", tmp_path, "--memory", "8GB", "--json")
    assert result.code == 0, result.err
    document = result.json
    assert document["parameters"] == _parameters(model)
    assert document["bytes"] == 4 * document["parameters"]
    assert document["n_layers"] == 4
    assert document["mode"] == "in memory"
    assert document["machine"]["memory"] == 8 * 10**9


def test_a_model_larger_than_memory_is_streamed(tiny, cli, tmp_path: Path) -> None:
    model = tiny("llama")
    small = cli("plan", model, "--memory", "300KB", "--activation-memory", "1MB", "--json").json
    assert small["mode"] == "offload"
    by_name = {stage["name"]: stage for stage in small["stages"]}
    assert by_name["extract"]["passes"] == 1
    assert by_name["extract"]["bytes_read"] == small["bytes_on_disk"]
    assert by_name["select"]["passes"] >= 2
    # Twice the prompts: twice the arithmetic, the same reading.
    double = cli("plan", model, "--memory", "300KB", "--n-train", "256", "--json").json
    extract = next(stage for stage in double["stages"] if stage["name"] == "extract")
    assert extract["flops"] == pytest.approx(2 * by_name["extract"]["flops"], rel=1e-6)
    assert extract["bytes_read"] == by_name["extract"]["bytes_read"]
    large = cli("plan", model, "--memory", "300KB", "--gpu-memory", "24GB", "--json").json
    assert large["mode"] == "in memory"


def test_of_routed_experts_those_that_a_token_passes_count(cli, tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, moe_intermediate_size=32, intermediate_size=96,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    document = cli("plan", tmp_path, "--json").json
    experts = 3 * 8 * 3 * 64 * 32
    embeddings = document["parameters"] - document["active_parameters"] - experts * 6 // 8
    assert embeddings == (1 if config.tie_word_embeddings else 2) * 256 * 64 + 64
    # Fusing holds the experts' gates and ups on disk, stacked and joined: more than a block.
    gates = 8 * 2 * 64 * 32
    same, half = (shape_of(config, dtype) for dtype in (torch.float32, torch.float16))
    assert (same.source, same.fusing) == (4 * experts, 3 * 4 * gates)
    assert (half.source, half.fusing) == (4 * half.parameters, (4 + 2 * 2) * gates)


def test_the_table_names_every_stage_and_bad_sizes_are_refused(tiny, cli, fails) -> None:
    result = cli("plan", tiny("gemma"))
    assert result.code == 0, result.err
    for text in ("parameters", "extract", "select", "orthogonalize", "verify --forward", "FLOP"):
        assert text in result.out
    assert "--memory" in fails("plan", tiny("gemma"), "--memory", "much", code=2)
    assert "--gpu-memory" in fails("plan", tiny("gemma"), "--gpu-memory", "-3GB", code=2)
    assert "no config.json" in fails("plan", Path(__file__).parent, code=4)


def test_speeds_of_a_slow_machine_are_measured_on_smaller_samples(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A clock on which each step takes a minute: one step of each kind, and speeds that say so."""
    now = iter(range(0, 10**6, 60))
    monkeypatch.setattr(machine_benchmark.time, "perf_counter", lambda: float(next(now)))
    speed = machine_benchmark.layer_speed(64, torch.float32, torch.device("cpu"))
    layers = 8
    assert speed == pytest.approx(layers * 4 * 32 * 64 * 256 / 60)
    (tmp_path / "model.safetensors").write_bytes(bytes(32 << 20))
    assert machine_benchmark.disk_speed(tmp_path) == pytest.approx((4 << 20) / 60)
    assert machine_benchmark.copy_speed() == pytest.approx((64 << 20) / 60)
    assert next(now) <= 60 * 8
