"""A run folder of every stage with markup in everything that a report shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from abliterate.cli.app import main
from abliterate.prompts.sampling import load_prompts
from abliterate.resources import demo_model_dir
from abliterate.storage.artifacts import hash_file

EVIL = '<script>window.pwned=1</script><img src="https://example.org/x.png" onerror="pwned=2">'
BREAKOUT = "</script></textarea><svg onload=pwned=3><!-- <script> ${pwned} {{ 7*7 }} %{x} &lt;"


def make_run(place: Path) -> Path:
    """Every stage on a model with markup in its name, on prompts with markup, answers likewise."""
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
    small = ["--n-train", "16", "--n-val", "5", "--max-new-tokens", "6", "--save-activations"]
    small += ["--n-test", "13", "--search", "exhaustive", "--no-filter", "--controls", "1"]
    assert main(["run", str(model), "-o", str(folder), *sources, *small, *quiet]) == 0
    assert main(["inspect", str(folder), *quiet]) == 0
    suffix = ["--suffix", f"kindly {BREAKOUT}", "--n-prompts", "4"]
    assert main(["trace", str(folder), *suffix, *quiet]) == 0
    for path in (folder / "completions").glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[0]["response"] = f"{path.stem} says {EVIL}{BREAKOUT}"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Answers that are not those of the record would be stale.
    record = json.loads((folder / "evaluation.json").read_text())
    record["outputs"] = {n: hash_file(folder / "completions" / n) for n in record["outputs"]}
    (folder / "evaluation.json").write_text(json.dumps(record))
    return folder


OPEN = ("--kl-threshold", "1e9", "--induce-threshold=-1e9", "--no-filter", "--n-val", "3")
TRAIN = ("--no-filter", "--refusal-token", "I", "--positions", "last", "--n-train", "6")


def make_small_runs(place: Path, model: Path) -> None:
    """Two runs of one model and one name, of two seeds; the first is evaluated."""
    for seed in ("0", "1"):
        folder = place / f"seed{seed}" / "small"
        for line in (
            ("extract", model, "-o", folder, *TRAIN, "--seed", seed),
            ("select", folder, *OPEN),
        ):
            assert main([*map(str, line), "--quiet", "--json"]) == 0, line
    first = place / "seed0" / "small"
    words = ["evaluate", str(model), "--direction", str(first), "--n-test", "3", "--controls", "0"]
    assert main([*words, "--max-new-tokens", "2", "--quiet", "--json"]) == 0
