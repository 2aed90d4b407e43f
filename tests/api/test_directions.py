"""activations, extract and select as a notebook calls them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import abliterate as ab
from abliterate.errors import InputError, SelectionError, UsageError
from abliterate.prompts.sources import read_source

OPTIONS: dict[str, Any] = {"refusal_tokens": ["I"], "filter": False}
LOOSE = ab.Thresholds(kl=1e9, induce=-1e9)


@pytest.fixture(scope="module")
def lm(tiny) -> ab.LanguageModel:
    return ab.load(str(tiny("llama")), device="cpu")


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    return {
        kind: [prompt.text for prompt in ab.load_prompts(kind, "train", 8)]
        for kind in ("harmful", "harmless")
    }


@pytest.fixture(scope="module")
def extraction(lm: ab.LanguageModel, texts) -> ab.Extraction:
    return ab.extract(lm, texts["harmful"], texts["harmless"], **OPTIONS)


def test_activations_are_what_enters_the_block(lm: ab.LanguageModel, texts) -> None:
    given = texts["harmful"]
    for layer, position in ((0, -1), (2, -3)):
        found = ab.activations(lm, given, layer=layer, position=position)
        for row, text in enumerate(given):
            ids = lm.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )["input_ids"]
            with torch.no_grad():
                states = lm.model(ids, output_hidden_states=True).hidden_states
            assert torch.allclose(found[row], states[layer][0, position], atol=1e-4)
    every = ab.activations(lm, given)
    assert every.shape == (8, 4, 48)
    assert torch.equal(every[:, 2], ab.activations(lm, given, layer=2))


@pytest.mark.parametrize(
    ("options", "kind"),
    [({"layer": 4}, InputError), ({"layer": True}, InputError), ({"position": 0}, UsageError),
     ({"position": "last"}, UsageError), ({"position": -900}, InputError)],
)  # fmt: skip
def test_activations_of_no_place(lm: ab.LanguageModel, options: Any, kind) -> None:
    with pytest.raises(kind, match=r"layer|position"):
        ab.activations(lm, ["a text"], **options)


def test_texts_prompts_and_sources_are_alike(lm: ab.LanguageModel, tmp_path) -> None:
    texts = ["one", "two things", "three"]
    file = tmp_path / "mine.txt"
    file.write_text("\n".join(texts) + "\n")
    given: list[Any] = [
        texts, tuple(texts), (text for text in texts), [ab.Prompt(text) for text in texts],
        [texts[0], ab.Prompt(texts[1], "kind"), texts[2]], str(file), file, read_source(str(file)),
    ]  # fmt: skip
    first, *others = (ab.activations(lm, one, layer=1) for one in given)
    assert len(first) == 3
    assert all(torch.equal(first, other) for other in others)


def test_extraction_is_indexed_by_position_and_layer(
    lm: ab.LanguageModel, texts, extraction: ab.Extraction
) -> None:
    direction = extraction[-2, 3]
    means = [ab.activations(lm, texts[k], layer=3, position=-2) for k in ("harmful", "harmless")]
    assert torch.allclose(direction.vector.float(), means[0].mean(0) - means[1].mean(0), atol=1e-4)
    assert (direction.position, direction.layer, direction.model) == (-2, 3, lm.name)
    chosen = ab.extract(lm, *texts.values(), positions=[-1, -2], **OPTIONS)
    assert chosen.positions == (-2, -1)
    for key in ((0, 1), (-1, 4), (-1, -1), (-99, 1), 5, "x", (1, 2, 3)):
        with pytest.raises(KeyError, match="layers 0 to 3"):
            extraction[key]  # type: ignore[index]
    assert len(repr(extraction)) < 200


def test_extraction_has_a_table_and_a_record(
    lm: ab.LanguageModel, extraction: ab.Extraction
) -> None:
    table = extraction.to_pandas()
    assert len(table) == len(extraction.positions) * 4
    row = table[(table["position"] == -2) & (table["layer"] == 3)].iloc[0]
    assert row["norm"] == pytest.approx(extraction[-2, 3].norm)
    assert row["split_half_cosine"] <= 1.0
    document = json.loads(json.dumps(extraction.to_dict(), allow_nan=False))
    assert (document["model"], document["d_model"]) == (lm.name, lm.d_model)
    assert len(document["candidates"]) == len(table)
    # Tokens of a template look like tags, and are shown as they are.
    assert "<|" in "".join(extraction.tokens)
    assert "<|" not in extraction._repr_html_()
    assert "&lt;|" in extraction._repr_html_()
    stored = replace(extraction, stability=None)  # as read from a run folder
    assert list(stored.to_pandas()) == ["position", "token", "layer", "norm"]


def test_selection_has_its_direction_and_a_table(
    lm: ab.LanguageModel, texts, extraction: ab.Extraction
) -> None:
    selection = ab.select(lm, extraction, texts["harmful"], texts["harmless"], LOOSE, filter=False)
    won = selection.require_winner()
    assert torch.equal(selection.direction.vector, extraction[won.position, won.layer].vector)
    with pytest.warns(DeprecationWarning, match="leave out"):
        assert selection.direction(extraction).layer == won.layer  # as 0.1 had it
    table = selection.to_pandas()
    assert len(table) == len(selection.scores)
    assert table["kept"].sum() == sum(score.kept for score in selection.scores)
    document = json.loads(json.dumps(selection.to_dict()))
    assert document["winner"] == {"position": won.position, "layer": won.layer}
    assert "<b" not in selection._repr_html_()
    assert f"layer {won.layer}" in selection._repr_html_()
    assert len(repr(selection)) < 200
    assert repr(selection.direction).startswith("Direction(position ")
    nothing = ab.select(
        lm, extraction, *texts.values(), ab.Thresholds(kl=1e-12), filter=False
    )  # fmt: skip
    with pytest.raises(SelectionError, match=r"Thresholds\(kl=\.\.\.\)"):
        _ = nothing.direction
    assert "no candidate passes" in repr(nothing)
    with pytest.raises(UsageError, match=r"ab\.extract returns"):
        ab.select(lm, extraction.directions, *texts.values())  # type: ignore[arg-type]


def test_selection_without_the_first_tokens_stream(
    lm: ab.LanguageModel, texts, extraction: ab.Extraction
) -> None:
    asked = {"filter": False, "project_first_token": True}
    found = ab.select(lm, extraction, *texts.values(), LOOSE, **asked).direction
    assert (found.project_first_token, found.project_harmless) == (True, False)
    ids = lm.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_dict=False)
    with torch.no_grad():
        states = lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    sink = states[found.layer][0, 0].double()
    plain = extraction[found.position, found.layer].vector
    cosines = [abs(float(torch.cosine_similarity(v, sink, dim=0))) for v in (found.vector, plain)]
    assert cosines[0] < 1e-6 < 1e-3 < cosines[1]
