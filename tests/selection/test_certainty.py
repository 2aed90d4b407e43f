"""How sure the choice is: resamples of the validation prompts, against plain loops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from abliterate.selection.candidate_filters import Score, Thresholds, apply_filters, best_candidate
from abliterate.selection.certainty import sentences

METRICS = ("bypass_score", "induce_score", "kl_divergence")
POSITIONS = (-3, -2, -1)
SELECT = ("--no-filter", "--n-val", "9", "--seed", "5")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """Extracted, and scored on everything."""
    from abliterate.cli.app import main

    folder = tmp_path_factory.mktemp("certainty") / "run"
    extract = ["extract", tiny("gemma"), "-o", folder, "--no-filter", "--refusal-token", "I",
               "--n-train", "12", "--positions", "-3,-2,-1", "-q", "--seed", "5"]  # fmt: skip
    assert main([*map(str, extract)]) == 0
    select = ["select", folder, *SELECT, "--search", "exhaustive", "-q",
              "--kl-threshold", "1e9", "--induce-threshold=-1e9"]  # fmt: skip
    assert main([*map(str, select)]) == 0
    return folder


@pytest.fixture(scope="module")
def limits(run: Path) -> Thresholds:
    """In the midst of the scores, so that resamples fall on either side."""
    finite = [c for c in json.loads((run / "selection.json").read_text())["candidates"]
              if c["bypass_score"] is not None and c["layer"] < 3]  # fmt: skip
    induce = sorted(c["induce_score"] for c in finite)[len(finite) // 4]
    rest = sorted(c["kl_divergence"] for c in finite if c["induce_score"] >= induce)
    return Thresholds(rest[-2] * 1.02, induce - 0.01)


def _options(limits: Thresholds) -> tuple[str, ...]:
    return "--kl-threshold", repr(limits.kl), f"--induce-threshold={limits.induce!r}"


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_resamples_equal_a_plain_loop_over_the_kept_scores(
    folder: Path, limits: Thresholds, cli
) -> None:
    result = cli("select", folder, *SELECT, *_options(limits), "--search", "exhaustive", "--json")
    assert result.code == 0, result.err
    document = result.json
    found = document["bootstrap"]
    table = load_file(folder / "scores.safetensors")
    keys = [(row, layer) for row in range(3) for layer in range(1, 4)]  # layer 0 has no direction
    numbers = np.random.default_rng(5)
    draws = [numbers.multinomial(9, [1 / 9] * 9, size=1000) for _ in ("harmful", "harmless")]
    wins, passes = dict.fromkeys(keys, 0), dict.fromkeys(keys, 0)
    drawn: dict = {key: ([], [], []) for key in keys}
    for harmful, harmless in zip(*draws, strict=True):
        scores = []
        for row, layer in keys:
            means = []
            for name, counts in (("bypass", harmful), ("induce", harmless), ("kl", harmless)):
                pairs = zip(counts, table[name][row, layer], strict=True)
                means.append(sum(int(times) * float(value) for times, value in pairs) / 9)
            for values, mean in zip(drawn[row, layer], means, strict=True):
                values.append(mean)
            scores.append(Score(POSITIONS[row], layer, *means))
        judged = apply_filters(scores, 4, limits)
        best = best_candidate(judged)
        for key, score in zip(keys, judged, strict=True):
            passes[key] += score.kept
            wins[key] += best == score
    assert found["covered"] == found["scored"] == len(keys)
    assert found["undecided"] == 0
    assert len({count for count in wins.values() if count}) > 1  # the choice is not sure here
    for candidate in found["candidates"]:
        key = POSITIONS.index(candidate["position"]), candidate["layer"]
        # Means that lie at a threshold up to rounding may fall on its other side.
        assert candidate["wins"] == pytest.approx(wins[key] / 1000, abs=0.002)
        assert candidate["passes"] == pytest.approx(passes[key] / 1000, abs=0.002)
        for metric, values in zip(METRICS, drawn[key], strict=True):
            assert candidate[metric] == pytest.approx(np.quantile(values, [0.025, 0.975]))
    winner = document["winner"]
    shares = {(c["position"], c["layer"]): c["wins"] for c in found["candidates"]}
    assert found["chosen"] == shares[winner["position"], winner["layer"]]
    assert found["winners"][0] == winner
    # The cosines among them, from the means.
    means = load_file(folder / "directions.safetensors")
    difference = means["mean_harmful"] - means["mean_harmless"]
    vectors = [difference[POSITIONS.index(c["position"]), c["layer"]] for c in found["winners"]]
    for one, cosines in zip(vectors, found["cosines"], strict=True):
        for other, cosine in zip(vectors, cosines, strict=True):
            expected = torch.nn.functional.cosine_similarity(one, other, dim=0)
            assert cosine == pytest.approx(float(expected), abs=1e-9)


def test_a_staged_search_says_what_its_resamples_do_not_cover(
    folder: Path, limits: Thresholds, cli
) -> None:
    every = cli("select", folder, *SELECT, *_options(limits), "--search", "exhaustive", "--json")
    # With all scores kept, those of the layers that are left out do not count.
    kept = cli("select", folder, *SELECT, *_options(limits), "--json").json
    assert kept["bootstrap"]["covered"] == kept["bootstrap"]["scored"] == 6
    assert kept["bootstrap"]["chosen"] == every.json["bootstrap"]["chosen"]
    (folder / "scores.safetensors").unlink()
    staged = cli("select", folder, *SELECT, *_options(limits), "--json").json
    assert staged["winner"] == every.json["winner"]
    found, whole = staged["bootstrap"], every.json["bootstrap"]
    assert found["covered"] < found["scored"]
    # Where it says that another wins or none, that is so; the rest it leaves open.
    assert whole["chosen"] <= found["chosen"] + found["undecided"] + 0.002
    shown = cli("select", folder, *SELECT, *_options(limits)).out
    told = f"of {found['scored']} candidates {found['covered']} took part"
    assert told in shown
    assert "--search exhaustive lets all take part" in shown
    assert f"chosen in {found['chosen']:.0%} of 1,000 resamples" in shown
    assert ("might win" in shown) == (found["undecided"] > 0)
    shown = cli("select", folder, *SELECT, *_options(limits), "--search", "exhaustive").out
    assert "covers all" not in shown
    assert "bypass, 95%" in shown


def test_inspect_and_report_show_it_and_older_records_still_work(
    folder: Path, limits: Thresholds, cli
) -> None:
    exhaustive = (*SELECT, *_options(limits), "--search", "exhaustive", "--json")
    found = cli("select", folder, *exhaustive).json
    said = sentences(found)
    assert said
    shown = cli("inspect", folder)
    assert said[0] in shown.out
    assert "split-half" in shown.out
    record = json.loads((folder / "inspect.json").read_text())
    extracted = json.loads((folder / "extract.json").read_text())
    for row in record["layers"]:
        at = POSITIONS.index(record["position"]), row["layer"]
        for name in ("split_half_cosine", "norm_standard_error"):
            assert row[name] == extracted["stability"][name][at[0]][at[1]]
    assert "is up to date" in cli("inspect", folder).err
    assert cli("report", folder).code == 0
    page = (folder / "report.html").read_text()
    assert f"{said[0][0].upper()}{said[0][1:]}." in page
    assert f"{extracted['stability']['split_half_cosine'][1][2]:.3f}" in page
    # Another choice on other prompts makes another inspection.
    cli("select", folder, "--no-filter", "--n-val", "8", "--seed", "5", *exhaustive[5:])
    assert "is up to date" not in cli("inspect", folder).err
    # Records of older runs.
    selection = json.loads((folder / "selection.json").read_text())
    documents = {"extract.json": extracted, "selection.json": selection}
    lost = {"stability", "bootstrap", "front"}
    for name, document in documents.items():
        kept = {key: value for key, value in document.items() if key not in lost}
        (folder / name).write_text(json.dumps(kept))
    for command in ("inspect", "report"):
        result = cli(command, folder)
        assert result.code == 0, result.err
    assert "resamples" not in (folder / "report.html").read_text()
    # What a stranger wrote there is named, or not believed.
    (folder / "selection.json").write_text(json.dumps(selection | {"bootstrap": {"chosen": []}}))
    (folder / "extract.json").write_text(json.dumps(extracted | {"stability": {"norm": "x"}}))
    assert cli("report", folder).code == 3
    assert cli("inspect", folder).code == 3


def test_words_tell_alike_runners_up_from_others() -> None:
    base = {"resamples": 1000, "chosen": 0.83, "none": 0.0, "undecided": 0.0, "covered": 9,
            "scored": 9, "winners": [{}, {}], "cosines": [[1.0, 0.97], [0.97, 1.0]]}  # fmt: skip

    def said(**changes) -> list[str]:
        return sentences({"bootstrap": base | changes})

    assert said() == [
        "chosen in 83% of 1,000 resamples of the validation prompts; the runners-up point the same "
        "way, cosine 0.97"
    ]
    other = [[1.0, 0.97, 0.2], [0.97, 1.0, 0.3], [0.2, 0.3, 1.0]]
    assert "not all runners-up point the same way, cosine 0.20 to 0.97" in said(
        winners=[{}] * 3, cosines=other
    )[0]  # fmt: skip
    assert "no other candidate wins" in said(winners=[{}], cosines=[[1.0]])[0]
    # One that runs alone wins always, which says little; how many took part is said.
    alone = said(winners=[{}], cosines=[[1.0]], chosen=1.0, covered=1, scored=25)
    assert alone[0].endswith("in which no other candidate took part")
    assert alone[1].startswith("of 25 candidates 1 took part")
    assert "in 4.0% of them none passes" in said(none=0.04)
    assert "no candidate passes on all prompts" in said(chosen=None)[0]
    assert sentences({}) == []
