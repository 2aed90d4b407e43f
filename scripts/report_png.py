"""Take a picture of a report's first screen, for the README.

    python scripts/report_png.py [docs/report.png]

The pipeline is run on the bundled model in an empty folder, and its report is opened in Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_SIZE = {"width": 1180, "height": 668}


def main() -> None:
    """Run the pipeline and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "docs" / "report.png")
    out = parser.parse_args().out
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    with tempfile.TemporaryDirectory() as empty:
        # A copy, so that the report names the model and no folder of this machine.
        shutil.copytree(ROOT / "data" / "demo-model", Path(empty, "demo-model"))
        for words in (("run", "demo-model", "-o", "demo"), ("report", "demo")):
            command = [sys.executable, "-m", "abliterate", *words, "--quiet"]
            subprocess.run(command, cwd=empty, check=True, stdout=subprocess.DEVNULL)
        _shoot(Path(empty, "demo", "report.html"), out, browser)


def _shoot(page_file: Path, out: Path, browser: str | None) -> None:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = started.new_page(viewport=_SIZE, color_scheme="light")
        page.goto(page_file.resolve().as_uri())
        page.wait_for_selector("html[data-drawn=all]", state="attached")
        page.screenshot(path=out)
        started.close()


if __name__ == "__main__":
    main()
