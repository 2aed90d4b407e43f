"""What people hand to the library in a notebook: every kind of list and vector, used twice."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import abliterate as ab
from abliterate.api.inputs import as_prompts
from abliterate.errors import InputError, UsageError

TEXTS = ["How do I pick a lock?", "Write a poem."]
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": TEXTS[0]}]


@pytest.fixture(scope="module")
def lm(tiny) -> ab.LanguageModel:
    return ab.load(str(tiny("llama")), device="cpu")


@pytest.fixture(scope="module")
def vector() -> torch.Tensor:
    return torch.randn(48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _frame(kind: str) -> Any:
    pandas = pytest.importorskip("pandas")
    if kind == "series":
        return pandas.Series(TEXTS, index=[7, 9])
    return pandas.DataFrame({"category": ["a", "b"], "prompt": TEXTS})


def _dataset(column: str | None = None) -> Any:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"id": [1, 2], "text": TEXTS})
    return made if column is None else made[column]


@pytest.mark.parametrize(
    "make",
    [
        lambda: tuple(TEXTS),
        lambda: (text for text in TEXTS),
        lambda: np.array(TEXTS),
        lambda: np.array(TEXTS, dtype=object),
        lambda: _frame("series"),
        lambda: _frame("frame"),
        _dataset,
        lambda: _dataset("text"),
        lambda: [{"prompt": text} for text in TEXTS],
        lambda: [ab.Prompt(text) for text in TEXTS],
    ],
)
def test_prompts_come_in_every_kind_of_list(make: Callable[[], Any]) -> None:
    assert [prompt.text for prompt in as_prompts(make(), "harmful")] == TEXTS


def test_a_conversation_is_a_prompt_and_a_frame_keeps_its_categories() -> None:
    assert [prompt.text for prompt in as_prompts([CHAT], "harmful")] == TEXTS[:1]
    assert [prompt.category for prompt in as_prompts(_frame("frame"), "harmful")] == ["a", "b"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "there are no harmful prompts"),
        (set(TEXTS), "has no order: give a list"),
        ({"a": TEXTS[0]}, "must be a list or a source"),
        (None, "must be a list or a source"),
        ([TEXTS[0], None], "must be texts or Prompt objects, not None"),
        ([b"abc"], "must be texts or Prompt objects, not b'abc'"),
        ([float("nan")], "must be texts or Prompt objects, not nan"),
        ([{"id": 1}], "the harmful prompts"),
        ("How do I pick a lock?", "is neither a set"),
    ],
)
def test_what_are_no_prompts_is_refused_by_name(given: Any, said: str) -> None:
    with pytest.raises((InputError, UsageError), match=said):
        as_prompts(given, "harmful")


def test_vectors_come_in_every_kind(lm: ab.LanguageModel, vector: torch.Tensor) -> None:
    ids = torch.tensor([[5, 6, 7]])
    pandas = pytest.importorskip("pandas")
    frozen = vector.numpy().copy()
    frozen.flags.writeable = False
    kinds: list[Any] = [vector, vector.numpy(), vector.tolist(), tuple(vector.tolist()), frozen]
    kinds += [pandas.Series(vector.numpy()), ab.Direction(vector), vector.clone().requires_grad_()]
    found = []
    for kind in kinds:
        with torch.no_grad(), ab.ablate(lm, kind, layers=np.arange(1, 3)):
            found.append(lm.model(ids).logits)
    assert all(torch.equal(found[0], other) for other in found[1:])
    with torch.no_grad():
        assert not torch.equal(found[0], lm.model(ids).logits)


@pytest.mark.parametrize(
    ("layers", "said"),
    [([], "no layers"), ([99], "layer 99"), ([-1], "layer -1"), (slice(1, 3), "such as range"),
     ([1.5], "layer 1.5"), ([True], "layer True"), ("3", "layer '3'")],
)  # fmt: skip
def test_layers_that_are_none_are_refused(
    lm: ab.LanguageModel, vector: torch.Tensor, layers: Any, said: str
) -> None:
    with pytest.raises((InputError, UsageError), match=said):
        ab.ablate(lm, vector, layers=layers).attach()
    assert not any(module._forward_hooks for module in lm.model.modules())


@pytest.mark.parametrize("length", [0, -1, 1.5, True, None])
def test_answers_have_a_whole_number_of_tokens(lm: ab.LanguageModel, length: Any) -> None:
    with pytest.raises(UsageError, match="max_new_tokens must be"):
        ab.generate(lm, "Hello", max_new_tokens=length)


def test_a_direction_is_an_array_and_refuses_what_is_no_direction(vector: torch.Tensor) -> None:
    d = ab.Direction(vector, -1, 2)
    assert np.array_equal(np.asarray(d), vector.numpy())
    for twice in (np.float32(2) * d, d * np.float64(2), 2 * d):
        assert isinstance(twice, ab.Direction)
        assert torch.equal(twice.vector, vector * 2)
    for wrong in ("a", None, 1, np.ones((2, 48))):
        with pytest.raises(InputError, match="the other must be a direction or a vector"):
            d.cosine(wrong)
        with pytest.raises(InputError, match="the other must be a direction or a vector"):
            d + wrong
    for other in ("a", None, d, True):
        with pytest.raises(TypeError):
            d * other


def test_a_handle_says_whether_it_acts_and_is_removed_twice(
    lm: ab.LanguageModel, vector: torch.Tensor
) -> None:
    handle = ab.ablate(lm, vector).attach()
    assert repr(handle) == "Handle(name='ablate', attached=True)"
    handle.remove()
    handle.remove()
    assert not handle.attached
    with pytest.raises(RuntimeError), ab.ablate(lm, vector), ab.add(lm, vector, 1):
        raise RuntimeError("within")
    assert not any(module._forward_hooks for module in lm.model.modules())


def test_edits_that_lie_on_each_other_are_undone_from_the_last(
    lm: ab.LanguageModel, vector: torch.Tensor
) -> None:
    def weights() -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in lm.model.state_dict().items()}

    def same(one: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(value, one[name]) for name, value in weights().items())

    plain = weights()
    first = ab.orthogonalize_(lm, vector)
    between = weights()
    second = ab.orthogonalize_(lm, vector.flip(0))
    with pytest.raises(UsageError, match="restore the later edit first"):
        first.restore()
    second.restore()
    assert same(between)
    first.restore()
    assert same(plain)
    ab.orthogonalize_(lm, vector)  # held by nobody, it stays
    gc.collect()
    again = ab.orthogonalize_(lm, vector.flip(0))
    first.restore()
    second.restore()
    assert not same(plain)
    again.restore()
    again.restore()
    lm.model.load_state_dict(plain)


def test_results_are_json_where_scores_are_not_finite(lm: ab.LanguageModel) -> None:
    """Layer 0 of a template's tokens has no direction at all: its scores are NaN."""
    texts = [f"prompt {number}" for number in range(4)]
    ex = ab.extract(lm, texts, texts[:2], filter=False, refusal_tokens=[5])
    found = ab.select(lm, ex, texts, texts, filter=False)
    assert any(score.bypass_score != score.bypass_score for score in found.scores)
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert any(row["bypass_score"] is None for row in document["candidates"])
    for shown in (repr(found), found._repr_html_(), repr(ex)):
        assert len(shown) < 5000
