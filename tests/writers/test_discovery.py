"""Discovery finds every writer and no other: the numbers prove it on many kinds of architecture."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures.zoo import require
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from abliterate.errors import UnsupportedArchitectureError
from abliterate.inference.interventions import ablate_at, unit_direction
from abliterate.writers import proof_of
from abliterate.writers.discovery import discover, leak, project
from abliterate.writers.plan import Gain, Writer, WriterPlan
from abliterate.writers.proof import EXACT, prove
from abliterate.writers.tiny_model import ShrinkError, randomise, shrunken

torch.set_num_threads(1)

# One of each kind; depth only as far as every kind of layer needs.
CASES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2},
    "gpt2": {"n_layer": 2},  # Conv1D, learned positions, biases
    "gemma2": {"num_hidden_layers": 2},  # post-norms with gain 1 + w, scaled embedding
    "gemma4_text": {  # two nested norms around experts, per-layer inputs
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 40,
    },
    "gpt_oss": {  # square experts with biases
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "intermediate_size": 48,
        "head_dim": 12,
    },
    "qwen3_moe": {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {"num_hidden_layers": 2},  # post-norms only
    "bloom": {"n_layer": 2},  # embedding norm with centring and bias
    "opt": {"num_hidden_layers": 2, "word_embed_proj_dim": 32},  # factorised embedding
    "dbrx": {"n_layers": 2, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "jetmoe": {"num_hidden_layers": 2},  # mixture of attention, a free bias
    "llama4_text": {"num_hidden_layers": 2, "interleave_moe_layer_step": 2, "num_local_experts": 4},
    "deepseek_v4": {"num_hidden_layers": 2, "n_routed_experts": 4},  # hyper-connections
    "inkling_text": {"num_hidden_layers": 2},  # a convolution after the writer
    "gpt_neox_japanese": {"num_hidden_layers": 2},  # a bias that no module adds
    "hrm_text": {"num_hidden_layers": 1},  # a free initial state, loops
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_hidden_layers": 2},
    "zamba2": {  # layers shared between depths
        "num_hidden_layers": 4,
        "num_mem_blocks": 1,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "falcon": {"num_hidden_layers": 2},  # parallel residual
}
# Not exact, and why: a word of the reason.
OBSTRUCTED: dict[str, tuple[dict[str, Any], str]] = {
    "ctrl": ({"n_layer": 2}, "buffer"),
    "xglm": ({"num_layers": 2}, "buffer"),
    "doge": ({"num_hidden_layers": 2}, "gain"),
    "openai-gpt": ({"n_layer": 2}, "gain"),
    "rwkv": ({"num_hidden_layers": 2}, "gate"),
    "opt": ({"num_hidden_layers": 2, "do_layer_norm_before": False}, "gain"),
}
POST_NORM = {"gemma2", "gemma4_text", "olmo2", "inkling_text", "bloom"}


@cache
def _original(kind: str) -> PreTrainedModel:
    require(kind)
    return shrunken(CONFIG_MAPPING[kind](**CASES[kind]))


@cache
def _plan(kind: str) -> WriterPlan:
    return discover(_original(kind))


def _model(kind: str) -> PreTrainedModel:
    """A fresh copy: same parameters, free to be edited."""
    return deepcopy(_original(kind))


def _tokens(seed: int = 3) -> Tensor:
    return torch.randint(3, 130, (2, 17), generator=torch.Generator().manual_seed(seed))


def _direction(plan: WriterPlan) -> Tensor:
    return torch.randn(plan.d_model, generator=torch.Generator().manual_seed(4))


def _unit(plan: WriterPlan) -> Tensor:
    return unit_direction(_direction(plan), plan.d_model)


def _leak(model: PreTrainedModel, plan: WriterPlan) -> float:
    return leak(model, _direction(plan), _tokens(), plan.blocks)


def _final(model: PreTrainedModel) -> Tensor:
    """What the head is given: logits would differ where the embedding is tied to the head."""
    seen: list[Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=_tokens(), use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", CASES)
def test_project_leaves_nothing(kind: str) -> None:
    model, plan = _model(kind), _plan(kind)
    assert plan.obstacles == ()
    assert _leak(model, plan) > 0.05
    project(model, plan, _direction(plan))
    assert _leak(model, plan) <= EXACT


@pytest.mark.parametrize("kind", CASES)
def test_every_writer_is_needed(kind: str) -> None:
    plan, original = _plan(kind), dict(_original(kind).named_parameters())
    model = _model(kind)
    parameters = dict(model.named_parameters())
    project(model, plan, _direction(plan))
    for left_out in plan.writers:
        name = left_out.parameter
        edited = parameters[name].detach().clone()
        others = [w for w in plan.writers if w.parameter == name and w != left_out]
        with torch.no_grad():
            parameters[name].copy_(original[name])
        project(model, replace(plan, writers=tuple(others)), _direction(plan))
        assert _leak(model, plan) > 1e-3, left_out
        with torch.no_grad():
            parameters[name].copy_(edited)
    assert _leak(model, plan) <= EXACT


@pytest.mark.parametrize("kind", CASES)
def test_sites_leave_nothing_and_agree_with_the_edit(kind: str) -> None:
    model, plan = _model(kind), _plan(kind)
    with ablate_at(model, _unit(plan), plan.sites):
        assert _leak(model, plan) <= EXACT
        hooked = _final(model)
    assert _leak(model, plan) > 0.05  # the hooks are gone
    if kind not in POST_NORM:
        project(model, plan, _direction(plan))
        assert float((_final(model) - hooked).abs().max()) <= 1e-4


@pytest.mark.parametrize("kind", sorted(POST_NORM))
def test_plain_direction_is_not_enough_behind_a_norm(kind: str) -> None:
    model, plan = _model(kind), _plan(kind)
    plain = tuple(replace(w, gains=()) for w in plan.writers)
    assert any(w.gains for w in plan.writers)
    project(model, replace(plan, writers=plain), _direction(plan))
    assert _leak(model, plan) > 1e-3


def test_wrong_axis_of_square_matrices_shows() -> None:
    plan = _plan("gpt_oss")
    for wrong in [w for w in plan.writers if not w.bias and w.layer == 0]:
        model = _model("gpt_oss")
        shape = model.get_parameter(wrong.parameter).shape
        axis = len(shape) - 1 if wrong.axis != len(shape) - 1 else len(shape) - 2
        if shape[axis] != shape[wrong.axis]:
            continue
        flipped = (replace(w, axis=axis) if w == wrong else w for w in plan.writers)
        project(model, replace(plan, writers=tuple(flipped)), _direction(plan))
        assert _leak(model, plan) > 1e-3


@pytest.mark.parametrize(("kind", "case"), OBSTRUCTED.items())
def test_what_cannot_be_exact_says_so(kind: str, case: tuple[dict[str, Any], str]) -> None:
    kwargs, word = case
    model = shrunken(CONFIG_MAPPING[kind](**kwargs))
    plan = discover(model)
    assert plan.obstacles
    for obstacle in plan.obstacles:
        assert word in obstacle.reason
        model.get_submodule(obstacle.module)
    with ablate_at(model, _unit(plan), plan.sites):
        assert _leak(model, plan) <= EXACT
    project(model, plan, _direction(plan))
    assert _leak(model, plan) > EXACT


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe"])
def test_expert_implementations_are_seen_through(kind: str, implementation: str) -> None:
    model = _model(kind)
    model.set_experts_implementation(implementation)
    assert discover(model).writers == _plan(kind).writers


def test_attention_implementation_and_precision_do_not_matter() -> None:
    model = _model("olmo2").to(torch.bfloat16)
    model.set_attn_implementation("sdpa")
    assert discover(model).writers == _plan("olmo2").writers


def test_discovery_leaves_the_model_alone() -> None:
    model = _model("gpt2").train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    discover(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gpt2_plan() -> None:
    plan = _plan("gpt2")
    found = {(w.parameter, w.axis, w.kind, w.layer, w.bias) for w in plan.writers}
    block = {
        (f"transformer.h.{i}.{name}", axis, kind, i, bias)
        for i in range(2)
        for name, axis, kind, bias in [
            ("attn.c_proj.weight", 1, "attention", False),
            ("attn.c_proj.bias", 0, "attention", True),
            ("mlp.c_proj.weight", 1, "mlp", False),
            ("mlp.c_proj.bias", 0, "mlp", True),
        ]
    }
    tables = {
        ("transformer.wte.weight", 1, "embedding", None, False),
        ("transformer.wpe.weight", 1, "position", None, False),
    }
    assert found == block | tables
    assert plan.blocks == ("transformer.h.0", "transformer.h.1")


def test_gemma_gain_is_one_plus_the_weight() -> None:
    writers = {w.parameter: w for w in _plan("gemma2").writers}
    gain = Gain("model.layers.1.post_feedforward_layernorm.weight", offset=1.0)
    expected = Writer("model.layers.1.mlp.down_proj.weight", 0, "mlp", 1, gains=(gain,))
    assert writers[expected.parameter] == expected


def test_each_tap_of_a_convolution_is_a_direction() -> None:
    taps = [w.gains[-1].index for w in _plan("inkling_text").writers if w.layer == 0 and w.gains]
    assert len({index for index in taps if index and index[0] is None}) > 1


class _Expert(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(hidden)))
        return out


class _ListOfExperts(nn.Module):
    """Per-expert modules, all tokens to one of them: the others have to be inferred."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(_Expert(size) for _ in range(3))
        self.chosen = 1

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        out = torch.zeros_like(flat)
        rows = torch.arange(0, len(flat), 2)
        out.index_add_(0, rows, self.experts[self.chosen](flat[rows]))
        return out.view_as(hidden)


