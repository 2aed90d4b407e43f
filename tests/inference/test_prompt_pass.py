"""Prompts that are read in groups, their opening once: the same answers, for fewer tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from far_from_ties import far_from_ties
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
)

from abliterate.inference import batch_decoding
from abliterate.inference.generation import greedy_answers
from abliterate.inference.interventions import ablate
from abliterate.inference.prompt_pass import PromptPass
from abliterate.models.loading import Checkpoint, LoadedModel

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "rotary": lambda: LlamaConfig(**_SIZES),
    "learned positions": lambda: GPT2Config(
        vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=256, eos_token_id=2
    ),
    # Every other layer sees eight tokens back, of prompts that are longer.
    "sliding window": lambda: Gemma2Config(**_SIZES, sliding_window=8),
    "wide window": lambda: Gemma2Config(**_SIZES, sliding_window=128),
}
OPENING = list(range(3, 15))


def _loaded(config: PreTrainedConfig) -> LoadedModel:
    model = far_from_ties(config)

    class Tokenizer:
        eos_token_id = 2
        added_tokens_decoder = MappingProxyType({})

        def apply_chat_template(self, *args: object, **kwargs: object) -> str:
            return ""

    return LoadedModel(model, Tokenizer(), Checkpoint("x", Path()))


def _prompts(opening: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 2, 3, 3, 4, 7, 7, 31, 60, 61]
    return [[*opening, *torch.randint(15, 96, (n,), generator=generator).tolist()] for n in lengths]


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("opening", [[], OPENING])
@pytest.mark.parametrize("name", ["rotary", "learned positions", "sliding window"])
def test_answers_are_those_of_one_prompt_at_a_time(
    name: str, opening: list[int], hooks: bool
) -> None:
    loaded = _loaded(CONFIGS[name]())
    prompts = _prompts(opening or [3])
    direction = torch.linspace(-1, 1, 32)
    read: list[int] = []
    loaded.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: read.append(args[0].numel())
    )
    with ablate(loaded.model, direction) if hooks else nullcontext():
        alone = [greedy_answers(loaded, [prompt], 6)[0] for prompt in prompts]
        read.clear()
        assert greedy_answers(loaded, prompts, 6) == alone
    assert len(set(map(tuple, alone))) > 2
    longest = max(map(len, prompts))
    assert sum(read) < len(prompts) * longest  # answers included, of a plain start's reading alone


def test_an_opening_that_a_window_would_cut_is_read_with_each_prompt() -> None:
    prompts = _prompts(OPENING)
    assert PromptPass(_loaded(CONFIGS["wide window"]()).model, prompts).prefix == len(OPENING) - 1
    assert PromptPass(_loaded(CONFIGS["sliding window"]()).model, prompts).prefix == 0


def test_a_recurrent_state_is_not_put_together() -> None:
    config = MambaConfig(
        vocab_size=96, hidden_size=16, num_hidden_layers=2, state_size=4, eos_token_id=2
    )
    model = _loaded(config).model
    assert not PromptPass(model, _prompts(OPENING)).saves(range(10))


@pytest.mark.parametrize("name", ["rotary", "learned positions", "sliding window"])
def test_rows_that_end_one_by_one_leave_the_others_answers_as_they_are(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, prompts = _loaded(CONFIGS[name]()), _prompts([3])[::3]
    endless = greedy_answers(loaded, prompts[2:], 10)
    # The longest prompt's answer ends first.
    ends = [answer[at] for answer, at in zip(endless, (9, 2), strict=True)]
    alone = [greedy_answers(loaded, [prompt], 70, ends=ends)[0] for prompt in prompts]
    lengths = set(map(len, alone))
    assert len(lengths) > 2, lengths
    assert max(lengths) > 5, lengths
    cuts: list[int] = []
    cut_start = batch_decoding.cut_start
    monkeypatch.setattr(
        batch_decoding,
        "cut_start",
        lambda cache, count: (cuts.append(count), cut_start(cache, count)),
    )
    for room in (1, 16):  # keys and values are moved with each token, and with few
        monkeypatch.setattr("abliterate.inference.roomy_cache._ROOM", room)
        assert greedy_answers(loaded, prompts, 70, ends=ends) == alone
    # The longest prompt's end makes the others' padding shorter, unless a window counts tokens.
    assert bool(cuts) == ("window" not in name)
