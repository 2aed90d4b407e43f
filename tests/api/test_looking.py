"""evaluate, fragility, inspect, trace and plan as functions: frozen results, tables, records."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

import abliterate as ab
from abliterate import extras
from abliterate.errors import InputError, UsageError

HARMFUL, HARMLESS = ["one thing", "another"], ["third", "a fourth thing"]


@pytest.fixture(scope="module")
def lm(tiny) -> ab.LanguageModel:
    return ab.load(str(tiny("llama")), device="cpu")


@pytest.fixture(scope="module")
def ex(lm: ab.LanguageModel) -> ab.Extraction:
    return ab.extract(lm, HARMFUL, HARMLESS, refusal_tokens=[5], filter=False)


def test_results_are_frozen_and_become_records_and_tables(
    lm: ab.LanguageModel, ex: ab.Extraction
) -> None:
    d = ex[-1, 2]
    short: dict[str, Any] = {"max_new_tokens": 2}
    results: list[tuple[Any, int]] = [
        (ab.evaluate(lm, HARMFUL, HARMLESS, [5], d, **short), 3),
        (ab.fragility(lm, d, HARMFUL, HARMLESS, [5], steps=3, **short), 3),
        (ab.inspect(lm, ex, d, HARMFUL, HARMLESS), 4),
        (ab.trace(lm, d, HARMFUL, HARMLESS, suffix="and so on", n_heads=3), 16),
        (ab.plan(lm.name, memory="8GB", gpu_memory="8GB"), 1),
        (ex, 4),
        (ab.select(lm, ex, HARMFUL, HARMLESS, filter=False), 4),
    ]
    for result, rows in results:
        json.dumps(result.to_dict(), allow_nan=False)
        assert len(result.to_pandas()) >= rows
        assert len(repr(result)) < 250
        page = result._repr_html_()
        assert page.startswith("<table>")
        assert not re.search(r"<(?!/?(table|caption|thead|tbody|tr|th|td|small)[ >])", page)
        with pytest.raises(FrozenInstanceError):
            result.document = {}
    evaluation, curve, seen, followed, *_ = (result for result, _ in results)
    assert list(evaluation) == ["baseline", "ablate", "add"]
    assert [point.fraction for point in curve.points] == [0.0, 0.5, 1.0]
    assert curve.points[-1].bypass_score == pytest.approx(evaluation["ablate"].metrics.harmful)
    assert seen.layers[2]["cosine_with_selected"] == pytest.approx(1.0)
    assert len(followed.heads) == 3
    acts = ab.activations(lm, HARMFUL, layer=3)
    cosines = acts.double() @ d.unit.vector / acts.double().norm(dim=1)
    assert followed.cosines["harmful"]["mean"][3] == pytest.approx(float(cosines.mean()), abs=1e-5)


def test_evaluate_finds_tokens_and_defaults(lm: ab.LanguageModel) -> None:
    found = ab.evaluate(lm, HARMFUL, HARMLESS, [5], max_new_tokens=2)
    assert list(found) == ["baseline"]
    other = ab.evaluate((lm.model, lm.tokenizer), HARMFUL, HARMLESS, [5], max_new_tokens=2)
    assert other["baseline"].metrics == found["baseline"].metrics


def test_what_cannot_be_looked_at(lm: ab.LanguageModel, ex: ab.Extraction) -> None:
    d = ex[-1, 2]
    calls: list[tuple[Any, type[Exception], str]] = [
        (lambda: ab.fragility(lm, d, HARMFUL, HARMLESS, [5], steps=1), UsageError, "^steps must"),
        (lambda: ab.inspect(lm, ex, torch.ones(47)), InputError, "another model"),
        (lambda: ab.inspect(lm, ex, d, position=-90), UsageError, "^position -90"),
        (lambda: ab.inspect(lm, ex, d, HARMFUL), UsageError, "or neither"),
        (lambda: ab.trace(lm, d, HARMFUL, HARMLESS, suffix=" "), UsageError, "^suffix holds"),
        (lambda: ab.trace(lm, d, HARMFUL, HARMLESS, n_heads=0), UsageError, "^n_heads must"),
        (lambda: ab.plan(lm.name, n_train=0), UsageError, "^n_train, n_val"),
        (lambda: ab.plan(lm.name, memory="much"), UsageError, "^memory must"),
    ]
    for call, kind, words in calls:
        with pytest.raises(kind, match=words):
            call()


def test_tables_need_pandas(lm: ab.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    table = ab.writers(lm)
    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(UsageError, match=r"to_pandas\(\) needs pandas: pip install"):
        table.to_pandas()


def test_progress_is_silenced_and_shown_in_notebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    from abliterate.console import bars_hidden, log

    monkeypatch.setattr(log, "level", 0)
    monkeypatch.delenv("RANK", raising=False)
    kernel = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))
    assert not bars_hidden()
    ab.set_progress(False)
    assert bars_hidden()
    ab.set_progress(True)
    assert not bars_hidden()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert bars_hidden()
