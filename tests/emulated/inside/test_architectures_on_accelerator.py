"""Architectures whose code takes other ways on an accelerator, or whose hooks do."""

from __future__ import annotations

from typing import Any

import accelerator
import pytest
import torch
from architectures.zoo import tiny_model
from torch import Tensor

from abliterate import precision
from abliterate.extraction.mean_activations import mean_resid_pre
from abliterate.inference.forward import all_last_logits
from abliterate.inference.interventions import ablate, add
from abliterate.writers import find_writers, stream_width
from abliterate.writers.residual_stream import leak

_PROMPTS = [list(range(first, first + n)) for first, n in ((3, 8), (20, 12), (40, 16), (60, 8))]


def _measured(model: Any, device: str) -> tuple[list[Tensor], float]:
    """Means, logits under both interventions, and the leak of the first."""
    plan = find_writers(model)
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(stream_width(model, plan), generator=generator, dtype=torch.float64)
    found = [
        mean_resid_pre(model, _PROMPTS, [-2, -1])[0],
        all_last_logits(model, _PROMPTS, intervention=ablate(model, vector)),
        all_last_logits(model, _PROMPTS, intervention=add(model, vector, 1)),
    ]
    with ablate(model, vector):
        ids = torch.tensor([_PROMPTS[0]], device=device)
        return found, leak(model, vector, ids, plan.blocks)


@pytest.mark.parametrize(
    "model_type",
    [
        "gemma2",  # directions of their own behind post-norms, sliding windows
        "qwen3_moe",  # experts: counted and sorted on the device
        "mamba",  # rows cannot be padded
    ],
)
def test_an_architecture_gives_what_it_gives_on_the_cpu(model_type: str) -> None:
    theirs, _ = _measured(tiny_model(model_type), "cpu")
    precision._computes_float64.cache_clear()
    with accelerator.accelerator(float64=False):
        ours, left = _measured(tiny_model(model_type).to("emu"), "emu")
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    assert left < 1e-5
