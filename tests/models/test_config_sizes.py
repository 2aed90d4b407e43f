"""A configuration that promises more than the files hold is refused before anything is built."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CONFIG_MAPPING,
    GPT2Config,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from abliterate.models.bounded_build import TooLargeError, bounded_build
from abliterate.writers.tiny_model import ShrinkError, shrunken


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def say(model: Path, **values: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# What config.json says, and a word of the line that says so.
_PROMISES: list[tuple[str, Any, str]] = [
    ("num_hidden_layers", 100_000, "100,000"),
    ("num_hidden_layers", 10**12, "1,000,000,000,000"),
    ("num_hidden_layers", 60, "60"),
    ("num_hidden_layers", 0, "num_hidden_layers is 0"),
    ("num_hidden_layers", -4, "num_hidden_layers is -4"),
    ("hidden_size", 10**9, "none 1,000,000,000 long"),
    ("hidden_size", 96, "none 96 long"),
    ("vocab_size", 10**9, "none longer than 512"),
    ("vocab_size", 1024, "vocab_size is 1,024"),
    ("intermediate_size", 10**12, "config.json"),
    ("num_attention_heads", 10**9, "num_attention_heads is 1,000,000,000"),
    ("head_dim", 10**12, "config.json"),
    ("head_dim", 10**6, "config.json"),
    ("num_experts", 10**9, "num_experts is 1,000,000,000"),
    ("num_loops", 10**7, "num_loops is 10,000,000"),
]
_MALFORMED: list[tuple[str, Any]] = [
    ("num_hidden_layers", "4"),
    ("num_hidden_layers", 1e300),
    ("num_hidden_layers", 4.5),
    ("hidden_size", None),
    ("hidden_size", -48),
    ("vocab_size", [512]),
    ("intermediate_size", 0),
    ("intermediate_size", True),
    ("head_dim", -1),
    ("num_key_value_heads", 0),
    ("layer_types", ["full_attention"]),
]


@pytest.mark.parametrize(("key", "value", "word"), _PROMISES)
def test_a_promise_that_the_files_break_is_refused_at_once(
    key: str, value: Any, word: str, model: Path, fails, tmp_path: Path
) -> None:
    say(model, **{key: value})
    save_file({"direction": torch.ones(48)}, tmp_path / "direction.safetensors")
    begun = time.monotonic()
    for command in (
        ("extract", model, "-o", tmp_path / "run", "--offload"),
        ("orthogonalize", model, "--direction", tmp_path / "direction.safetensors", "-o", "x"),
        ("plan", model),
        ("writers", model),
    ):
        line = fails(*command, code=4)
        assert "config.json" in line
        assert word in line
        assert "39 tensors in 4 layers" in line
    # In memory, what is no far cry from the files is found by the tensors that are missing.
    line = fails("extract", model, "-o", tmp_path / "run", "--no-offload", code=4)
    assert word in line or value == 60
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize(("key", "value"), _MALFORMED)
def test_a_size_that_is_none_is_refused(key: str, value: Any, model: Path, fails, tmp_path) -> None:
    say(model, **{key: value})
    for way in ("--offload", "--no-offload"):
        fails("extract", model, "-o", tmp_path / "run", way, code=4)
    fails("writers", model, code=4)


@pytest.mark.parametrize(
    "values",
    [
        *({key: value} for key, value, _ in _PROMISES[:2] + _PROMISES[3:5] + _PROMISES[9:15]),
        {"hidden_size": 10**9},
        {"vocab_size": 10**9},
        {"hidden_size": 0},
    ],
    ids=str,
)
def test_a_configuration_alone_builds_nothing_huge(
    values: dict[str, Any], model: Path, cli, monkeypatch
) -> None:
    """Refused, or planned for within seconds; nothing is allocated for it."""
    monkeypatch.setattr("abliterate.capacity.machine_benchmark.layer_speed", lambda *_: 1e9)
    monkeypatch.setattr("abliterate.capacity.machine_benchmark.copy_speed", lambda: 1e9)
    (model / "model.safetensors").unlink()
    say(model, **values)
    begun = time.monotonic()
    for command in ("plan", "writers"):
        result = cli(command, model)
        assert result.code in (0, 4), result.err
        if result.code == 4 and values != {"hidden_size": 0}:
            assert "config" in result.err
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize(
    ("kind", "values", "tensor"),
    [
        ("llama", {"num_key_value_heads": 4}, "model.layers.0.self_attn.k_proj.weight"),
        ("llama", {"num_key_value_heads": 1}, "model.layers.0.self_attn.k_proj.weight"),
        ("llama", {"head_dim": 24}, "model.layers.0.self_attn.k_proj.weight"),
        ("qwen2", {"intermediate_size": 40}, "model.layers.0.mlp.down_proj.weight"),
        ("llama-bias", {"num_key_value_heads": 4}, "model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_a_number_that_contradicts_tensors_which_no_edit_touches_is_named(
    kind: str, values: dict[str, int], tensor: str, tiny, fails, tmp_path: Path
) -> None:
    """Written out, the checkpoint could not be loaded."""
    model = Path(shutil.copytree(tiny(kind), tmp_path / "model"))
    say(model, **values)
    save_file({"direction": torch.ones(48)}, tmp_path / "d.safetensors")
    ((key, value),) = values.items()
    for line in (
        fails("orthogonalize", model, "--direction", tmp_path / "d.safetensors",
              "-o", tmp_path / "out", code=4),
        fails("writers", model, code=4),
    ):  # fmt: skip
        assert f"{model / 'config.json'} says {key} is {value}" in line
        assert tensor in line
    assert not (tmp_path / "out").exists()


def test_a_configuration_alone_is_planned_for_without_tracing_all_its_experts(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trace of so many layers and experts takes minutes; and no speed is measured for long."""

    def none(config: Any) -> None:
        raise AssertionError("the writers of a large model are searched for")

    monkeypatch.setattr("abliterate.writers.proof_of", none)
    Qwen3MoeConfig(num_hidden_layers=30, num_experts=32).save_pretrained(tmp_path)
    document = cli("plan", tmp_path, "--json").json
    assert document["n_layers"] == 30
    assert document["parameters"] > document["active_parameters"] > 10**8
    one = tmp_path / "one"
    Qwen3MoeConfig(num_hidden_layers=1, num_experts=128).save_pretrained(one)
    assert cli("plan", one, "--json").json["n_layers"] == 1


