"""A page that we wrote in a real browser: what it asks for and says, and if it can be read."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BUILD = Path(__file__).parents[2] / "build" / "report"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
CAN_BROWSE = CHROMIUM is not None and importlib.util.find_spec("playwright") is not None
needs_browser = pytest.mark.skipif(not CAN_BROWSE, reason="needs Chromium and playwright")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--no-first-run",
]  # fmt: skip


@contextmanager
def started_browser() -> Iterator[Any]:
    """Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


class Opened:
    """A page with everything it asked for and said."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        options = {"viewport": {"width": 1320, "height": 900}, **options}
        context = browser.new_context(**options)
        context.set_default_timeout(60_000)
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
        # A download is made in the page: its blob has no address that anything could be sent to.
        assert [url for url in self.requests if not url.startswith("blob:null/")] == [self.file]
        assert self.said == []
        assert self.page.evaluate("typeof window.pwned") == "undefined"


# Of every piece of text in sight: its colour, and the nearest ground that is not see-through.
CONTRAST = """() => {
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const bright = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const found = parts(getComputedStyle(e).backgroundColor);
      if (found.length < 4 || found[3] > 0.99) return found;
    }
    return [255, 255, 255];
  };
  const seen = {};
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest("svg, script, noscript, :disabled")) continue;
    const [one, other] = [bright(parts(getComputedStyle(e).color)), bright(ground(e))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    const name = `${e.tagName}.${e.className}`;
    seen[name] = Math.min(seen[name] ?? 99, ratio);
  }
  return seen;
}"""
OVERFLOW = "document.documentElement.scrollWidth"


def check_contrast(page: Any, *kinds: str) -> None:
    """WCAG's least contrast of text, for every kind of element that shows some.

    Args:
        kinds: of elements (``TAG.class``) that must be among them.
    """
    found = page.evaluate(CONTRAST)
    assert {"H1.", *kinds} <= set(found), sorted(found)
    assert any(name.startswith("TH.") for name in found), sorted(found)
    assert {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}


# Text boxes of a figure that lie on each other, or beyond the figure's edge.
CRAMPED = """() => {
  const found = [];
  for (const canvas of document.querySelectorAll(".canvas")) {
    const edge = canvas.getBoundingClientRect();
    const texts = [...canvas.querySelectorAll("svg text")]
      .filter((e) => e.textContent.trim() && !e.closest(".hoverlayer"))
      .map((e) => [e.textContent, e.getBoundingClientRect()])
      .filter(([, box]) => box.width && box.height);
    texts.forEach(([text, one], at) => {
      const outside = Math.max(edge.left - one.left, one.right - edge.right,
        edge.top - one.top, one.bottom - edge.bottom);
      if (outside > 1) found.push([canvas.id, text, "is cut"]);
      for (const [other, two] of texts.slice(at + 1)) {
        const wide = Math.min(one.right, two.right) - Math.max(one.left, two.left);
        const high = Math.min(one.bottom, two.bottom) - Math.max(one.top, two.top);
        if (wide > 1 && high > 1) found.push([canvas.id, text, other]);
      }
    });
  }
  return found;
}"""


def check_figures(page: Any, texts: int = 50) -> None:
    """Every figure's text can be read; there are more than so many."""
    # A figure that has been given another width is drawn again when the browser has time.
    page.wait_for_function(
        """() => [...document.querySelectorAll(".canvas")].every((e) =>
          Math.abs(e.querySelector(".main-svg").clientWidth - e.clientWidth) < 2)"""
    )
    assert page.locator(".canvas svg text").count() > texts
    assert page.evaluate(CRAMPED) == []


def check_axe(page: Any) -> None:
    """axe-core has nothing to say against the page.

    What is drawn inside a figure is one picture to it, whose thousands of shapes take it long.
    """
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, context={"exclude": [[".canvas > *"]]}).response
    wrong = found["violations"]
    assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in wrong] == []


def check_small_page(file: Path) -> None:
    """A page of a figure or two reads well on a phone at night and on a desk by day."""
    with started_browser() as browser:
        phone = {"width": 390, "height": 844}
        made = Opened(browser, file, viewport=phone, color_scheme="dark")
        made.wait_for_all()
        page = made.page
        for width, scheme in ((390, "dark"), (1400, "light")):
            page.set_viewport_size({"width": width, "height": 844})
            page.emulate_media(color_scheme=scheme)
            check_figures(page, texts=8)
            check_contrast(page, "FIGCAPTION.", "P.verdict")
            assert page.evaluate(OVERFLOW) == width
            BUILD.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=BUILD / f"{file.stem}-{width}-{scheme}.png", full_page=True)
            if scheme == "dark":
                check_axe(page)
                ground = "getComputedStyle(document.body).backgroundColor"
                assert page.evaluate(ground) == "rgb(15, 20, 26)"
        # What a figure offers shows where somebody points at it.
        assert page.locator(".modebar").count() == 0
        menu = page.locator("figure .save").first
        shown = "e => getComputedStyle(e).opacity"
        assert menu.evaluate(shown) == "0"
        page.locator("figure").first.hover()
        assert menu.evaluate(shown) == "1"
        made.check()