def test_experts_that_no_token_met_are_found() -> None:
    model = _model("llama")
    for layer in model.model.layers:
        layer.mlp = _ListOfExperts(model.config.hidden_size)
    randomise(model)
    plan = discover(model)
    names = {w.parameter for w in plan.writers}
    for expert in range(3):
        assert f"model.layers.1.mlp.experts.{expert}.down.weight" in names
        assert f"model.layers.1.mlp.experts.{expert}.down.bias" in names
        assert f"model.layers.1.mlp.experts.{expert}.up.weight" not in names
    project(model, plan, _direction(plan))
    for chosen in range(3):
        for layer in model.model.layers:
            layer.mlp.chosen = chosen
        assert _leak(model, plan) <= EXACT


class _InPlace(nn.Module):
    """Writes into slices of a buffer and adds in place, through a column that is masked."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.even, self.odd = nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False)
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, hidden: Tensor) -> Tensor:
        out = torch.empty_like(hidden)
        out[:, 0::2] = self.even(hidden[:, 0::2])
        out[:, 1::2] = self.odd(hidden[:, 1::2])
        out.mul_(torch.sigmoid(hidden[..., :1]))
        out *= self.scale
        return out.masked_fill(hidden[..., :1] > 1, 0.0)


def test_in_place_slices_and_layer_scale() -> None:
    model = _model("llama")
    for layer in model.model.layers:
        layer.mlp = _InPlace(model.config.hidden_size)
    randomise(model)
    plan = discover(model)
    found = {w.parameter: w.gains for w in plan.writers}
    scale = (Gain("model.layers.0.mlp.scale"),)
    assert found["model.layers.0.mlp.even.weight"] == scale
    assert found["model.layers.0.mlp.odd.weight"] == scale
    project(model, plan, _direction(plan))
    assert _leak(model, plan) <= EXACT


class _Halves(nn.Module):
    """An embedding whose channels come from two tables, the second one of positions."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size // 3))
        self.positions = nn.Parameter(torch.empty(64, size - size // 3))

    def forward(self, ids: Tensor) -> Tensor:
        places = self.positions[: ids.shape[1]].expand(*ids.shape, -1)
        return torch.cat([nn.functional.embedding(ids, self.weight), places], dim=-1)


def test_a_part_of_the_channels() -> None:
    model = _model("llama")
    size = model.config.hidden_size
    model.set_input_embeddings(_Halves(136, size))
    randomise(model)
    plan = discover(model)
    parts = {w.parameter: w.part for w in plan.writers if w.layer is None}
    cut = size // 3
    assert parts == {
        "model.embed_tokens.weight": (0, cut),
        "model.embed_tokens.positions": (cut, size),
    }
    project(model, plan, _direction(plan))
    assert _leak(model, plan) <= EXACT


def test_prove() -> None:
    proof = prove(CONFIG_MAPPING["gemma2"](num_hidden_layers=3))
    assert proof.exact
    assert proof.leak <= EXACT < proof.before
    assert "model.layers.2.mlp.down_proj.weight" in {w.parameter for w in proof.plan.writers}
    proof = prove(CONFIG_MAPPING["ctrl"](n_layer=2))
    assert not proof.exact
    assert "pos_encoding" in proof.reason


def test_a_config_that_cannot_be_shrunk() -> None:
    config = CONFIG_MAPPING["llama"](num_hidden_layers=1, hidden_act="no such function")
    with pytest.raises(ShrinkError, match="llama"):
        shrunken(config)


def test_discovery_does_not_depend_on_the_callers_grad_mode() -> None:
    """``ablate`` is entered inside ``inference_mode``, where torch keeps ``linear`` whole."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    expected = prove(config)
    with torch.inference_mode():
        assert prove(config) == expected
    assert expected.exact


@pytest.mark.parametrize(("vocabulary", "positions"), [(64, 16), (8, 64), (3, 8)])
def test_tables_with_fewer_rows_than_traced_tokens(
    cli: Callable[..., Any], tmp_path: Path, vocabulary: int, positions: int
) -> None:
    """The default bos and eos ids (50256) lie far outside such a vocabulary."""
    config = CONFIG_MAPPING["gpt2"](
        n_embd=32, n_layer=2, n_head=2, vocab_size=vocabulary, n_positions=positions
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    result = cli("writers", tmp_path, "--json")
    assert result.code == 0, result.err
    assert "cannot be found" not in result.err


def test_an_architecture_without_a_small_copy_is_tried_once_a_process(monkeypatch) -> None:
    tried = []

    def none(config: Any) -> None:
        tried.append(config)
        raise ShrinkError("no copy runs")

    monkeypatch.setattr("abliterate.writers._proofs", {})
    monkeypatch.setattr("abliterate.writers.prove", none)
    for _ in range(2):
        with pytest.raises(UnsupportedArchitectureError, match=r"cannot be found .no copy runs"):
            proof_of(LlamaConfig())
    assert len(tried) == 1
