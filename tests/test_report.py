"""The report in a real browser: no request, no script out of data, and everything that is in it."""

from __future__ import annotations

import base64
import gzip
import importlib.util
import json
import re
import shlex
import shutil
import sys
from html import unescape
from pathlib import Path

import pytest
from safetensors.torch import load_file

from abliterate.cli import main
from abliterate.prompts import load_prompts
from abliterate.report.collect import read_run
from abliterate.report.geometry_figures import panel_layers
from abliterate.report.page import make_figures
from abliterate.report.reproduce import commands
from abliterate.resources import demo_model_dir

BUILD = Path(__file__).parents[1] / "build" / "report"
EVIL = '<script>window.pwned=1</script><img src="https://example.org/x.png" onerror="pwned=2">'
BREAKOUT = "</script></textarea><svg onload=pwned=3><!-- <script> ${pwned} {{ 7*7 }} %{x} &lt;"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs Chromium and playwright",
)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--no-first-run",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Every stage on a model with markup in its name, on prompts with markup, answers likewise."""
    place = tmp_path_factory.mktemp("report")
    model = place / "<script>window.pwned=1<" / "script>model"
    shutil.copytree(demo_model_dir(), model)
    folder = place / "run"
    sources = []
    for kind in ("harmful", "harmless"):
        texts = [p.text for p in load_prompts(kind, "train", 44, 0)]
        # Every third has markup: whatever is sampled for training, some are left for the test.
        ends = {0: f" {EVIL}", 1: f" {BREAKOUT}"}
        rows = [
            {
                "prompt": text + ends.get(at % 6, ""),
                "category": EVIL if at % 6 == 0 else f"topic {at % 3}",
            }
            for at, text in enumerate(texts)
        ]
        (place / f"{kind}.json").write_text(json.dumps(rows))
        sources += [f"--{kind}", str(place / f"{kind}.json")]
    quiet = ["--quiet", "--json"]
    small = ["--n-train", "16", "--n-val", "8", "--max-new-tokens", "6", "--save-activations"]
    small += ["--search", "exhaustive", "--no-filter"]
    assert main(["run", str(model), "-o", str(folder), *sources, *small, *quiet]) == 0
    assert main(["inspect", str(folder), *quiet]) == 0
    suffix = ["--suffix", f"kindly {BREAKOUT}", "--n-prompts", "4"]
    assert main(["trace", str(folder), *suffix, *quiet]) == 0
    for path in (folder / "completions").glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[0]["response"] = f"{path.stem} says {EVIL}{BREAKOUT}"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def page_file(run: Path) -> Path:
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / "report.html"
    assert main(["report", str(run), "-o", str(path), "--quiet", "--json"]) == 0
    return path


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


class Opened:
    """A page with everything it asked for and said."""

    def __init__(self, browser, file: Path, **options) -> None:
        context = browser.new_context(viewport={"width": 1320, "height": 900}, **options)
        context.set_default_timeout(120_000)
        self.page = context.new_page()
        self.requests: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.file = file.resolve().as_uri()
        self.page.goto(self.file)
        self.page.wait_for_selector("html[data-ready=yes]", state="attached")

    def wait_for_all(self) -> None:
        """The plots out of sight are drawn when the browser has time."""
        self.page.wait_for_selector("html[data-drawn=all]", state="attached")

    def check(self) -> None:
        """Nothing left the page, nothing complained, and no markup of the data ran."""
        assert self.requests == [self.file]
        assert self.said == []
        assert self.page.evaluate("typeof window.pwned") == "undefined"


@pytest.fixture
def opened(browser, page_file: Path):
    made = Opened(browser, page_file)
    yield made
    made.check()
    made.page.context.close()


