"""Answers from recorded passes: the tokens of plain decoding, whatever ends when.

There is no CUDA here: in place of a graph the pass runs again, with the same tensors. What only a
GPU shows, ``scripts/bench_generate.py --device cuda`` compares there.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from far_from_ties import far_from_ties
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
)

from abliterate import ablate, add, load_model
from abliterate.inference import batch_decoding, generation, recorded_steps
from abliterate.inference.generation import greedy_answers
from abliterate.inference.interventions import ablate_at
from abliterate.inference.replayable_hooks import replayable
from abliterate.models.loading import Checkpoint, LoadedModel
from abliterate.writers import find_writers

LONGEST = 60
_SIZES = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 2, "pad_token_id": 0,
    "max_position_embeddings": 256,
}  # fmt: skip


class Recording:
    """Stands in for CUDA graphs: counts what is recorded, and what is replayed."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            step()

        return replay


@pytest.fixture
def recording(monkeypatch) -> Recording:
    stand_in = Recording()
    monkeypatch.setitem(recorded_steps.RECORDERS, "cpu", stand_in)
    monkeypatch.setattr(recorded_steps, "_tried", recorded_steps.WeakKeyDictionary())
    return stand_in


def _prompts() -> list[list[int]]:
    numbers = random.Random(5)
    opening = [5, 6, 7]
    return [
        [*opening, *numbers.choices(range(20, 500), k=numbers.randrange(2, 30))] for _ in range(9)
    ]


def _ends_by_length(loaded: LoadedModel) -> None:
    """Answers of many lengths: they end once prompt and answer fill a period."""
    model = loaded.model
    seen = {}

    def note(module, args, kwargs):
        positions = kwargs["position_ids"]
        if positions is None:
            positions = torch.arange(kwargs["input_ids"].shape[1])[None]
        seen["positions"] = positions[:, -1]

    def end(module, args, logits):
        over = (seen["positions"] + 2) % 41 == 0
        logits[..., 2] = -1e4
        logits[:, -1, 2] = torch.where(over, 1e4, logits[:, -1, 2])
        return logits

    model.get_decoder().register_forward_pre_hook(replayable(note), with_kwargs=True)
    model.get_output_embeddings().register_forward_hook(replayable(end))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prompts_are_read", ["by groups", "into room", "by the library"])
