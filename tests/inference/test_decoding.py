"""Greedy means the arg max of the model's logits, whatever the checkpoint's own settings say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from abliterate.evaluation.lm_eval_tasks import find_tasks, run_tasks
from abliterate.inference.dialogue import Conversation, Decoding, Steering
from abliterate.inference.generation import greedy_answers
from abliterate.models.loading import LoadedModel, load_model
from abliterate.prompts.chat_template import ChatFormat, encode

_COUNT = 8


@pytest.fixture(scope="module")
def loaded(tiny: Callable[..., Path]) -> LoadedModel:
    return load_model(str(tiny("llama")), "cpu")


@pytest.fixture(scope="module")
def case(loaded: LoadedModel) -> tuple[str, list[int], list[int]]:
    """A text, its prompt, and an answer that repeats a token: a penalty would change it."""
    for number in range(40):
        text = f"Which tree is number {number}?"
        prompt = encode(loaded.tokenizer, [text], ChatFormat())[0]
        answer = _arg_max(loaded, prompt)
        if len({*prompt, *answer}) < len(set(prompt)) + len(answer):
            return text, prompt, answer
    raise AssertionError("no answer repeats a token")


def _arg_max(loaded: LoadedModel, prompt: list[int]) -> list[int]:
    """Token by token, without ``generate``."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(_COUNT):
            ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def _settings(expected: list[int]) -> dict[str, dict[str, Any]]:
    """What a generation_config.json may hold that changes greedy decoding."""
    first = expected[0]
    return {
        "repetition_penalty": {"repetition_penalty": 50.0},
        "suppress_tokens": {"suppress_tokens": [first]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [first]},
        "bad_words_ids": {"bad_words_ids": [[first]]},
        "sequence_bias": {"sequence_bias": [[[first], -1e4]]},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "num_beams": {"num_beams": 4, "length_penalty": 5.0},
        "do_sample": {"do_sample": True, "temperature": 50.0},
        "forced_eos_token_id": {"forced_eos_token_id": 7},
        "guidance_scale": {"guidance_scale": 30.0},
    }


@pytest.mark.parametrize("name", [*_settings([0])])
def test_no_setting_of_a_checkpoint_changes_greedy_answers(
    loaded: LoadedModel, case: tuple[str, list[int], list[int]], name: str, monkeypatch
) -> None:
    question, prompt, expected = case
    own = GenerationConfig(**_settings(expected)[name], pad_token_id=0)
    monkeypatch.setattr(loaded.model, "generation_config", own)
    torch.manual_seed(0)
    left_alone = loaded.model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=_COUNT
    )
    assert left_alone[0, len(prompt) :].tolist() != expected, "the setting does nothing"

    assert greedy_answers(loaded, [prompt], _COUNT) == [expected]
    text = loaded.tokenizer.decode(expected, skip_special_tokens=True).strip()
    chat = Conversation(loaded, None, decoding=Decoding(_COUNT))
    assert chat.answer(question, Steering()) == text
    assert loaded.model.generation_config is own


def test_chat_ends_where_evaluations_end(
    loaded: LoadedModel, case: tuple[str, list[int], list[int]], monkeypatch
) -> None:
    """The checkpoint's end of text still counts, in both."""
    question, prompt, expected = case
    own = GenerationConfig(eos_token_id=[expected[2]], repetition_penalty=50.0, pad_token_id=0)
    monkeypatch.setattr(loaded.model, "generation_config", own)
    assert greedy_answers(loaded, [prompt], _COUNT) == [expected[:3]]
    chat = Conversation(loaded, None, decoding=Decoding(_COUNT))
    shown = loaded.tokenizer.decode(expected[:3], skip_special_tokens=True).strip()
    assert chat.answer(question, Steering()) == shown


def test_sampling_has_one_setting_its_temperature(loaded: LoadedModel, monkeypatch) -> None:
    """No penalty and no cut of the checkpoint's own."""
    answers = []
    for own in (GenerationConfig(), GenerationConfig(repetition_penalty=50.0, top_p=0.01)):
        monkeypatch.setattr(loaded.model, "generation_config", own)
        chat = Conversation(loaded, None, decoding=Decoding(_COUNT, 1.0))
        answers.append(chat.answer("Which tree is this?", Steering()))
    assert answers[0] == answers[1]


def test_benchmarks_are_decoded_greedily_too(
    loaded: LoadedModel, case: tuple[str, list[int], list[int]], tmp_path: Path, monkeypatch
) -> None:
    _, prompt, expected = case
    pytest.importorskip("lm_eval")
    text = loaded.tokenizer.decode(prompt)
    target = loaded.tokenizer.decode(expected, skip_special_tokens=True)
    (tmp_path / "data.json").write_text(json.dumps([{"q": text, "a": target}]))
    (tmp_path / "tiny_said.yaml").write_text(
        "task: tiny_said\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.json'}\n"
        'doc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
        f"generation_kwargs:\n  until: []\n  max_gen_toks: {_COUNT}\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    own = GenerationConfig(repetition_penalty=50.0, eos_token_id=2, pad_token_id=0)
    monkeypatch.setattr(loaded.model, "generation_config", own)
    found = run_tasks(loaded, find_tasks("tiny_said", tmp_path))["tiny_said"]
    assert found["exact_match,none"] == 1.0
    assert found["n"] == 1