@needs_browser
def test_every_section_is_there_and_every_plot_is_drawn(opened: Opened) -> None:
    page = opened.page
    names = ("summary", "selection", "subspace", "trace", "completions", "edit", "provenance")
    for name in names:
        assert page.locator(f"section#{name}").is_visible(), name
    assert page.locator("h1").inner_text().endswith("<script>window.pwned=1</script>model")
    opened.wait_for_all()
    plots = page.locator(".canvas")
    assert plots.count() >= 14
    drawn = page.evaluate(
        "[...document.querySelectorAll('.canvas')].map(e => e.querySelectorAll('.main-svg').length)"
    )
    assert all(drawn)
    assert page.locator("#trouble").is_hidden()
    assert page.title().startswith(str(Path("/")))
    # Hovering a heatmap shows the value and the verdict.
    page.evaluate("Plotly.Fx.hover('plot-bypass_heatmap', [{curveNumber: 0, pointNumber: [0, 3]}])")
    hover = page.locator("#plot-bypass_heatmap .hoverlayer").text_content()
    assert "layer 3, position -5" in hover
    assert "Bypass" in hover


@needs_browser
def test_markup_in_names_prompts_and_answers_is_shown_as_text(opened: Opened) -> None:
    page = opened.page
    page.fill("#f-text", "window.pwned")
    row = page.locator("#answers tbody tr").first
    assert EVIL in row.locator("td").first.inner_text()
    assert EVIL in row.locator("td").nth(1).inner_text()
    page.fill("#f-text", "</script></textarea>")
    assert BREAKOUT in page.locator("#answers tbody tr td").first.inner_text()
    page.fill("#f-text", "")
    page.locator("#answers tbody button").first.click()
    page.wait_for_selector(".replies p")
    answer = page.locator(".replies p").first.inner_text()
    assert answer.startswith("baseline-harmful says")
    assert EVIL + BREAKOUT in answer
    assert page.locator("#answers script, #answers img, #answers svg").count() == 0
    assert BREAKOUT in page.locator("section#trace").inner_text()


@needs_browser
def test_answers_to_harmful_prompts_are_hidden_until_asked_for_one_by_one(opened: Opened) -> None:
    page = opened.page
    body = page.locator("#answers tbody")
    assert page.locator(".replies").count() == 0
    assert "says" not in body.inner_text()
    button = page.locator("#answers tbody button").nth(1)
    button.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".replies p")
    assert page.locator(".replies").count() == 1
    assert page.locator(".replies h4").all_inner_texts() == [
        "baseline", "ablate", "add", "orthogonalized",
    ]  # fmt: skip
    assert button.get_attribute("aria-expanded") == "true"
    page.keyboard.press("Enter")
    assert page.locator(".replies").count() == 0


@needs_browser
def test_the_filter_and_the_pages_work(opened: Opened, run: Path) -> None:
    page = opened.page
    folder = run / "completions"
    lines = {
        (kind, name): [
            json.loads(x) for x in (folder / f"{name}-{kind}.jsonl").read_text().splitlines()
        ]
        for kind in ("harmful", "harmless")
        for name in ("baseline", "ablate")
    }
    everything = lines["harmful", "baseline"] + lines["harmless", "baseline"]
    total = len(everything)

    def count() -> int:
        return int(page.locator("#count").inner_text().split()[0])

    assert count() == total
    rows = page.locator("#answers tbody tr")
    assert rows.count() == min(25, total)
    page.click("#next")
    assert rows.count() == total - 25
    assert page.locator("#next").is_disabled()
    page.select_option("#f-category", "topic 1")
    assert count() == sum(line["category"] == "topic 1" for line in everything) > 0
    page.select_option("#f-category", "")
    page.select_option("#f-kind", "harmless")
    assert count() == len(lines["harmless", "baseline"])
    page.select_option("#f-kind", "harmful")
    page.select_option("#f-column", label="ablate")
    page.select_option("#f-outcome", "answered")
    assert count() == sum(not line["refused"] for line in lines["harmful", "ablate"])
    page.select_option("#f-outcome", "changed")
    pairs = zip(lines["harmful", "baseline"], lines["harmful", "ablate"], strict=True)
    assert count() == sum(one["refused"] != other["refused"] for one, other in pairs) > 0


