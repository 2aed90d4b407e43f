"""The report without a browser: what is in the file, and that its commands reproduce the run."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from reporting import EVIL
from safetensors.torch import load_file

from abliterate.prompts.sampling import load_prompts
from abliterate.report.collect import read_run
from abliterate.report.geometry_figures import panel_layers
from abliterate.report.page import make_figures
from abliterate.report.reproduce import commands
from abliterate.report.verdict import verdict_sentences
from abliterate.run_staleness import Stale


def test_no_completions_leaves_no_prompt_and_no_answer_in_the_file(
    run: Path, cli, tmp_path
) -> None:
    path = tmp_path / "bare.html"
    assert cli("report", run, "-o", path, "--no-completions").code == 0
    html = path.read_text()
    packed = re.findall(r'<script type="text/plain" id="(\w+)">([^<]*)', html)
    assert [name for name, _ in packed] == ["plotly"]
    for file in (run / "completions").glob("*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            for text in (line["prompt"], line["response"]):
                assert text not in html
                assert json.dumps(text)[1:-1].replace("<", "\\u003c") not in html
    assert 'id="completions"' not in html
    full = tmp_path / "full.html"
    assert cli("report", run, "-o", full).code == 0
    (texts,) = re.findall(r'id="texts">([^<]*)', full.read_text())
    answers = json.loads(gzip.decompress(base64.b64decode(texts)))
    expected = [
        json.loads(line)["response"]
        for kind in ("harmful", "harmless")
        for line in (run / "completions" / f"ablate-{kind}.jsonl").read_text().splitlines()
    ]
    assert [row[1] for row in answers] == expected


def test_the_report_is_the_same_bytes_again(run: Path, cli, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert cli("report", run, "-o", tmp_path / f"{name}.html").code == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_commands_reproduce_the_run(run: Path, cli, tmp_path: Path) -> None:
    """They are typed as the report prints them, with another folder for the run."""
    again = tmp_path / "again"
    typed = [shlex.split(line) for line in commands(read_run(run))]
    assert [line[1] for line in typed] == [
        "extract", "select", "orthogonalize", "evaluate", "inspect", "trace", "report",
    ]  # fmt: skip
    for line in typed:
        moved = [part.replace(str(run), str(again)) for part in line[1:]]
        result = cli(*moved, "--quiet")
        assert result.code == 0, (line, result.err)
    for name in ("directions", "direction", "activations"):
        file = f"{name}.safetensors"
        one, other = load_file(run / file), load_file(again / file)
        assert all((one[key] == other[key]).all() for key in one)
    drop = ("seconds", "inputs", "outputs", "request", "settings", "checkpoints")
    for name in ("selection", "inspect", "trace"):
        one, other = (
            {
                k: v
                for k, v in json.loads((folder / f"{name}.json").read_text()).items()
                if k not in drop
            }
            for folder in (run, again)
        )
        assert one == other, name
    rates = [
        {
            name: [result[kind]["refused"] for kind in ("harmful", "harmless")]
            for name, result in json.loads((folder / "evaluation.json").read_text())[
                "interventions"
            ].items()
        }
        for folder in (run, again)
    ]
    assert rates[0] == rates[1]


def test_a_report_is_made_of_whatever_is_there(run: Path, cli, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.mkdir()
    expected = []
    for names, stages in (
        (["extract.json"], []),
        (["selection.json", "trace.json"], ["selection", "trace"]),
        (["evaluation.json"], ["evaluation"]),
    ):
        for name in names:
            shutil.copy(run / name, part / name)
        expected += stages
        result = cli("report", part, "--json")
        assert result.code == 0, result.err
        assert result.json["sections"] == expected
        html = (part / "report.html").read_text()
        assert len(html.encode()) == result.json["bytes"]
        assert ('id="selection"' in html) == ("selection" in expected)
    only = tmp_path / "only"
    (only / "model").mkdir(parents=True)
    shutil.copy(run / "model" / "abliterate.json", only / "model")
    assert cli("report", only, "--json").json["sections"] == ["edit"]
    shutil.copy(run / "inspect.json", part)
    elsewhere = cli("report", part, "--edited", run / "model", "--json")
    assert elsewhere.json["sections"] == ["selection", "inspect", "trace", "evaluation", "edit"]


def test_intervals_judgements_losses_and_tasks_are_shown(run: Path, cli, tmp_path: Path) -> None:
    """The layout that evaluate documents, with everything that it may hold."""

    def part(refused: int, safe: float) -> dict:
        held = {
            "n": 20, "refused": refused, "refusal_rate": refused / 20,
            "refusal_score": refused / 20, "refusal_score_ci": [refused / 40, refused / 20],
            "refusal_metric": refused - 10.5, "safety_score": safe,
            "safety_score_ci": [safe / 2, safe], "judged": 19, "judge_failed": 1,
        }  # fmt: skip
        return held | {"categories": {f"fraud {EVIL}": held}}

    def result(harmful: int, harmless: int, loss: float) -> dict:
        return {
            "harmful": part(harmful, 0.75), "harmless": part(harmless, 1.0), "kl_divergence": 0.5,
            "losses": {"pile": {"loss": loss, "perplexity": 7.77, "n_tokens": 9, "n_texts": 2}},
            "tasks": {"arc_easy": {"alias": "x", "acc,none": 0.412, "acc_stderr,none": 0.014}},
        }  # fmt: skip

    record = json.loads((run / "evaluation.json").read_text())
    record["interventions"] = {"baseline": result(18, 1, 2.125), "ablate": result(2, 0, 2.25)}
    record |= {"outputs": {}, "judge": {"kind": "endpoint", "model": f"guard {EVIL}"}}
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    assert cli("report", tmp_path, "--json").code == 0
    html = (tmp_path / "report.html").read_text()
    for text in (
        "18/20  90.0% [45.0%, 90.0%]", "2/20  10.0% [5.0%, 10.0%]  Δ -80.0", "+7.50",
        "75.0% [37.5%, 75.0%] n = 19 (1 not judged)", "2.1250 (ppl 7.77, 9 tokens)",
        "0.412 ± 0.014 (acc)",
        "90% → 10%", "95% interval 5% to 10%", "guard &lt;script&gt;",
    ):  # fmt: skip
        assert text in html, text
    assert EVIL not in html
    held = replace(read_run(tmp_path), stale={})
    (said,) = verdict_sentences(held)
    assert said.startswith("With its refusal direction ablated, ")
    assert " refused 2 of 20 harmful test prompts (10.0%, 95% interval 5.0% to 10.0%); " in said
    assert "unmodified it refused 18 of 20 (90.0%, 95% interval 45.0% to 90.0%): -80.0" in said
    assert said.endswith(" percentage points.")
    # What is stale, as a whole or a row of it, is in no sentence.
    file = tmp_path / "evaluation.json"
    for rows, left in (((), 0), (("ablate",), 0), (("baseline",), 1)):
        marked = {"evaluation": Stale("evaluation", file, ("another direction",), rows)}
        found = verdict_sentences(replace(held, stale=marked))
        assert len(found) == left
        assert all("unmodified" not in one for one in found)
    figures = make_figures(read_run(tmp_path))
    bars = figures["refusals"].to_dict()["data"][0]
    assert list(bars["y"]) == [0.9, 0.1]
    assert list(bars["error_y"]["arrayminus"]) == pytest.approx([0.45, 0.05])
    assert figures["categories"].to_dict()["data"][0]["z"][0] == pytest.approx([0.9, 0.1])
    assert "<" not in figures["categories"].to_dict()["data"][0]["y"][0]


def test_figures_show_what_the_records_say(run: Path) -> None:
    figures = make_figures(read_run(run))
    selection = json.loads((run / "selection.json").read_text())
    heatmap = figures["kl_heatmap"].to_dict()
    positions = sorted({c["position"] for c in selection["candidates"]})
    for candidate in selection["candidates"]:
        row = positions.index(candidate["position"])
        assert heatmap["data"][0]["z"][row][candidate["layer"]] == candidate["kl_divergence"]
    traces = {trace.get("name"): trace for trace in heatmap["data"]}
    winner = selection["winner"]
    assert list(traces["selected"]["x"]) == [winner["layer"]]
    assert list(traces["selected"]["y"]) == [positions.index(winner["position"])]
    pruned = [shape for shape in heatmap["layout"]["shapes"] if shape["type"] == "rect"]
    assert [(shape["x0"], shape["x1"]) for shape in pruned] == [(5.5, 7.5)]  # 6 and 7 of 8
    dropped = [c for c in selection["candidates"] if c["reason"] == "induce"]
    if dropped:
        assert len(traces["dropped: induce below 0"]["x"]) == len(dropped)
    assert panel_layers(range(80), 33)[0] == 0
    assert panel_layers(range(80), 33)[-1] == 79
    assert 33 in panel_layers(range(80), 33)
    assert len(panel_layers(range(80), 33)) == 12


def test_a_thousand_prompts_by_five_interventions_stay_under_ten_megabytes(
    run: Path, cli, tmp_path: Path
) -> None:
    from random import Random

    part = tmp_path / "large"
    (part / "completions").mkdir(parents=True)
    words = sorted(
        {w for k in ("harmful", "harmless") for p in load_prompts(k) for w in p.text.split()}
    )
    random = Random(0)
    evaluation = json.loads((run / "evaluation.json").read_text())
    result = evaluation["interventions"]["baseline"]
    names = ["baseline", "ablate", "add", "subtract", "edited"]
    evaluation["interventions"] = dict.fromkeys(names, result)
    evaluation["outputs"] = {f"{name}-harmful.jsonl": "" for name in names}
    (part / "evaluation.json").write_text(json.dumps(evaluation))
    for name in names:
        lines = [
            {
                "prompt": f"prompt {at}",
                "category": f"c{at % 10}",
                "response": " ".join(random.choices(words, k=380)),  # some 512 tokens
                "refused": at % 2 == 0,
            }
            for at in range(1000)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (part / "completions" / f"{name}-harmful.jsonl").write_text(text)
    made = cli("report", part, "--json")
    assert made.code == 0, made.err
    assert made.json["bytes"] < 10_000_000


def test_png_without_a_browser_is_one_line_and_writes_no_page(
    run: Path, fails, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no-such-browser"))
    out = ("report", run, "-o", tmp_path / "r.html", "--png", tmp_path / "png")
    assert "Chromium" in fails(*out, code=2)
    assert not (tmp_path / "r.html").exists()
    assert not (tmp_path / "png").exists()


def test_errors_are_one_line(run: Path, fails, tmp_path: Path, monkeypatch) -> None:
    assert "abliterate extract" in fails("report", tmp_path, code=3)
    assert "no run folder" in fails("report", tmp_path / "none", code=3)
    assert "--edited" in fails("report", run, "--edited", tmp_path, code=3)
    assert "is a folder" in fails("report", run, "-o", tmp_path, code=2)
    part = tmp_path / "part"
    part.mkdir()
    shutil.copy(run / "extract.json", part)
    (part / "selection.json").write_text('{"candidates": [{}]}')
    assert "selection.json" in fails("report", part, code=3)
    (part / "selection.json").write_text("{")
    assert "cannot be read as JSON" in fails("report", part, code=3)
    assert not (part / "report.html").exists()
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert "pip install 'abliterate[report]'" in fails("report", run, code=2)


def test_records_bring_no_file_from_outside_into_the_page(run: Path, fails, tmp_path: Path) -> None:
    secret = {"prompt": "SECRETDIARY", "response": "x", "refused": False}
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "x-harmful.jsonl").write_text(json.dumps(secret) + "\n")
    copy, page = tmp_path / "copy", tmp_path / "page.html"
    shutil.copytree(run, copy)
    for name in (
        "../../private/x",
        str(tmp_path / "private" / "x"),
        "..",
        "a\\b",
        "a\nb",
        "",
        "\x1b",
    ):
        record = json.loads((run / "evaluation.json").read_text())
        record["interventions"][name] = record["interventions"]["ablate"]
        record["outputs"] |= {"x-harmful.jsonl": "sha256:0"}
        (copy / "evaluation.json").write_text(json.dumps(record))
        line = fails("report", copy, "-o", page, code=3)
        assert "evaluation.json names an intervention" in line
        assert not page.exists()


@pytest.mark.parametrize("where", ["completions/ablate-harmful.jsonl", "completions", "trace.json"])
def test_links_bring_no_file_from_outside_into_the_page(
    run: Path, fails, tmp_path: Path, where: str
) -> None:
    copy, page = tmp_path / "copy", tmp_path / "page.html"
    shutil.copytree(run, copy)
    shutil.move(copy / where, tmp_path / "outside")
    (copy / where).symlink_to(tmp_path / "outside")
    assert "is a link out of the run folder" in fails("report", copy, "-o", page, code=3)
    assert not page.exists()


def test_report_of_a_run_folder_that_is_a_link(run: Path, cli, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    assert cli("report", tmp_path / "link", "-o", tmp_path / "page.html").code == 0
