"""fragility: refusal against the share of the direction that is removed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import CAN_BROWSE, check_small_page

from abliterate import ablate, load_model
from abliterate.analysis.fragility_curve import Point, summarise
from abliterate.errors import UsageError
from abliterate.metrics.intervals import bootstrap

Cli = Callable[..., Any]


def _curve(*rates: float) -> list[Point]:
    last = len(rates) - 1
    return [Point(i / last, 0.0, rate, 0.0, float(i)) for i, rate in enumerate(rates)]


def test_the_number_is_the_mean_share_of_refusals_lost() -> None:
    assert summarise(_curve(1.0, 1.0, 1.0))["fragility"] == pytest.approx(0.0)
    assert summarise(_curve(0.8, 0.4, 0.0))["fragility"] == pytest.approx(0.5)
    sudden = summarise(_curve(1.0, 0.0, 0.0, 0.0, 0.0))
    assert sudden["fragility"] == pytest.approx(0.875)
    # Only what was measured: it falls somewhere between none and a quarter.
    assert (sudden["half_after"], sudden["half_fraction"], sudden["kl_at_half"]) == (0.0, 0.25, 1.0)
    assert sudden["fragility_bounds"] == pytest.approx((0.75, 1.0))
    # A rate that rises again in between lies between its neighbours all the same.
    assert summarise(_curve(1.0, 0.5, 1.0))["fragility_bounds"] == pytest.approx((0.0, 0.5))
    assert summarise(_curve(1.0, 0.9, 0.8))["half_fraction"] is None
    assert summarise(_curve(0.0, 0.0))["fragility"] is None


def test_the_intervals_of_a_curve_draw_prompts_with_their_whole_curve() -> None:
    """Every prompt falls at the same step or another, so F of a resample is a mean of theirs."""
    falls = [1, 1, 2, 2, 2, 3, 4, 4]  # the step of five at which each prompt is refused no more
    points = [
        Point(
            step / 4, 0.0, sum(at > step for at in falls) / 8, 0.0, 0.0,
            verdicts=tuple(at > step for at in falls),
        )
        for step in range(5)
    ]  # fmt: skip
    found = summarise(points, seed=3)
    own = [1 - (at - 0.5) / 4 for at in falls]
    assert found["fragility"] == pytest.approx(sum(own) / 8)
    assert found["fragility_ci"] == pytest.approx(bootstrap(own, 3))
    assert found["half_fraction"] == 0.5
    assert found["half_fraction_ci"] == [0.25, 0.75]
    assert found["bootstrap_undefined"] == 0
    # One of three is refused to begin with, and stays: some resamples hold none, none gets rid.
    kept = [Point(s, 0.0, 1 / 3, 0.0, 0.0, verdicts=(True, False, False)) for s in (0.0, 1.0)]
    found = summarise(kept)
    assert found["bootstrap_undefined"] == pytest.approx(2000 * (2 / 3) ** 3, rel=0.15)
    assert found["fragility_ci"] == [0.0, 0.0]
    assert found["half_fraction_ci"] == [None, None]


def test_partial_ablation_leaves_the_rest_of_the_embedding(tiny: Callable[..., Path]) -> None:
    loaded = load_model(str(tiny("llama")), device="cpu", dtype="float32")
    model = loaded.model
    r = torch.randn(48, generator=torch.Generator().manual_seed(0))
    unit = r / r.norm()
    ids = torch.tensor([[5, 9, 11]])
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        before = embedding(ids) @ unit
        for scale, left in ((0.0, 1.0), (0.3, 0.7), (1.0, 0.0)):
            with ablate(model, r, scale):
                after = embedding(ids) @ unit
            torch.testing.assert_close(after, left * before, atol=1e-5, rtol=1e-4)
    with pytest.raises(UsageError, match="between 0 and 1"), ablate(model, r, 1.5):
        pass


def test_the_command_writes_numbers_and_a_picture(
    cli: Cli, fails: Callable[..., str], tmp_path: Path
) -> None:
    pytest.importorskip("plotly")
    from abliterate.resources import demo_model_dir

    run = tmp_path / "run"
    few = ("--n-train", "16", "--device", "cpu", "-q")
    assert cli("extract", demo_model_dir(), "-o", run, *few).code == 0
    assert cli("select", run, "--n-val", "8", "-q").code == 0
    result = cli(
        "fragility", run, "--steps", "3", "--n-test", "4", "--max-new-tokens", "8", "--json", "-q"
    )
    assert result.code == 0, result.err
    record = result.json
    assert record == json.loads((run / "fragility.json").read_text())
    points = record["points"]
    assert [p["fraction"] for p in points] == [0.0, 0.5, 1.0]
    assert points[0]["refusal_rate"] == 1.0
    assert points[0]["kl_divergence"] == pytest.approx(0.0, abs=1e-3)
    assert points[2]["refusal_rate"] == 0.0
    assert points[2]["bypass_score"] < 0 < points[0]["bypass_score"]
    assert 0.25 <= record["fragility"] <= 0.75
    # Each prompt's figures, and that the means and their intervals are made of them.
    for point, held in zip(points, record["by_prompt"], strict=True):
        assert held["fraction"] == point["fraction"]
        assert sum(held["refused"]) / 4 == point["refusal_rate"]
        for key in ("bypass_score", "kl_divergence"):
            assert point[key] == pytest.approx(sum(held[key]) / 4)
            assert point[f"{key}_ci"] == list(bootstrap(held[key]))
            assert point[f"{key}_spread"]["max"] == max(held[key])
    assert (record["half_after"], record["half_fraction"]) in ((0.0, 0.5), (0.5, 1.0))
    assert record["kl_at_half"] in [point["kl_divergence"] for point in points]
    low, high = record["fragility_ci"]
    assert low <= record["fragility"] <= high
    held = record["controls"]["rows"]["ablate"]
    assert held["selected"]["harmful_score"] == pytest.approx(points[2]["bypass_score"])
    assert held["selected"]["kl_divergence"] == pytest.approx(points[2]["kl_divergence"])
    for family in ("covariance", "isotropic"):
        part = held["families"][family]
        others = [member["harmful_score"] for member in part["members"]]
        below = sum(other < held["selected"]["harmful_score"] for other in others)
        place = part["place"]["harmful_score"]
        assert (place["below"], place["of"]) == (below, 4)
    page = (run / "fragility.html").read_text()
    drawn = json.loads(re.findall('id="data">(.*?)</script>', page)[0])["figures"]["fragility"]
    rates = [point["refusal_rate"] for point in points]
    assert drawn["data"][0]["y"] == rates
    assert drawn["data"][3]["y"] == [point["kl_divergence"] for point in points]
    assert f"Fragility {record['fragility']:.2f}" in page
    assert not re.search("(?:src|href)=.?https?://", page)
    if CAN_BROWSE:
        check_small_page(run / "fragility.html")
    config = tmp_path / "few.toml"
    config.write_text("[evaluate]\nn_test = 2\nmax_new_tokens = 3\n")
    few = ("--config", config, "--steps", "2", "--no-picture", "--json", "-q", "--controls", "0")
    record = cli("fragility", run, *few).json
    assert (len(record["prompts"]["harmful"]), record["max_new_tokens"]) == (2, 3)
    record = cli("fragility", run, *few, "--n-test", "3").json
    assert (len(record["prompts"]["harmful"]), record["max_new_tokens"]) == (3, 3)
    assert "steps" in fails("fragility", run, "--steps", "1", code=2)
    assert "png or svg" in fails("fragility", run, "--image", "gif", code=2)
    fails("fragility", tmp_path / "none", code=3)
