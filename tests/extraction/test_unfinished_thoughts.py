"""Prompts about which a thought does not end count nowhere, whatever their scores say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from abliterate.errors import UsageError
from abliterate.extraction.mean_activations import mean_resid_pre
from abliterate.extraction.means import extract
from abliterate.inference.thoughts import Asked
from abliterate.models.loading import LoadedModel, load_model
from abliterate.prompts.chat_template import ChatFormat, encode, render
from abliterate.prompts.sources import Prompt
from abliterate.selection.search import Thresholds, select

ENDED = {"harmful": [True, False, True, True, False], "harmless": [True, True, True, False, True]}


def _prompts(kind: str, letter: str) -> list[Prompt]:
    return [Prompt(f"{kind} {letter} {number}", None) for number in range(5)]


@pytest.fixture(scope="module")
def loaded(tiny: Any) -> LoadedModel:
    return load_model(str(tiny()), "cpu")


def test_unfinished_thoughts_are_in_no_mean_and_no_score(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = ChatFormat()

    def ask(
        loaded: LoadedModel, texts: Sequence[str], chat: ChatFormat, batch_size: Any, kind: str
    ) -> Asked:
        ids = encode(loaded.tokenizer, texts, chat)
        return Asked(ids, ENDED[kind], thought=True)

    monkeypatch.setattr("abliterate.extraction.means.ask", ask)
    monkeypatch.setattr("abliterate.selection.search.ask", ask)
    train = [_prompts(kind, "train") for kind in ENDED]
    found = extract(loaded, *train, positions="-2,-1", refusal_tokens=["I"], filter=False)
    assert found.unfinished == {"harmful": 2, "harmless": 1}
    for kind, prompts, mean, kept in (
        ("harmful", train[0], found.mean_harmful, found.kept_harmful),
        ("harmless", train[1], found.mean_harmless, found.kept_harmless),
    ):
        assert list(kept) == ENDED[kind]
        texts = [p.text for p, ended in zip(prompts, ENDED[kind], strict=True) if ended]
        ids = encode(loaded.tokenizer, texts, chat)
        expected, _ = mean_resid_pre(loaded.model, ids, [-2, -1])
        # Batches of other sizes: what a mean leaves out moves it by 0.01 and more.
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
    val = [_prompts(kind, "val") for kind in ENDED]
    wide = Thresholds(1e9, -1e9, 0.0)
    chosen = select(loaded, found, *val, thresholds=wide, filter=False, search="exhaustive")
    assert (chosen.n_harmful, chosen.n_harmless) == (3, 4)
    assert chosen.unfinished == {"harmful": 2, "harmless": 1}
    monkeypatch.undo()
    kept_val = [
        [p for p, ended in zip(prompts, ENDED[kind], strict=True) if ended]
        for kind, prompts in zip(ENDED, val, strict=True)
    ]
    plain = select(loaded, found, *kept_val, thresholds=wide, filter=False, search="exhaustive")
    assert plain.unfinished == {}
    for one, other in zip(chosen.scores, plain.scores, strict=True):
        assert one.bypass_score == pytest.approx(other.bypass_score, abs=1e-5, nan_ok=True)
        assert one.induce_score == pytest.approx(other.induce_score, abs=1e-5, nan_ok=True)
        assert one.kl_divergence == pytest.approx(other.kl_divergence, abs=1e-5, nan_ok=True)


def test_a_mode_that_is_none_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(UsageError, match="thinking must be answer, skip or whole, not 'off'"):
        render(loaded.tokenizer, "Why?", ChatFormat(thinking="off"))  # type: ignore[arg-type]