@needs_browser
def test_the_slider_moves_through_the_layers_by_keyboard(opened: Opened, run: Path) -> None:
    page = opened.page
    opened.wait_for_all()
    inspect = json.loads((run / "inspect.json").read_text())
    layers = sorted(map(int, inspect["projections"]))
    slider = page.locator("#layer")
    slider.focus()
    page.keyboard.press("Home")
    for layer in layers:
        assert page.locator("#layer-name").inner_text() == str(layer)
        shown = page.evaluate(
            "document.getElementById('plot-pca_layer').data.map(t => [t.name, t.x])"
        )
        for name, values in shown:
            assert values == [x for x, _ in inspect["projections"][str(layer)][name]]
        row = next(row for row in inspect["layers"] if row["layer"] == layer)
        assert f"silhouette {row['geometry']['silhouette']:.3f}" in (
            page.locator("#layer-numbers").inner_text()
        )
        page.keyboard.press("ArrowRight")
    assert page.locator("#layer-name").inner_text() == str(layers[-1])


@needs_browser
def test_light_dark_toggle_and_print(browser, page_file: Path) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        made = Opened(browser, page_file, color_scheme=scheme)
        made.wait_for_all()
        page = made.page
        ground = "getComputedStyle(document.body).backgroundColor"
        grounds[scheme] = page.evaluate(ground)
        page.screenshot(path=BUILD / f"{scheme}.png", full_page=True)
        ink = page.evaluate("document.getElementById('plot-trace').layout.font.color")
        assert ink == page.evaluate(
            "getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()"
        )
        if scheme == "light":
            page.locator("#theme").focus()
            page.keyboard.press("Enter")
            page.keyboard.press("Enter")
            assert page.locator("#theme").inner_text() == "Theme: dark"
            toggled = page.evaluate(ground)
            assert page.evaluate("document.getElementById('plot-trace').layout.font.color") != ink
            page.emulate_media(media="print")
            assert page.evaluate(ground) == "rgb(255, 255, 255)"
            assert page.locator("nav").is_hidden()
            assert len(page.pdf(format="A4")) > 50_000
        made.check()
        page.context.close()
    assert grounds["light"] != grounds["dark"] == toggled
    assert (BUILD / "dark.png").stat().st_size > 50_000


@needs_browser
def test_every_control_can_be_reached_by_tab(opened: Opened) -> None:
    page = opened.page
    reached = set()
    for _ in range(120):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if "commands" in reached:
            break
    wanted = {"theme", "layer", "f-text", "f-kind", "f-category", "f-outcome", "next", "commands"}
    assert wanted <= reached


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


def test_the_file_holds_no_address_and_plotly_once(page_file: Path) -> None:
    html = unescape(page_file.read_text())
    assert html.count('id="plotly"') == 1
    outside = re.sub(r'<script type="[^"]*" id="\w+">[^<]*</script>', "", html)
    assert not re.search(r'(?:src|href)\s*=\s*["\']?(?:https?:)?//', outside)
    assert "default-src 'none'" in outside
    assert "<script>window" not in page_file.read_text()
    assert len(page_file.read_bytes()) < 4_000_000


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
    assert list(rates[0].values()) == list(rates[1].values())


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
        "18/20  90.0% [45.0%, 90.0%]", "2/20  10.0% [5.0%, 10.0%]  Δ -80.0%", "+7.50",
        "75.0% [37.5%, 75.0%] (1 not judged)", "2.1250 (ppl 7.77)", "0.412 ± 0.014 (acc)",
        "90% → 10%", "95% interval 5% to 10%", "guard &lt;script&gt;",
    ):  # fmt: skip
        assert text in html, text
    assert EVIL not in html
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


@needs_browser
def test_png_writes_the_same_figures(run: Path, cli, tmp_path: Path) -> None:
    result = cli("report", run, "-o", tmp_path / "r.html", "--png", tmp_path / "png", "--json")
    assert result.code == 0, result.err
    names = {Path(path).stem for path in result.json["png"]}
    assert names == set(result.json["figures"])
    for path in result.json["png"]:
        assert Path(path).read_bytes().startswith(b"\x89PNG")
        assert Path(path).stat().st_size > 5_000


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
