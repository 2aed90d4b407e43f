"""``ablate`` and ``add`` seen from the residual stream itself."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from abliterate import ablate, add
from abliterate.errors import InputError
from abliterate.inference.forward import capture_resid_pre
from abliterate.inference.interventions import AblationSites
from abliterate.metrics.refusal import kl_divergence, refusal_score
from abliterate.writers import find_writers

IDS = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(1))
DIRECTION = torch.randn(48, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3


def _load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _stream(model) -> torch.Tensor:
    """``resid_pre`` at every token, ``[batch, tokens, n_layers, d_model]``."""
    with torch.no_grad(), capture_resid_pre(model, range(IDS.shape[1])) as captured:
        model(IDS)
        return captured().double()


@pytest.mark.parametrize("kind", ["llama", "llama-bias", "qwen2", "gemma", "mistral"])
def test_ablated_streams_are_orthogonal_to_the_direction(kind: str, tiny) -> None:
    model = _load(tiny(kind))
    unit = DIRECTION / DIRECTION.norm()
    plain = _stream(model)
    assert ((plain @ unit).abs() / plain.norm(dim=-1)).max() > 0.1
    with ablate(model, DIRECTION):
        ablated = _stream(model)
    assert ((ablated @ unit).abs() / ablated.norm(dim=-1)).max() < 1e-6
    # Before any block, ablation is exactly the projection of the embedding.
    first = plain[:, :, 0]
    expected = first - (first @ unit).unsqueeze(-1) * unit
    assert torch.allclose(ablated[:, :, 0], expected, atol=1e-5)
    assert torch.equal(_stream(model), plain)  # the hooks are gone


def test_add_shifts_its_own_layer_and_none_before(tiny) -> None:
    model = _load(tiny("llama"))
    seen = []
    plain = _stream(model)
    # A hook that comes after `add`'s sees what the block itself gets.
    with add(model, DIRECTION, layer=2, coeff=-0.5):
        handle = model.model.layers[2].register_forward_pre_hook(
            lambda module, args: seen.append(args[0].double())
        )
        shifted = _stream(model)
        handle.remove()
    assert torch.equal(shifted[:, :, :2], plain[:, :, :2])
    assert torch.allclose(seen[0], plain[:, :, 2] - 0.5 * DIRECTION, atol=1e-5)
    assert not torch.allclose(shifted[:, :, 3], plain[:, :, 3], atol=1e-2)
    assert torch.equal(_stream(model), plain)


def test_hooks_are_removed_after_an_error(tiny) -> None:
    model = _load(tiny("llama"))
    plain = _stream(model)
    for context in (ablate(model, DIRECTION), add(model, DIRECTION, 1)):
        with pytest.raises(ZeroDivisionError), context:
            raise ZeroDivisionError
    assert torch.equal(_stream(model), plain)


def test_sites_that_are_used_again_project_the_direction_of_that_time(tiny) -> None:
    model = _load(tiny("llama"))
    plain = _stream(model)
    sites = AblationSites(model, find_writers(model).sites)
    other = torch.roll(DIRECTION, 1)
    for direction in (DIRECTION, other, DIRECTION):
        unit = direction / direction.norm()
        with sites.under(unit):
            once = _stream(model)
        with ablate(model, direction):
            assert torch.equal(once, _stream(model))
        assert ((once @ unit).abs() / once.norm(dim=-1)).max() < 1e-6
    assert torch.equal(_stream(model), plain)


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (torch.ones(47), r"\[47\]"),
        (torch.zeros(48), "zero"),
        (torch.full((48,), float("nan")), "NaN"),
    ],
)
def test_unusable_directions_are_refused(direction, message, tiny) -> None:
    model = _load(tiny("llama"))
    with pytest.raises(InputError, match=message), ablate(model, direction):
        pass
    with pytest.raises(InputError, match=message), add(model, direction, 0):
        pass
    with pytest.raises(InputError, match="layers 0 to 3"), add(model, DIRECTION, 4):
        pass


def test_refusal_score_is_the_log_odds_of_the_refusal_tokens() -> None:
    probabilities = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.01, 0.01, 0.49, 0.49]])
    scores = refusal_score(probabilities.log(), [0, 1])
    expected = torch.tensor([0.7 / 0.3, 0.02 / 0.98], dtype=torch.float64).log()
    assert scores.dtype == torch.float64
    assert torch.allclose(scores, expected, atol=1e-6)
    certain = refusal_score(torch.tensor([[200.0, 0.0]]), [0])
    assert float(certain) == pytest.approx(18.42, abs=0.01)  # log(1 + 1e-8) - log(1e-8)


def test_kl_is_from_baseline_to_ablated_with_the_papers_epsilon() -> None:
    p = torch.tensor([[0.9, 0.1, 0.0]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    expected = (p * ((p + 1e-6).log() - (q + 1e-6).log())).sum()
    logits = torch.tensor([[0.9, 0.1, 1e-300]], dtype=torch.float64).log()
    assert float(kl_divergence(logits, q.log())) == pytest.approx(float(expected))
    assert float(kl_divergence(q.log(), logits)) > 2 * float(expected)  # not symmetric
    assert float(kl_divergence(q.log(), q.log())) == 0.0
