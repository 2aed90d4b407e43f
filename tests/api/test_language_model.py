"""wrap and load: one object, whatever the model was opened with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import abliterate as ab
from abliterate.errors import AbliterateError, CheckpointError, UsageError

TEXTS = ["a short one", "another, rather longer one"]


def test_pairs_objects_and_streams_give_the_same_numbers(tiny) -> None:
    folder = str(tiny("llama"))
    pair = (AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    streamed = ab.load(folder, device="cpu", offload=True)
    given: list[Any] = [pair, ab.wrap(*pair), ab.load_model(folder, device="cpu"), streamed]
    values = [ab.activations(one, TEXTS, layer=2) for one in given]
    assert values[0].shape == (2, 48)
    for other in values[1:]:
        assert torch.allclose(values[0], other, atol=1e-5)
    assert streamed.is_streamed
    assert type(streamed) is type(ab.wrap(*pair))
    assert repr(streamed).endswith("llama, 4 layers, d_model 48, float32 on cpu, streamed)")
    with pytest.raises(UsageError, match="use offload=False"):
        ab.generate(streamed, TEXTS)
    for change in (ab.ablate(streamed, torch.ones(48)), ab.add(streamed, torch.ones(48), 1)):
        with pytest.raises(UsageError, match="does not run on a streamed model"):
            change.attach()
    streamed.close()


def test_what_is_no_model(tiny, tmp_path: Path) -> None:
    loaded = ab.load_model(str(tiny("llama")), device="cpu")
    for given in (None, "name", loaded.model, (loaded.model,), 3):
        with pytest.raises(UsageError, match=r"\(model, tokenizer\) pair"):
            ab.activations(given, TEXTS, layer=1)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="in this order"):
        ab.activations((loaded.tokenizer, loaded.model), TEXTS, layer=1)
    with pytest.raises(UsageError, match="not a int"):
        ab.wrap(loaded.model, 3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"model\.eval\(\)"):
        ab.wrap(loaded.model.train(), loaded.tokenizer)
    with pytest.raises(CheckpointError, match="config"):
        ab.load(tmp_path)
    with pytest.raises(AbliterateError, match="dtype must be"):
        ab.load(str(tiny("llama")), dtype="float7")
