"""What the public functions say to arguments that are none: one typed line, before a model runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import abliterate
from abliterate import Direction, Extraction, Loaded, Prompt, Thresholds
from abliterate.errors import AbliterateError, InputError, SelectionError, UsageError

_PROMPTS = [Prompt("a short one"), Prompt("another, longer one", "x")]
_NAN = float("nan")


@pytest.fixture(scope="module")
def loaded(tiny: Callable[..., Path]) -> Loaded:
    return abliterate.load_model(str(tiny("llama")), device="cpu")


@pytest.fixture(scope="module")
def extraction(loaded: Loaded) -> Extraction:
    other = [Prompt("something else"), Prompt("and more")]
    return abliterate.extract(loaded, _PROMPTS, other, refusal_tokens=["I"], filter=False)


@pytest.mark.parametrize(
    ("prompts", "kind"),
    [
        ([], InputError), ((), InputError), ("a text", InputError), (None, UsageError),
        (Prompt("alone"), UsageError), ([Prompt("fine"), None], UsageError),
        (["fine", 3], UsageError), ([Prompt(3)], UsageError), ({"a": 1}, UsageError),
        (7, UsageError),
    ],
)  # fmt: skip
def test_what_are_no_prompts(loaded: Loaded, extraction: Extraction, prompts: Any, kind) -> None:
    def evaluate(harmful: Any, harmless: Any) -> None:
        abliterate.evaluate(loaded, harmful, harmless, [5], interventions=["baseline"])

    for call in (
        lambda *given: abliterate.extract(loaded, *given),
        lambda *given: abliterate.select(loaded, extraction, *given, filter=False),
        evaluate,
    ):
        for given in ((prompts, _PROMPTS), (_PROMPTS, prompts)):
            with pytest.raises(kind, match=r"prompt") as raised:
                call(*given)
            assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "vector",
    [
        torch.zeros(48), torch.full((48,), _NAN), torch.full((48,), float("inf")),
        torch.ones(47), torch.ones(1, 48), torch.ones(48, 1), torch.tensor(1.0),
        torch.ones(48, dtype=torch.complex64), ["r"] * 48, None, Direction(torch.ones(47)),
        np.zeros(48), np.ones(47), np.ones(48, dtype=complex), np.array(["r"] * 48),
    ],
)  # fmt: skip
def test_what_is_no_direction(loaded: Loaded, vector: Any) -> None:
    with pytest.raises(InputError, match="direction"), abliterate.ablate(loaded.model, vector):
        pass
    with pytest.raises(InputError, match="direction"), abliterate.add(loaded.model, vector, 1):
        pass


@pytest.mark.parametrize("layer", [None, -1, 4, 10**9, 1.0, True, "1", torch.tensor(1)])
def test_what_is_no_layer(loaded: Loaded, layer: Any) -> None:
    with pytest.raises(InputError, match="layers 0 to 3"):
        abliterate.add(loaded.model, torch.ones(48), layer).__enter__()


@pytest.mark.parametrize("number", [_NAN, float("inf"), None, "1", True])
def test_what_is_no_coefficient(loaded: Loaded, number: Any) -> None:
    with pytest.raises(UsageError, match="finite number"):
        abliterate.add(loaded.model, torch.ones(48), 1, number).__enter__()
    with pytest.raises(UsageError, match="between 0 and 1"):
        abliterate.ablate(loaded.model, torch.ones(48), number).__enter__()


def test_a_coefficient_that_overflows_the_model(loaded: Loaded) -> None:
    with pytest.raises(UsageError, match=r"too large for torch\.float32"):
        abliterate.add(loaded.model, torch.ones(48), 1, 1e39).__enter__()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"), ({"batch_size": 0}, "batch"),
        ({"batch_size": "many"}, "batch"), ({"interventions": ["bake"]}, "bake"),
        ({"interventions": ["add"]}, "direction"),
    ],
)  # fmt: skip
def test_evaluate_refuses_what_it_cannot_run(loaded: Loaded, options: Any, words: str) -> None:
    given = {"interventions": ["baseline"], "max_new_tokens": 2} | options
    with pytest.raises(UsageError, match=words):
        abliterate.evaluate(loaded, _PROMPTS, _PROMPTS, [5], **given)


@pytest.mark.parametrize("tokens", [[], ["I"], [-1], [512], [1.5]])
def test_what_are_no_refusal_tokens(loaded: Loaded, tokens: Any) -> None:
    with pytest.raises(UsageError, match="refusal token"):
        abliterate.evaluate(loaded, _PROMPTS, _PROMPTS, tokens, interventions=["baseline"])


def test_a_prompt_that_comes_again_is_answered_once_and_counts_again(loaded: Loaded) -> None:
    options: dict[str, Any] = {"interventions": ["baseline"], "max_new_tokens": 4}
    twice = [*_PROMPTS, Prompt(_PROMPTS[0].text, "again"), _PROMPTS[1]]
    found = abliterate.evaluate(loaded, twice, twice, [5], **options)["baseline"]
    once = abliterate.evaluate(loaded, _PROMPTS, _PROMPTS, [5], **options)["baseline"]
    assert found.harmful is not None
    assert once.harmful is not None
    first, second = once.harmful
    assert found.harmful == (first, second, replace(first, category="again"), second)
    assert found.summary()["harmful"]["n"] == 4
    assert found.metrics.harmful == pytest.approx(once.metrics.harmful)


@pytest.mark.parametrize(
    "values", [{"kl": _NAN}, {"induce": _NAN}, {"prune_layers": 1.0}, {"prune_layers": -0.1},
               {"prune_layers": _NAN}],
)  # fmt: skip
def test_what_are_no_thresholds(values: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="must be"):
        Thresholds(**values)


@pytest.mark.parametrize("prune_layers", [0.0, 0.999])
@pytest.mark.parametrize("search", ["staged", "exhaustive"])
@pytest.mark.parametrize("value", [0.0, _NAN, float("inf")])
def test_select_without_any_direction(
    loaded: Loaded, extraction: Extraction, value: float, search: str, prune_layers: float
) -> None:
    none = replace(extraction, mean_harmful=torch.full_like(extraction.mean_harmful, value),
                   mean_harmless=torch.zeros_like(extraction.mean_harmless))  # fmt: skip
    found = abliterate.select(
        loaded, none, _PROMPTS, _PROMPTS, Thresholds(prune_layers=prune_layers), filter=False,
        search=search,
    )  # fmt: skip
    assert found.winner is None
    with pytest.raises(SelectionError, match=r"without a direction|last 100% of layers"):
        found.require_winner()


def test_one_infinite_candidate_leaves_the_others(loaded: Loaded, extraction: Extraction) -> None:
    mean = extraction.mean_harmful.clone()
    mean[-1, 2] = float("inf")
    loose = Thresholds(kl=1e9, induce=-1e9, prune_layers=0.0)
    found = abliterate.select(
        loaded, replace(extraction, mean_harmful=mean), _PROMPTS, _PROMPTS, loose, filter=False
    )
    dropped = {(s.position, s.layer) for s in found.scores if s.reason == "nan"}
    assert (-1, 2) in dropped
    assert found.winner is not None


@pytest.mark.parametrize("shape", [(5, 4, 47), (5, 3, 48), (4, 4, 48), (48,)])
def test_candidates_of_another_model(
    loaded: Loaded, extraction: Extraction, shape: tuple[int, ...]
) -> None:
    count = len(extraction.positions)
    shape = (count - 1, *shape[1:]) if shape[0] == 4 else (count, *shape[1:])
    other = replace(extraction, mean_harmful=torch.ones(shape), mean_harmless=torch.zeros(shape))
    with pytest.raises(InputError, match="has shape"):
        abliterate.select(loaded, other, _PROMPTS, _PROMPTS, filter=False)


@pytest.mark.parametrize("vector", [torch.zeros(48), torch.full((48,), _NAN), torch.ones(47),
                                    torch.ones(48, 1), None])  # fmt: skip
def test_orthogonalize_refuses_what_is_no_direction(tiny, vector: Any, tmp_path: Path) -> None:
    with pytest.raises(AbliterateError):
        abliterate.orthogonalize(str(tiny("llama")), Direction(vector), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [{"n": 0}, {"n": -1}, {"split": "none"}, {"spec": ""}, {"spec": "no/such/file.json"}],
)
def test_load_prompts_refuses_what_is_no_sample(options: dict[str, Any]) -> None:
    with pytest.raises(AbliterateError):
        abliterate.load_prompts(**({"spec": "harmful"} | options))


_WRONG: dict[str, tuple[Any, ...]] = {
    "evaluate": (
        ("refusal_tokens", 5), ("refusal_tokens", "I"), ("interventions", "ablate"),
        ("interventions", 3), ("interventions", [None]), ("edited", ["a"]), ("chat", "plain"),
        ("max_new_tokens", "2"), ("max_new_tokens", None), ("batch_size", 1.5), ("seed", "1"),
        ("borderline", None), ("controls", -1), ("controls", True), ("stop_at_verdict", "no"),
        ("direction", 3),
    ),
    "extract": (
        ("refusal_tokens", 5.5), ("filter", None), ("chat", {}), ("batch_size", []),
        ("seed", None), ("positions", 1.5),
    ),
    "select": (
        ("extraction", {}), ("thresholds", {"kl": 1}), ("thresholds", 0.1), ("filter", "yes"),
        ("chat", 1), ("batch_size", "all"), ("search", None), ("all_layers", 1), ("kl_on", 3),
        ("seed", 0.5), ("project_harmless", "x"), ("project_first_token", None),
    ),
    "inspect": (
        ("extraction", None), ("direction", 7), ("position", "last"), ("harmful", 5),
    ),
    "trace": (
        ("direction", None), ("suffix", 4), ("suffix", ["a"]), ("n_heads", "ten"), ("seed", -1),
        ("harmful", 5),
    ),
    "fragility": (
        ("direction", 1.0), ("steps", "two"), ("max_new_tokens", 0), ("refusal_tokens", 7),
        ("harmless", 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [(name, *pair) for name, pairs in _WRONG.items() for pair in pairs],
)
def test_an_argument_of_another_kind_is_named(
    loaded: Loaded, extraction: Extraction, monkeypatch, name: str, argument: str, value: Any
) -> None:
    given: dict[str, Any] = {"model": loaded, "harmful": _PROMPTS, "harmless": _PROMPTS}
    given |= {"extraction": extraction} if name in ("select", "inspect") else {}
    given |= {"direction": torch.ones(48)} if name in ("inspect", "trace", "fragility") else {}
    given |= {"refusal_tokens": [5]} if name in ("evaluate", "fragility") else {}
    monkeypatch.setattr(type(loaded.model), "forward", lambda *a, **k: pytest.fail("it ran"))
    with pytest.raises(AbliterateError) as raised:
        getattr(abliterate, name)(**given | {argument: value})
    said = str(raised.value)
    assert argument in said or argument.replace("_", " ") in said
    assert "\n" not in said


def test_evaluate_has_the_controls_of_the_command(loaded: Loaded, extraction: Extraction) -> None:
    found = abliterate.evaluate(
        loaded, _PROMPTS, ["x", *(p.text for p in _PROMPTS)], [5], extraction[-1, 2],
        ["ablate", "add"], max_new_tokens=1, controls=2, stop_at_verdict=True,
    )  # fmt: skip
    for name in ("ablate", "add"):
        held = found.to_dict()["controls"][name]
        assert [len(f["members"]) for f in held["families"].values()] == [2, 2]
        assert held["selected"]["kl_divergence"] == found[name].metrics.kl
    norm = extraction[-1, 2].vector.norm()
    drawn = torch.from_numpy(np.random.default_rng([0, *b"isotropic"]).standard_normal((2, 48)))
    other = Direction(drawn[0] / drawn[0].norm() * norm, -1, 2)
    again = abliterate.evaluate(loaded, _PROMPTS, ["x", *(p.text for p in _PROMPTS)], [5], other,
                                ["add"], max_new_tokens=1)  # fmt: skip
    member = found["add"].controls["families"]["isotropic"]["members"][0]
    assert again["add"].metrics.kl == pytest.approx(member["kl_divergence"], rel=1e-3)


def test_select_says_which_prompts_extract_has_used(
    loaded: Loaded, extraction: Extraction, caplog
) -> None:
    common: dict[str, Any] = {"filter": False, "thresholds": Thresholds(prune_layers=0.9)}
    with caplog.at_level("WARNING"):
        abliterate.select(loaded, extraction, _PROMPTS, ["a new one", "other"], **common)
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("select: ")]
    assert "found on 2 of the 2 harmful validation prompts" in line