def test_recorded_answers_are_those_of_plain_decoding(
    kind: str, attention: str, prompts_are_read: str, tiny, recording, monkeypatch
) -> None:
    grouped, worth = prompts_are_read == "by groups", prompts_are_read != "by the library"
    monkeypatch.setattr(generation.PromptPass, "saves", lambda self, rows: grouped)
    monkeypatch.setattr(batch_decoding, "_ROOM_WORTH", 1 if worth else 1e9)
    loaded = load_model(str(tiny(kind)))
    loaded.model.set_attn_implementation(attention)
    _ends_by_length(loaded)
    prompts = _prompts()
    vector = torch.randn(48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def answers(change: Callable[[], Any]) -> list[list[int]]:
        with change():
            return greedy_answers(loaded, prompts, LONGEST)

    for change in (
        nullcontext,
        partial(ablate, loaded.model, vector),
        partial(add, loaded.model, vector, 1),
    ):
        recorded = recording.recorded
        found = answers(change)
        assert recording.recorded > recorded + 1  # once more for the rows that are left
        with monkeypatch.context() as plain:
            plain.delitem(recorded_steps.RECORDERS, "cpu")
            expected = answers(change)
        assert found == expected
        assert len({len(answer) for answer in found}) > 4
    assert recording.replayed > 3 * 30


@pytest.mark.parametrize(
    "kind", ["learned positions", "experts", "windows between", "a window everywhere"]
)
def test_other_architectures_answer_as_they_do_one_by_one(
    kind: str, tiny, recording, monkeypatch
) -> None:
    config = {
        "learned positions": lambda: GPT2Config(
            vocab_size=512, n_embd=32, n_layer=3, n_head=4, n_positions=256, eos_token_id=2
        ),
        "experts": lambda: MixtralConfig(
            **_SIZES, num_local_experts=4, sliding_window=None
        ),
        # Prompts of 5 to 32 tokens begin within the window and beyond it, and answers cross it.
        "windows between": lambda: Gemma2Config(**_SIZES, head_dim=8, sliding_window=12),
        "a window everywhere": lambda: MistralConfig(**_SIZES, sliding_window=12),
    }[kind]()  # fmt: skip
    model = far_from_ties(config)
    loaded = LoadedModel(model, load_model(str(tiny("llama"))).tokenizer, Checkpoint("x", Path()))
    prompts = _prompts()
    with ablate(model, torch.linspace(-1, 1, 32)):
        with monkeypatch.context() as plain:
            plain.delitem(recorded_steps.RECORDERS, "cpu")
            alone = [greedy_answers(loaded, [prompt], 24)[0] for prompt in prompts]
        assert greedy_answers(loaded, prompts, 24) == alone
    assert recording.replayed > 10
    assert len(set(map(tuple, alone))) > 2


def test_attention_that_counts_from_the_end_of_its_keys_is_not_recorded(recording) -> None:
    """GPT-Neo's local layers see so many keys back, of all there is room for."""
    config = GPTNeoConfig(
        vocab_size=512, hidden_size=32, num_layers=2, num_heads=4, window_size=64,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=256,
    )  # fmt: skip
    model, device = AutoModelForCausalLM.from_config(config).eval(), torch.device("cpu")
    assert recorded_steps.recorder(model, device, 32) is recording  # less than the window
    assert recorded_steps.recorder(model, device, 256) is None
    assert recorded_steps.recorder(model, device, 32) is None


def test_chunks_and_several_windows_are_not_recorded() -> None:
    def known(**settings: Any) -> bool:
        return recorded_steps._has_known_masks(LlamaConfig(**_SIZES, **settings))

    full, slides, chunks = "full_attention", "sliding_attention", "chunked_attention"
    assert known()
    assert known(layer_types=[full, slides, slides], sliding_window=8)
    assert not known(layer_types=[full, chunks, chunks], attention_chunk_size=8)
    assert not known(attention_chunk_size=8)
    assert not known(layer_types=[full, "linear_attention", full])


def test_first_logits_and_early_ends_are_the_same(tiny, recording, monkeypatch) -> None:
    loaded = load_model(str(tiny("llama")))
    prompts = _prompts()

    def answers() -> tuple[list[list[int]], dict[int, torch.Tensor]]:
        first: dict[int, torch.Tensor] = {}
        found = greedy_answers(
            loaded,
            prompts,
            LONGEST,
            settled=lambda said: sum(said) % 3 == 0,
            on_first=lambda rows, logits: first.update(zip(rows, logits, strict=True)),
        )
        return found, first

    found, first = answers()
    assert recording.replayed
    monkeypatch.delitem(recorded_steps.RECORDERS, "cpu")
    expected, plain = answers()
    assert found == expected
    assert all(torch.allclose(first[row], plain[row], atol=1e-4) for row in range(len(prompts)))
    assert {len(answer) % 8 for answer in found if len(answer) < LONGEST} == {0}


@pytest.mark.parametrize("recorded", [0, 1])
def test_a_pass_that_cannot_be_recorded_is_run(
    recorded: int, tiny, recording, monkeypatch, caplog
) -> None:
    """At the trial, as with experts that are chosen on the host, or first under hooks."""
    loaded = load_model(str(tiny("llama")))
    prompts = _prompts()
    monkeypatch.delitem(recorded_steps.RECORDERS, "cpu")
    expected = greedy_answers(loaded, prompts, LONGEST)
    tries = []

    def fails_later(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        tries.append(step)
        if len(tries) > recorded:
            raise RuntimeError("operation not permitted when stream is capturing")
        return step

    monkeypatch.setitem(recorded_steps.RECORDERS, "cpu", fails_later)
    with caplog.at_level("DEBUG", logger="abliterate"):
        for _ in range(2):
            assert greedy_answers(loaded, prompts, LONGEST) == expected
    assert len(tries) == (3 if recorded else 1)
    assert "not permitted when stream is capturing" in caplog.text


def test_memory_that_runs_out_while_recording_makes_batches_smaller(
    tiny, recording, monkeypatch
) -> None:
    loaded = load_model(str(tiny("llama")))
    prompts = _prompts()
    expected = greedy_answers(loaded, prompts, LONGEST)
    rows = []
    honest = recorded_steps.RecordedSteps._step

    def short_of_memory(self) -> None:
        rows.append(len(self.tokens))
        if len(self.tokens) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        honest(self)

    monkeypatch.setattr(recorded_steps.RecordedSteps, "_step", short_of_memory)
    assert greedy_answers(loaded, prompts, LONGEST) == expected
    assert max(rows) == 9
    assert rows[-1] <= 5


@pytest.mark.parametrize("short", ["in the trial", "of one answer", "of one answer, midway"])
def test_an_answer_that_cannot_be_recorded_for_memory_is_said_all_the_same(
    short: str, tiny, recording, monkeypatch
) -> None:
    loaded = load_model(str(tiny("llama")))
    prompts = _prompts()[:1]
    with monkeypatch.context() as plain:
        plain.delitem(recorded_steps.RECORDERS, "cpu")
        expected = greedy_answers(loaded, prompts, LONGEST)
    honest, calls = recorded_steps.RecordedSteps._step, []

    def short_of_memory(self) -> None:
        calls.append(len(self.tokens))
        rows, after = (2, 0) if short == "in the trial" else (1, 20 if "midway" in short else 0)
        if len(self.tokens) == rows and calls.count(rows) > after:
            raise torch.OutOfMemoryError("CUDA out of memory")
        honest(self)

    monkeypatch.setattr(recorded_steps.RecordedSteps, "_step", short_of_memory)
    found: list[list[int]] = []
    answers = greedy_answers(
        loaded, prompts, LONGEST, on_answer=lambda row, answer: found.append(list(answer))
    )
    assert answers == found == expected
    assert calls


def test_keys_and_values_are_held_twice_of_one_layer_alone(tiny, recording, monkeypatch) -> None:
    loaded = load_model(str(tiny("llama")))
    moved: list[StorageWeakRef] = []
    alive: list[int] = []

    def watched(held: torch.Tensor, *more: Any) -> torch.Tensor:
        alive.append(sum(not storage.expired() for storage in moved))
        moved.append(StorageWeakRef(held.untyped_storage()))
        return honest(held, *more)

    honest = recorded_steps._with_room
    monkeypatch.setattr(recorded_steps, "_with_room", watched)
    place = generation.PromptPass._place

    def placed(self, whole, where, batch, found) -> None:
        watched(found, found.shape[2], found.shape[2])
        place(self, whole, where, batch, found)

    monkeypatch.setattr(generation.PromptPass, "_place", placed)
    monkeypatch.setattr(generation.PromptPass, "saves", lambda self, rows: True)
    monkeypatch.setattr(generation.PromptPass, "_groups", lambda self, rows: [rows[:4], rows[4:]])
    assert greedy_answers(loaded, _prompts(), LONGEST)
    assert len(moved) > 2 * 2 * 4
    assert max(alive) <= 3  # keys and values of two groups


def test_a_way_that_gives_something_else_is_not_used(tiny, recording, monkeypatch) -> None:
    loaded = load_model(str(tiny("llama")))
    prompts = _prompts()
    honest = recorded_steps.RecordedSteps._step

    def one_too_far(self) -> None:
        if self.logits is None:
            self._positions.add_(1)
        honest(self)

    monkeypatch.setattr(recorded_steps.RecordedSteps, "_step", one_too_far)
    assert recorded_steps.recorder(loaded.model, torch.device("cpu"), 64) is None
    found = greedy_answers(loaded, prompts, LONGEST)
    monkeypatch.delitem(recorded_steps.RECORDERS, "cpu")
    assert found == greedy_answers(loaded, prompts, LONGEST)


def test_a_recording_that_replays_nothing_is_not_used(tiny, monkeypatch) -> None:
    """As one made on another GPU than the model's: the pass runs while nothing is recorded."""

    def empty(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        step()
        return lambda: None

    monkeypatch.setitem(recorded_steps.RECORDERS, "cpu", empty)
    model = load_model(str(tiny("llama"))).model
    assert recorded_steps.recorder(model, torch.device("cpu"), 64) is None


def test_no_position_beyond_the_table_is_asked_for(tiny, recording, monkeypatch) -> None:
    """Recorded tokens are said in turns, some of them after the last answer has ended."""
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=43)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    tokenizer = load_model(str(tiny("llama"))).tokenizer
    loaded = LoadedModel(model, tokenizer, Checkpoint("x", Path()))
    asked: list[int] = []
    model.transformer.register_forward_pre_hook(
        replayable(lambda module, args, kwargs: asked.append(int(kwargs["position_ids"].max()))
                   if kwargs.get("position_ids") is not None else None),
        with_kwargs=True,
    )  # fmt: skip
    prompts = [[*range(30, 50)], [*range(70, 88)]]

    def answers() -> list[list[int]]:
        # All of them end before the table does; the longest answer would not.
        return greedy_answers(loaded, prompts, 60, settled=lambda said: len(said) >= 24)

    found = answers()
    assert recording.replayed > 10
    assert max(asked) < 43
    monkeypatch.delitem(recorded_steps.RECORDERS, "cpu")
    assert found == answers()


def test_another_way_to_compute_is_tried_again(tiny, recording) -> None:
    model, device = load_model(str(tiny("llama"))).model, torch.device("cpu")
    for change in (lambda: None, lambda: model.set_attn_implementation("eager"), model.half):
        change()
        before = recording.recorded
        for _ in range(2):
            assert recorded_steps.recorder(model, device, 64) is recording
        assert recording.recorded == before + 1


def test_hooks_of_others_are_not_recorded(tiny, recording) -> None:
    device = torch.device("cpu")
    model = load_model(str(tiny("llama"))).model
    assert recorded_steps.recorder(model, device, 64) is recording
    calls = []
    handle = model.model.layers[1].register_forward_hook(lambda *args: calls.append(1))
    assert recorded_steps.recorder(model, device, 64) is None  # a replay would not call it
    handle.remove()
    vector = torch.ones(48, dtype=torch.float64)
    with ablate_at(model, lambda: vector, find_writers(model).sites):
        assert recorded_steps.recorder(model, device, 64) is None  # others with every batch
    with ablate(model, vector), add(model, vector, 2):
        assert recorded_steps.recorder(model, device, 64) is recording
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert recorded_steps.recorder(model, device, 64) is None
    handle.remove()
    mlp = model.model.layers[0].mlp
    mlp.forward = partial(type(mlp).forward, mlp)
    assert recorded_steps.recorder(model, device, 64) is None
    del mlp.forward
    assert recorded_steps.recorder(model, device, 64) is recording
    nn.Module.__setattr__(model.model.layers[0], "_hf_hook", object())
    assert recorded_steps.recorder(model, device, 64) is None
    assert recorded_steps.recorder(model, torch.device("meta"), 64) is None
