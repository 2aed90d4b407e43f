"""How large a report of 1,000 prompts x 5 interventions is, and how soon a browser has it open.

    python scripts/bench_report.py [--folder FOLDER] [--browser /usr/bin/chromium] [--repeat 3]

Runs the bundled model through every stage, puts synthetic answers of 512 tokens' length in the
place of its completions (words drawn from the bundled prompts: they compress about as English
does), writes the report and opens it in headless Chromium, a new browser each time. Printed are the
file's size, the time until the tables are there (`load`), until the plots in sight are drawn
(`ready`) and until all are, and the CPU time of the page's main thread until `ready` (`work`),
which other processes on the machine lengthen little.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from abliterate.cli.app import main
from abliterate.prompts.sampling import load_prompts
from abliterate.resources import demo_model_dir

NAMES = ("baseline", "ablate", "add", "subtract", "orthogonalized")
PROMPTS, WORDS = 1000, 380  # 500 harmful and 500 harmless; 380 English words are some 512 tokens


def make_run(folder: Path) -> None:
    """Every stage on the demo model."""
    quiet = ["--quiet", "--json"]
    small = ["--n-test", "20", "--max-new-tokens", "16", "--save-activations"]
    assert main(["run", str(demo_model_dir()), "-o", str(folder), *small, *quiet]) == 0
    assert main(["inspect", str(folder), *quiet]) == 0
    assert main(["trace", str(folder), "--suffix", "in a few kind words", *quiet]) == 0


def enlarge(folder: Path) -> int:
    """Replace the completions by synthetic ones; returns the size of their texts in bytes."""
    texts = [p.text for kind in ("harmful", "harmless") for p in load_prompts(kind, "train")]
    words = sorted({word for text in texts for word in text.split()})
    draw, path = random.Random(0), folder / "evaluation.json"
    record = json.loads(path.read_text())
    results = record["interventions"]
    record["interventions"] = {name: results.get(name, results["baseline"]) for name in NAMES}
    record["outputs"], size, sample = {}, 0, ""
    for kind in ("harmful", "harmless"):
        for name in NAMES:
            file = folder / "completions" / f"{name}-{kind}.jsonl"
            lines = []
            for at in range(PROMPTS // 2):
                sample = " ".join(draw.choices(words, k=WORDS))
                size += len(sample)
                line = {"prompt": f"{texts[at % len(texts)]} ({kind} {at})", "response": sample}
                lines.append(line | {"category": f"topic {at % 10}", "refused": at % 3 == 0})
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
            record["outputs"][file.name] = ""
    path.write_text(json.dumps(record))
    ratio = len(sample) / len(gzip.compress(sample.encode()))
    print(f"texts: {size / 1e6:.1f} MB; one answer compresses {ratio:.1f}-fold")
    return size


def measure(file: Path, browser: str, repeat: int) -> None:
    """Open the file in a fresh browser ``repeat`` times."""
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    times: dict[str, list[float]] = {"load": [], "ready": [], "all plots": [], "work": []}
    with sync_playwright() as playwright:
        for _ in range(repeat):
            started = playwright.chromium.launch(executable_path=browser, args=flags)
            page = started.new_page(viewport={"width": 1320, "height": 900})
            session = page.context.new_cdp_session(page)
            session.send("Performance.enable", {"timeDomain": "threadTicks"})
            begun = time.perf_counter()
            page.goto(file.resolve().as_uri(), wait_until="load")
            times["load"].append(time.perf_counter() - begun)
            page.wait_for_selector("html[data-ready=yes]", state="attached", timeout=120_000)
            times["ready"].append(time.perf_counter() - begun)
            metrics = session.send("Performance.getMetrics")["metrics"]
            times["work"].append(next(m["value"] for m in metrics if m["name"] == "TaskDuration"))
            page.wait_for_selector("html[data-drawn=all]", state="attached", timeout=120_000)
            times["all plots"].append(time.perf_counter() - begun)
            assert page.locator("#count").inner_text() == f"{PROMPTS} of {PROMPTS} prompts"
            started.close()
    for name, seconds in times.items():
        median, least = statistics.median(seconds), min(seconds)
        print(f"{name}: median {median:.2f} s, least {least:.2f} s of {repeat}")


def cli() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="work here and keep it")
    parser.add_argument("--browser", default=shutil.which("chromium") or "/usr/bin/chromium")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "run"
        if not (folder / "trace.json").exists():
            make_run(folder)
        enlarge(folder)
        file = folder / "report.html"
        begun = time.perf_counter()
        assert main(["report", str(folder), "--quiet", "--json"]) == 0
        print(f"written in {time.perf_counter() - begun:.1f} s")
        print(f"file: {file.stat().st_size / 1e6:.2f} MB")
        measure(file, options.browser, options.repeat)


if __name__ == "__main__":
    cli()
