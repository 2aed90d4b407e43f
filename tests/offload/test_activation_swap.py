"""Activations of an accelerator wait in main memory; the CPU is treated as one here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from abliterate.models.loading import Checkpoint, load_weights
from abliterate.offload import activation_store, activation_swap, layer_streaming, open_model
from abliterate.offload.weight_passes import look

PROMPTS = [list(range(first, first + n)) for first, n in ((3, 8), (20, 12), (40, 16), (60, 8))]


@pytest.fixture
def parked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Everything waits elsewhere; gives the bytes that were still there after each wait."""
    left: list[int] = []
    plain = activation_swap.Parked.put

    def put(self: activation_swap.Parked, value: object) -> None:
        plain(self, value)
        left.append(sum(t.untyped_storage().nbytes() for t in self._alive()))

    for module in (activation_store, activation_swap):
        monkeypatch.setattr(module, "SMALL", 256)
    monkeypatch.setattr(layer_streaming, "parking", lambda device: True)
    monkeypatch.setattr(activation_swap.Parked, "put", put)
    return left


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "qwen3_moe",
        "gemma3n_text",  # one tensor of inputs for all layers, keys and values of other layers
        "gpt2",
        "zamba2",  # the embeddings enter blocks far below
        "hrm_text",  # blocks that run several times
        "mamba",
    ],
)
def test_a_pass_finds_its_tensors_as_it_left_them(
    model_type: str, parked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from architectures.zoo import require_running, tiny_model

    from abliterate.extraction.mean_activations import mean_resid_pre

    monkeypatch.setattr(open_model, "load_tokenizer", lambda *_: None)  # prompts are token ids
    model = tiny_model(model_type)
    require_running(model)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(str(tmp_path), tmp_path)
    plain, _ = mean_resid_pre(load_weights(checkpoint, "cpu", "float32"), PROMPTS, [-2, -1])
    loaded = open_model.open_stream(checkpoint, "cpu", "float32", activation_memory=1 << 30)
    _, seen = look(loaded.engine.offloaded, PROMPTS, [-2, -1], 2)
    assert (seen.mean(0, dtype=torch.float64) - plain).norm() <= 1e-5 * plain.norm()
    assert parked
    assert not any(parked)  # nothing stayed
    assert loaded.engine.offloaded.activations.peak > 0
    assert not loaded.engine.offloaded._lot.away


def test_selection_and_evaluation_are_the_same(parked: list[int], cli, tmp_path: Path) -> None:
    """Directions added, ablated, and joined at their block."""
    model = Path(__file__).parents[2] / "data/demo-model"
    run = tmp_path / "run"
    sizes = ("--n-train", "16", "--n-val", "8", "--n-test", "8", "--positions", "-2,-1")
    assert cli("run", model, "-o", run, *sizes, "--offload").code == 0
    assert parked
    assert not any(parked)
    found = {}
    for mode in ("--offload", "--no-offload"):
        result = cli("select", run, "--n-val", "8", mode, "--json")
        assert result.code == 0, result.err
        found[mode] = result.json
    one, other = found.values()
    assert one["winner"] == other["winner"]
    for a, b in zip(one["candidates"], other["candidates"], strict=True):
        for metric in b["computed"]:
            assert a[metric] == pytest.approx(b[metric], abs=1e-4)


def test_storages_that_several_passes_share_come_back_to_each() -> None:
    shared = torch.arange(65536.0)
    views: list[Tensor] = [shared[:100], shared[100:]]
    lot = activation_swap.Lot(activation_store.Activations(1 << 30))
    passes = [activation_swap.Parked(lot, set()) for _ in views]
    for one, view in zip(passes, views, strict=True):
        one.put((view, {"mask": shared}))
    assert shared.untyped_storage().nbytes() == 0
    passes[1].bring(views[1])
    assert torch.equal(shared, torch.arange(65536.0))
    passes[1].put(())
    assert shared.untyped_storage().nbytes() == 0
    passes[0].bring()
    assert torch.equal(views[0], torch.arange(100.0))
    fixed = {shared.untyped_storage()._cdata}
    activation_swap.Parked(lot, fixed).put(shared)
    assert shared.untyped_storage().nbytes() == 65536 * 4
