"""``report`` of several runs: their numbers in one page, and what cannot be compared."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from abliterate.report.comparison import compare, read_runs
from abliterate.report.comparison_page import build_comparison


def _cosine(*folders: Path) -> float:
    one, other = (load_file(f / "direction.safetensors")["direction"] for f in folders)
    one, other = one.astype("float64"), other.astype("float64")
    return float(one @ other / ((one @ one) * (other @ other)) ** 0.5)


def test_comparison_holds_what_each_run_chose_and_measured(
    run: Path, small_runs: list[Path], cli, tmp_path: Path
) -> None:
    path = tmp_path / "compared.html"
    result = cli("report", *small_runs, run, "-o", path, "--json")
    assert result.code == 0, result.err
    found = result.json
    assert [each["name"] for each in found["runs"]] == ["seed0/small", "seed1/small", "run"]
    for folder, each in zip([*small_runs, run], found["runs"], strict=True):
        selection = json.loads((folder / "selection.json").read_text())
        won = selection["winner"]
        assert {key: each["direction"][key] for key in won} == won
        chosen = next(c for c in selection["candidates"] if all(c[k] == won[k] for k in won))
        assert each["select"]["bypass"] == {
            "before": selection["baselines"]["harmful_refusal_score"],
            "after": chosen["bypass_score"],
        }
        assert each["select"]["induce"]["after"] == chosen["induce_score"]
        assert each["select"]["kl"] == chosen["kl_divergence"]
    for folder, each in ((small_runs[0], found["runs"][0]), (run, found["runs"][2])):
        evaluation = json.loads((folder / "evaluation.json").read_text())
        for kind, name in (("harmful", "ablate"), ("harmless", "add")):
            for when, row in (("before", "baseline"), ("after", name)):
                measured = evaluation["interventions"][row][kind]
                told = each["evaluate"][kind][when]
                assert (told["refused"], told["n"]) == (measured["refused"], measured["n"])
                assert told["ci"] == measured["refusal_score_ci"]
            span = evaluation["deltas"][name][kind]["refusal_score_ci"]
            assert each["evaluate"][kind]["change_ci_pp"] == [100 * end for end in span]
        kl = evaluation["interventions"]["ablate"]["kl_divergence"]
        assert each["evaluate"]["kl"]["mean"] == kl
    assert found["runs"][1]["evaluate"] is None
    # Directions of 48 and of 128 numbers have no cosine.
    cosine = _cosine(*small_runs)
    assert 0.0 < abs(cosine) < 0.9999
    expected = [[1.0, cosine, None], [cosine, 1.0, None], [None, None, 1.0]]
    for row, wanted in zip(found["cosines"], expected, strict=True):
        assert row == [w if w is None else pytest.approx(w, abs=1e-9) for w in wanted]
    html = unescape(path.read_text())
    assert "No cosine where d_model differs: run 1 and run 3; run 2 and run 3." in html
    held = found["runs"][2]["evaluate"]["harmful"]["before"]
    assert f"{held['refused']} of {held['n']}: {held['rate']:.1%} [{held['ci'][0]:.1%}" in html


def test_comparison_names_the_settings_that_differ_and_no_others(
    small_runs: list[Path], cli, tmp_path: Path
) -> None:
    path = tmp_path / "compared.html"
    found = cli("report", *small_runs, "-o", path, "--json").json["differences"]
    values = {row["setting"]: row["values"] for row in found}
    assert values["extract: --seed"] == ["0", "1"]
    # A stage that one run alone has is one difference.
    assert values["evaluate"] == ["has run", None]
    assert not any(name.startswith("evaluate: ") for name in values)
    assert not {"model", "model files, hash", "extract: --n-train", "select: --n-val"} & set(values)
    assert values["extract: harmful prompts used"][0] != values["extract: harmful prompts used"][1]
    assert re.search(r"<td>extract: --seed</td><td>0</td><td>1</td>", path.read_text())


def test_comparison_gives_the_maps_of_a_metric_one_scale(run: Path, small_runs: list[Path]) -> None:
    runs = read_runs([small_runs[0], run])
    page = build_comparison(runs, compare(runs))
    known = [
        abs(c["bypass_score"])
        for each in runs
        for c in each.selection["candidates"]
        if c["bypass_score"] is not None
    ]
    for at in (1, 2):
        drawn = page.figures[f"bypass_heatmap_{at}"].data[0]
        assert (drawn.zmin, drawn.zmax) == (-max(known), max(known))
        assert sum(v is not None for row in drawn.z for v in row) >= 2
    ends = {page.figures[f"kl_heatmap_{at}"].data[0].zmax for at in (1, 2)}
    assert len(ends) == 1
    assert page.figures["refusals"].data[0].x == ("run 1", "run 2")


def test_comparison_leaves_stale_numbers_out_and_says_so(
    small_runs: list[Path], cli, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(small_runs[0], changed)
    # Another direction than select chose.
    shutil.copy(small_runs[1] / "direction.safetensors", changed)
    path = tmp_path / "compared.html"
    result = cli("report", small_runs[1], changed, "-o", path, "--json")
    assert result.code == 0, result.err
    assert "selection.json is stale" in result.err
    now = result.json["runs"][1]
    assert (now["direction"], now["select"]) == (None, None)
    assert {found["part"] for found in now["stale"]} == {"selection", "evaluation"}
    assert now["evaluate"] is None
    assert result.json["cosines"][0][1] is None
    html = path.read_text()
    assert re.search(r"<td>direction</td><td[^>]*>layer \d of 4</td><td[^>]*>stale</td>", html)
    assert "Fewer than two of the runs have selected a direction." in html
    assert "STALE: run 2, changed: Bypass" in html


def test_comparison_refuses_what_cannot_be_compared(
    small_runs: list[Path], fails, tmp_path: Path
) -> None:
    first, second = small_runs
    out = tmp_path / "compared.html"
    said = fails("report", first, tmp_path / "absent", "-o", out, code=3)
    assert f"{tmp_path / 'absent'} is no run folder" in said
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(first / "extract.json", half)
    said = fails("report", first, half, "-o", out, code=3)
    assert f"{half} has no selection.json" in said
    assert "abliterate select" in said
    said = fails("report", first, second, f"{first}/../small", "-o", out, code=2)
    assert "named twice" in said
    assert "-o is missing" in fails("report", first, second, code=2)
    assert "--edited" in fails("report", first, second, "-o", out, "--edited", half, code=2)
    outside = tmp_path / "outside"
    shutil.copytree(second, outside, ignore=lambda *_: {"direction.safetensors"})
    (outside / "direction.safetensors").symlink_to(second / "direction.safetensors")
    assert "link" in fails("report", first, outside, "-o", out, code=3)
    assert not out.exists()
    out.write_text("mine")
    assert "no earlier output" in fails("report", first, second, "-o", out, code=2)
    assert out.read_text() == "mine"


def test_a_map_says_which_cells_were_not_computed_and_which_are_left_out(
    small_runs: list[Path],
) -> None:
    """Its legend names a cell's look, and the cells that look so are those that the record has."""
    (first, _) = runs = read_runs(small_runs)
    made = build_comparison(runs, compare(runs)).figures["kl_heatmap_1"]
    absent = next(trace for trace in made.data if trace.name == "not computed")
    assert absent.showlegend
    missing = {
        c["layer"]
        for c in first.selection["candidates"]
        if c["kl_divergence"] is None and "kl_divergence" not in c["computed"]
    }
    assert missing > {3}
    drawn = {layer for layer, cell in enumerate(absent.z[0]) if cell is not None}
    assert drawn == missing - {3}  # the last of four layers is left out
    (left,) = [shape for shape in made.layout.shapes if shape.showlegend]
    assert left.name == "left out: the last 20% of layers"
    assert (left.x0, left.x1) == (2.5, 3.5)
