"""plan: sizes from the configuration alone, and what follows from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from abliterate.capacity import machine_benchmark
from abliterate.capacity.model_shape import shape_of


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


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_quantised_weights_are_those_that_bitsandbytes_holds(kind: str, tiny, cli) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = tiny(kind)
    expected = cli("plan", model, "--machine", "24GB", "--json").json["bytes_loaded_in"]
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    for name, how in {"8bit": {"load_in_8bit": True}, "4bit": four}.items():
        loaded = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=torch.float32,
            device_map={"": "cpu"},
            quantization_config=BitsAndBytesConfig(**how),
        )
        held = [*loaded.parameters()]
        scales = [
            p.SCB if getattr(p, "SCB", None) is not None else p.quant_state.absmax
            for p in held
            if type(p) is not torch.nn.Parameter
        ]
        assert len(scales) == 4 * 7
        assert expected[name] == sum(p.numel() * p.element_size() for p in [*held, *scales])
    assert "weights with --load-in 8bit / 4bit" in cli("plan", model, "--machine", "24GB").out


def test_robust_means_keep_the_activations_of_a_kind_in_main_memory(tiny, cli) -> None:
    base = ("plan", tiny("llama"), "--n-train", "1000000", "--positions", "2", "--memory", "8GB")
    plain, kept = (
        cli(*base, *more, "--json").json for more in ((), ("--robust", "median"))
    )  # fmt: skip
    size = 1_000_000 * 2 * 4 * 48 * 4  # prompts, positions, layers, d_model, bytes of a float32
    assert (plain["kept_activations"], kept["kept_activations"]) == (0, size)
    before, after = (
        {stage["name"]: stage["memory"] for stage in document["stages"]}
        for document in (plain, kept)
    )
    assert after["extract"] - before["extract"] == pytest.approx(size, abs=64 << 20)
    card = cli(*base, "--robust", "winsor", "--machine", "24GB").out
    assert "extract --robust: 1.5 GB of main memory" in card


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
    assert same.routed == half.routed == experts * 2 // 8
    assert (same.source, same.fusing) == (4 * experts, 3 * 4 * gates)
    assert (half.source, half.fusing) == (4 * half.parameters, (4 + 2 * 2) * gates)


def test_the_table_names_every_stage_and_bad_sizes_are_refused(tiny, cli, fails) -> None:
    result = cli("plan", tiny("gemma"))
    assert result.code == 0, result.err
    for text in ("parameters", "extract", "select", "orthogonalize", "verify --forward", "FLOP"):
        assert text in result.out
    assert "too little memory" not in result.out
    assert (
        "too little memory for extract, select" in cli("plan", tiny("gemma"), "--memory", "1KB").out
    )
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


def _config(folder: Path, kv_heads: int = 8, experts: int = 0) -> Path:
    """Four wide layers with the weights of a model of 70 billion parameters (140 GB)."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=128_000, hidden_size=8192, intermediate_size=710_000, num_hidden_layers=4,
        num_attention_heads=64, num_key_value_heads=kv_heads, tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("machine", "kv_heads", "way", "start"),
    [
        ("24GB", 8, "offload", "--offload"),
        ("8 x 24GB", 8, "tensor parallel", "--nproc-per-node 8 -m"),
        ("8x80GB", 8, "tensor parallel", "--tensor-parallel"),
        ("2xh100", 8, "offload", "--offload"),
        ("3x80GB", 8, "device map", "--device-map auto"),
        ("h200", 8, "offload", "--offload"),
        ("2x8x24GB", 8, "tensor parallel", "--standalone"),
        ("8x1x24GB", 8, "tensor parallel", "--nnodes 8"),
        ("16x1x24GB", 8, "offload", "--offload"),
    ],
)
def test_a_machine_that_is_not_at_hand_is_planned_for(
    machine: str, kv_heads: int, way: str, start: str, cli, tmp_path: Path
) -> None:
    model = _config(tmp_path, kv_heads)
    document = cli("plan", model, "--machine", machine, "--json").json
    assert document["bytes"] == pytest.approx(144e9, rel=0.02)
    assert document["spread"]["way"] == way
    assert start in document["start"]
    assert all(stage["seconds"] > 0 for stage in document["stages"])
    assert document["machine"]["assumed"]
    if way in ("offload", "device map"):
        assert document["spread"]["why"]
    if machine == "16x1x24GB":
        assert "16 ranks do not divide 64 and 8" in document["spread"]["why"]
    if way == "tensor parallel":  # each card holds its part, and no more than it has
        each = document["stages"][0]["memory"]
        assert document["bytes"] / document["spread"]["parts"] < each < 82e9


def test_time_follows_cards_and_answers(cli, tmp_path: Path) -> None:
    """By the figures that are assumed: eight copies take an eighth, answers read the weights."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=1000, hidden_size=4096, intermediate_size=120_000, num_hidden_layers=4,
        num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False, dtype="bfloat16",
    ).save_pretrained(tmp_path)  # fmt: skip

    def stages(*options: str) -> dict[str, dict[str, float]]:
        document = cli("plan", tmp_path, *options, "--json").json
        return {stage["name"]: stage for stage in document["stages"]} | {"": document}

    one, eight = stages("--machine", "80GB"), stages("--machine", "8x80GB")
    assert eight[""]["spread"]["way"] == "data parallel"
    loading = one[""]["bytes_on_disk"] / 2e9
    for name in ("extract", "select"):
        alone, together = (found[name]["seconds"] - loading for found in (one, eight))
        assert together == pytest.approx(alone / 8, rel=1e-6)
    short = stages("--machine", "80GB", "--answer-tokens", "64")["evaluate"]["seconds"]
    long = stages("--machine", "80GB", "--answer-tokens", "128")["evaluate"]["seconds"]
    # 64 tokens more for 600 prompts in one batch: the arithmetic of so many rows, or the reading.
    active = one[""]["active_parameters"] + 1000 * 4096
    step = max(2 * active * 600 / (0.4 * 312e12), one[""]["bytes"] / (0.6 * 2.039e12))
    assert long - short == pytest.approx(64 * step, rel=0.01)


def test_plan_shows_how_to_start_and_what_is_assumed(tiny, cli, fails) -> None:
    shown = cli("plan", tiny("llama"), "--machine", "2x4xH100").out.replace("\n", " ")
    for text in ("torchrun --nnodes 2", "not measured", "8 devices"):
        assert text in shown
    line = fails("plan", tiny("llama"), "--machine", "8xfast", code=2)
    assert "24GB, 48GB, 80GB, H100, H200" in cli("plan", "-h").out.replace("\n", " ")
    for text in ("--machine", "24GB, 48GB, 80GB, H100, H200", "8xfast"):
        assert text in line
    assert "--machine" in fails("plan", tiny("llama"), "--machine", "0x80GB", code=2)
    both = ("--machine", "80GB", "--gpu-memory", "80GB")
    assert "--gpu-memory" in fails("plan", tiny("llama"), *both, code=2)
    assert "--answer-tokens" in fails("plan", tiny("llama"), "--answer-tokens", "0", code=2)
