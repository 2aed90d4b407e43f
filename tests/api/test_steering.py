"""ablate, add and generate: within with, attached, in some layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import abliterate as ab
from abliterate.errors import InputError, UsageError

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def lm(tiny) -> ab.LanguageModel:
    return ab.load(str(tiny("llama")), device="cpu")


@pytest.fixture(scope="module")
def vector() -> torch.Tensor:
    return torch.randn(48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def logits(lm: ab.LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(lm.model(IDS).logits)


def test_ablation_in_some_layers_leaves_the_others(lm: ab.LanguageModel, vector) -> None:
    unit = (vector / vector.norm()).float()
    wrote: dict[tuple[int, str], float] = {}

    def note(layer: int, name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            written = output[0] if isinstance(output, tuple) else output
            wrote[layer, name] = float((written @ unit).abs().max())

        return hook

    handle = ab.ablate(lm, vector, layers=range(1, 3)).attach()
    blocks: Any = lm.model.model.layers
    watching = [
        module.register_forward_hook(note(layer, name))
        for layer, block in enumerate(blocks)
        for name, module in (("attention", block.self_attn), ("mlp", block.mlp))
    ]
    logits(lm)
    handle.remove()
    for one in watching:
        one.remove()
    for (layer, name), along in wrote.items():
        assert (along < 1e-4) == (layer in (1, 2)), (layer, name, along)


def test_attached_hooks_are_removed(lm: ab.LanguageModel, vector) -> None:
    plain = logits(lm)
    with ab.ablate(lm, vector):
        ablated = logits(lm)
    assert not torch.allclose(plain, ablated)
    assert torch.equal(plain, logits(lm))
    change = ab.ablate(lm, vector)
    handle = change.attach()
    assert torch.equal(ablated, logits(lm))
    handle.remove()
    handle.remove()
    assert torch.equal(plain, logits(lm))
    with change:  # again, and with another within
        with ab.add(lm, vector, 1, coeff=2.0):
            assert not torch.equal(ablated, logits(lm))
        assert torch.equal(ablated, logits(lm))
    assert torch.equal(plain, logits(lm))
    with pytest.raises(ZeroDivisionError), change:
        _ = 1 / 0
    assert torch.equal(plain, logits(lm))


def test_directions_tensors_arrays_and_files_are_alike(
    lm: ab.LanguageModel, vector, tmp_path
) -> None:
    direction = ab.Direction(vector, -1, 2)
    path = direction.save(tmp_path / "d.safetensors")
    given = [direction, vector, vector.numpy(), vector.numpy().astype(np.float64)[::1], str(path)]
    found = []
    for one in given:
        with ab.ablate(lm, one):
            found.append(logits(lm))
    assert all(torch.equal(found[0], other) for other in found[1:])
    with ab.add(lm, direction):  # at the layer that it comes from
        own = logits(lm)
    with ab.add(lm, vector.numpy(), 2):
        assert torch.equal(own, logits(lm))
    with ab.add(lm, -direction, coeff=-1.0):
        assert torch.allclose(own, logits(lm))
    with pytest.raises(InputError, match="does not record its own layer: name one"):
        ab.add(lm, vector).attach()
    with pytest.raises(UsageError, match="a folder or a hub id, not NoneType"):
        ab.load(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("layers", [4, -1, [1, 9], range(3, 6), [True], ["1"]])
def test_ablation_of_layers_that_are_none(lm: ab.LanguageModel, vector, layers: Any) -> None:
    with pytest.raises(InputError, match="layers 0 to 3"):
        ab.ablate(lm, vector, layers=layers).attach()


def test_generate_answers_in_order_and_under_hooks(lm: ab.LanguageModel, vector) -> None:
    prompts = ["first", "a second, longer one"]
    answers = ab.generate(lm, prompts, max_new_tokens=6)
    assert [ab.generate(lm, prompt, 6)[0] for prompt in prompts] == answers
    with ab.add(lm, 50 * vector, 1):
        assert ab.generate(lm, prompts, max_new_tokens=6) != answers
    assert ab.generate(lm, prompts, max_new_tokens=6) == answers
    with pytest.raises(UsageError, match=r"^max_new_tokens must be"):
        ab.generate(lm, prompts, max_new_tokens=0)
    with pytest.raises(InputError, match="no given prompts"):
        ab.generate(lm, [])
