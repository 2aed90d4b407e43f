"""The report in a real browser: no request, no script out of data, and everything that is in it."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
from browser import (
    BUILD,
    OVERFLOW,
    Opened,
    check_axe,
    check_contrast,
    check_figures,
    needs_browser,
    started_browser,
)
from reporting import BREAKOUT, EVIL

from abliterate.cli.app import main


@pytest.fixture(scope="module")
def page_file(run: Path) -> Path:
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / "report.html"
    assert main(["report", str(run), "-o", str(path), "--quiet", "--json"]) == 0
    return path


@pytest.fixture(scope="module")
def browser():
    with started_browser() as started:
        yield started


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
    page.locator("#plot-bypass_heatmap .nsewdrag").first.hover()
    page.wait_for_function(
        "document.querySelector('#plot-bypass_heatmap .hoverlayer').textContent.includes('Bypass')"
    )
    hover = page.locator("#plot-bypass_heatmap .hoverlayer").text_content()
    assert re.search(r"layer \d, position -\d", hover)


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
    assert page.locator(".replies h3").all_inner_texts() == [
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


VERDICTS = ("TD.n", "SPAN.badge refused", "SPAN.badge answered")
# How bright the middle of each diverging scale is drawn, 0 to 1, by figure.
MIDDLE = """() => Object.fromEntries([...document.querySelectorAll(".canvas")].flatMap((e) => {
  const map = e._fullData.find((t) => ["diverging", "removed"].includes(t.meta?.scale));
  if (!map) return [];
  const text = map.colorscale[(map.colorscale.length - 1) / 2][1];
  const parts = text.startsWith("#") ? text.slice(1).match(/../g).map((x) => parseInt(x, 16))
    : text.match(/\\d+/g).map(Number);
  return [[e.id, parts.reduce((sum, v) => sum + v, 0) / 765]];
}))"""


@needs_browser
def test_a_phone_does_not_scroll_sideways(browser, page_file: Path) -> None:
    made = Opened(browser, page_file, viewport={"width": 390, "height": 844})
    made.wait_for_all()
    assert made.page.evaluate(OVERFLOW) == 390
    made.page.locator("#answers tbody button").first.click()
    made.page.wait_for_selector(".replies p")
    check_axe(made.page)
    for details in made.page.locator("details:not(.save)").all():
        details.evaluate("e => { e.open = true; }")
    assert made.page.evaluate(OVERFLOW) == 390
    # What is too wide scrolls in a box of its own.
    boxes = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
    assert made.page.evaluate(f"{boxes}.length") > 3
    check_contrast(made.page, *VERDICTS)
    check_figures(made.page)
    made.page.screenshot(path=BUILD / "phone.png", full_page=True)
    made.page.emulate_media(color_scheme="dark")
    check_figures(made.page)
    made.page.screenshot(path=BUILD / "phone-dark.png", full_page=True)
    made.check()
    made.page.context.close()


@needs_browser
def test_a_comparison_fits_a_phone_and_draws_its_figures(
    browser, run: Path, small_runs: list[Path]
) -> None:
    path = BUILD / "compared.html"
    folders = [str(folder) for folder in (run, *small_runs)]
    assert main(["report", *folders, "-o", str(path), "--quiet", "--json"]) == 0
    made = Opened(browser, path, viewport={"width": 390, "height": 844})
    made.wait_for_all()
    assert made.page.evaluate(OVERFLOW) == 390
    assert made.page.locator(".canvas .main-svg").count() >= 2 * (2 + 9)
    made.page.screenshot(path=BUILD / "compared-phone.png", full_page=True)
    check_figures(made.page)
    made.page.set_viewport_size({"width": 1400, "height": 900})
    made.page.emulate_media(color_scheme="dark")
    check_figures(made.page)
    check_axe(made.page)
    assert made.page.evaluate(OVERFLOW) == 1400
    made.page.screenshot(path=BUILD / "compared-dark.png", full_page=True)
    made.check()
    made.page.context.close()


def saved(page, menu: str, button: str) -> tuple[str, bytes]:
    """What a button of a download menu hands over: the name of the file, and its bytes."""
    holder = page.locator(menu)
    holder.evaluate("e => { for (; e; e = e.parentElement.closest('details')) e.open = true; }")
    with page.expect_download() as waiting:
        holder.locator("button", has_text=button).click()
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()


@needs_browser
def test_every_table_and_figure_can_be_downloaded(opened: Opened, run: Path) -> None:
    page = opened.page
    opened.wait_for_all()
    assert page.locator(".modebar").count() == 0
    tables, figures = page.locator("table").count(), page.locator(".canvas").count()
    assert page.locator("details.save").count() == tables + figures
    figure = "figure:has(#plot-bypass_heatmap) details.save"
    name, picture = saved(page, figure, "PNG")
    assert name == "bypass_heatmap.png"
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5_000
    selection = json.loads((run / "selection.json").read_text())
    cells = list(csv.DictReader(io.StringIO(saved(page, figure, "CSV")[1].decode())))
    won = selection["winner"]
    wanted = next(c for c in selection["candidates"] if all(c[k] == won[k] for k in won))
    score = [
        float(cell["value"])
        for cell in cells
        if cell["value"] and cell["x"] == str(won["layer"])
        and cell["y"].lstrip("'").split()[0] == str(won["position"])
    ]  # fmt: skip
    assert score == [wanted["bypass_score"]]
    _, held = saved(page, "#selection .held details.save >> nth=-1", "JSON")
    rows = json.loads(held)
    assert len(rows) == len(selection["candidates"])
    assert {"position", "layer", "verdict"} <= set(rows[0])
    # Of the answers every prompt is there, not one page; and no answer's text.
    name, prompts = saved(page, "#completions details.save", "CSV")
    assert name.startswith("completions-table")
    lines = list(csv.DictReader(io.StringIO(prompts.decode())))
    assert len(lines) == int(page.locator("#count").inner_text().split()[0]) > 20
    assert any(EVIL in line["prompt"] for line in lines)
    assert "says" not in prompts.decode()


@needs_browser
def test_light_dark_toggle_and_print(browser, page_file: Path) -> None:
    grounds, middles = {}, {}
    for scheme in ("light", "dark"):
        wide = {"width": 1400, "height": 900}
        made = Opened(browser, page_file, color_scheme=scheme, viewport=wide)
        made.wait_for_all()
        page = made.page
        ground = "getComputedStyle(document.body).backgroundColor"
        grounds[scheme] = page.evaluate(ground)
        page.screenshot(path=BUILD / f"{scheme}.png", full_page=True)
        check_contrast(page, *VERDICTS)
        check_figures(page)
        # A heatmap's middle is as bright as its page.
        middles[scheme] = page.evaluate(MIDDLE)
        ink = page.evaluate("document.getElementById('plot-trace').layout.font.color")
        assert ink == page.evaluate(
            "getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()"
        )
        if scheme == "dark":
            check_axe(page)
        else:
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
    assert min(middles["light"].values()) > 0.9
    assert max(middles["dark"].values()) < 0.1
    assert set(middles["light"]) == {
        "plot-bypass_heatmap", "plot-induce_heatmap", "plot-cosines", "plot-edit_strip",
    }  # fmt: skip
    assert (BUILD / "dark.png").stat().st_size > 50_000


@needs_browser
def test_every_control_can_be_reached_by_tab(opened: Opened) -> None:
    page = opened.page
    reached = set()
    for _ in range(300):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if "commands" in reached:
            break
    wanted = {"theme", "layer", "f-text", "f-kind", "f-category", "f-outcome", "next", "commands"}
    assert wanted <= reached


def test_the_file_holds_no_address_and_plotly_once(page_file: Path) -> None:
    html = page_file.read_text()
    assert html.count('id="plotly"') == 1
    outside = re.sub(r'<script type="[^"]*" id="\w+">[^<]*</script>', "", html)
    assert not re.search(r'(?:src|href)\s*=\s*["\']?(?:https?:)?//', outside)
    assert "default-src 'none'" in unescape(outside)
    assert "<script>window" not in html
    assert len(page_file.read_bytes()) < 4_000_000


@needs_browser
def test_png_writes_the_same_figures(run: Path, cli, tmp_path: Path) -> None:
    shutil.copy(run / "trace.json", tmp_path)
    shutil.copy(run / "evaluation.json", tmp_path)
    result = cli("report", tmp_path, "--no-completions", "--png", tmp_path / "png", "--json")
    assert result.code == 0, result.err
    assert {"refusals", "trace"} <= set(result.json["figures"])
    names = {Path(path).stem for path in result.json["png"]}
    assert names == set(result.json["figures"])
    for path in result.json["png"]:
        assert Path(path).read_bytes().startswith(b"\x89PNG")
        assert Path(path).stat().st_size > 5_000