def test_the_layers_that_no_model_has_are_not_built(model: Path, fails) -> None:
    (model / "model.safetensors").unlink()
    say(model, num_hidden_layers=5_000)
    for command in ("plan", "writers"):
        assert "num_hidden_layers is 5,000, which no model has" in fails(command, model, code=4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0, which no model has"),
        (
            {"num_key_value_heads": 7},
            "num_key_value_heads is 7, which does not divide 32 attention",
        ),
        ({"vocab_size": 0}, "vocab_size is 0, which no model has"),
        ({"intermediate_size": 0}, "intermediate_size is 0, which no model has"),
        ({"num_local_experts": 0}, "num_experts_per_tok is 2, of num_local_experts 0"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, of num_local_experts 8"),
        ({"hidden_act": "nope"}, "config.json (hidden_act is 'nope', which the installed"),
        ({"torch_dtype": "float17", "dtype": "float17"}, "the dtype float17, which torch does not"),
    ],
)
def test_what_no_model_can_be_is_named(
    changes: dict[str, Any], said: str, fails, tmp_path: Path
) -> None:
    """With a configuration alone, as ``plan`` takes it."""
    config = MixtralConfig(num_hidden_layers=2, hidden_size=512, intermediate_size=512)
    config.save_pretrained(tmp_path)
    say(tmp_path, **changes)
    assert said in fails("plan", tmp_path, "--machine", "24GB", code=4)


def test_dense_models_of_a_kind_with_experts_have_none(cli, tmp_path: Path) -> None:
    GraniteMoeHybridConfig(
        num_local_experts=0, num_experts_per_tok=0, num_hidden_layers=1, layer_types=["attention"]
    ).save_pretrained(tmp_path)
    assert cli("plan", tmp_path, "--json").code == 0


def test_heads_that_differ_by_layer_are_planned_for(cli, tmp_path: Path) -> None:
    """Gemma 4: transformers gives no number for all layers, and raises where one is asked for."""
    if "gemma4_text" not in CONFIG_MAPPING:
        pytest.skip("this transformers does not know Gemma 4")
    config = CONFIG_MAPPING["gemma4_text"](num_hidden_layers=6, vocab_size=1000)
    config.save_pretrained(tmp_path)
    document = cli("plan", tmp_path, "--machine", "80GB", "--json").json
    assert document["n_layers"] == 6


def test_an_index_alone_says_how_many_layers_there_are(tiny, fails, cli, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("llama", True), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert cli("writers", folder).code == 0
    say(folder, num_hidden_layers=100_000)
    assert "39 tensors in 4 layers" in fails("writers", folder, code=4)


def test_a_huge_config_file_is_not_parsed(model: Path, fails, tmp_path: Path) -> None:
    with (model / "config.json").open("ab") as file:
        file.truncate(1 << 30)
    assert "no configuration" in fails("extract", model, "-o", tmp_path / "run", code=4)
    (model / "config.json").unlink()
    (model / "config.json").mkdir()
    fails("extract", model, "-o", tmp_path / "run", code=4)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(num_hidden_layers=10**9),
        LlamaConfig(num_hidden_layers=1, hidden_size=-64),
        MixtralConfig(num_hidden_layers=1, num_local_experts=10**9),
        Qwen3MoeConfig(num_hidden_layers=1, num_experts=10**9),
        Qwen3MoeConfig(num_hidden_layers=1, num_experts=9_999_999),
        GPT2Config(n_layer=10**6),
    ],
    ids=lambda config: config.model_type,
)
def test_a_small_copy_is_not_made_of_absurd_sizes(config: Any) -> None:
    begun = time.monotonic()
    with pytest.raises(ShrinkError):
        shrunken(config)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    "values", [{"head_dim": 10**12}, {"intermediate_size": 10**15}, {"vocab_size": 10**12}], ids=str
)
def test_a_small_copy_of_absurd_widths_is_small(values: dict[str, int]) -> None:
    copy = shrunken(LlamaConfig(num_hidden_layers=1, **values))
    assert sum(p.numel() for p in copy.parameters()) < 1_000_000


def test_building_stops_at_a_bound_whatever_asks_for_it() -> None:
    with torch.device("meta"), bounded_build(10_000, 100):
        torch.nn.Linear(50, 100)
        with pytest.raises(TooLargeError, match="10,000 numbers"):
            torch.nn.Linear(100, 100)
    with (
        torch.device("meta"),
        bounded_build(10_000, 100),
        pytest.raises(TooLargeError, match="100"),
    ):
        torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(10**9))
    with torch.device("meta"):
        torch.nn.Linear(1000, 1000)
