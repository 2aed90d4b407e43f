#!/usr/bin/env python3
"""What changes a run's numbers, and by how much: prints the table of docs/reproducibility.md.

    .venv/bin/python scripts/measure_reproducibility.py [MODEL] [--prompts N]

extract, select and evaluate run once as they are, and once with each thing changed: nothing, the
number of threads, the seed, the batch size, the dtype. Each is compared with the first: files byte
for byte, directions by cosine and largest difference, scores by the largest difference over all
candidates, greedy answers one by one.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from abliterate.cli.app import main as abliterate
from abliterate.resources import demo_model_dir
from abliterate.storage.artifacts import hash_file, versions

SCORES = ("bypass_score", "induce_score", "kl_divergence")
OPEN = ("--search", "exhaustive", "--all-layers", "--kl-threshold", "1e9")
FREE = ("--induce-threshold=-1e9", "--prune-layers", "0")


@dataclass(frozen=True)
class Change:
    """One thing that is changed."""

    name: str
    options: tuple[str, ...] = ()
    threads: int = 1


CHANGES = (
    Change("nothing"),
    Change("--batch-size 1", ("--batch-size", "1")),
    Change("--batch-size 4", ("--batch-size", "4")),
    Change("--dtype bfloat16", ("--dtype", "bfloat16")),
    Change("--seed 1", ("--seed", "1")),
    Change("2 threads", threads=2),
)


def run(model: str, folder: Path, change: Change, n: int) -> None:
    """The three stages into ``folder``."""
    torch.set_num_threads(change.threads)
    options, count = list(change.options), str(n)
    machine = options if "--batch-size" in options else []  # the rest is in extract's record
    for line in (
        ["extract", model, "-o", str(folder), "--n-train", count, *options],
        ["select", str(folder), "--n-val", count, *OPEN, *FREE, *machine],
        ["evaluate", model, "--direction", str(folder), "--n-test", count,
         "--max-new-tokens", "16", *machine],
    ):  # fmt: skip
        with redirect_stdout(StringIO()):
            code = abliterate([*line, "--quiet", "--json"])
        if code != 0:
            sys.exit(f"abliterate {' '.join(line)} ended with {code}")


def compare(first: Path, other: Path) -> list[str]:
    """The cells of a row."""
    same = all(
        hash_file(first / name) == hash_file(other / name)
        for name in ("directions.safetensors", "direction.safetensors")
    )
    one, two = (_directions(folder) for folder in (first, other))
    known = (one.norm(dim=-1) > 0) & (two.norm(dim=-1) > 0)
    cosines = torch.nn.functional.cosine_similarity(one[known], two[known], dim=-1)
    apart = ((one - two).norm(dim=-1) / one.norm(dim=-1))[known].max()
    a, b = (json.loads((folder / "selection.json").read_text()) for folder in (first, other))
    differences = [_largest(a, b, score) for score in SCORES]
    winner = "same" if a["winner"] == b["winner"] else "another"
    answers = [_answers(folder) for folder in (first, other)]
    both = answers[0].keys() & answers[1].keys()
    equal = sum(answers[0][key] == answers[1][key] for key in both)
    return [
        "the same bytes" if same else "other bytes",
        f"{float(cosines.min()):.6f}",
        f"{float(apart):.1e}",
        *(f"{difference:.1e}" for difference in differences),
        winner,
        f"{equal} of {len(both)}",
    ]


def _directions(folder: Path) -> torch.Tensor:
    held = load_file(folder / "directions.safetensors")
    return held["mean_harmful"] - held["mean_harmless"]


def _largest(one: Any, other: Any, score: str) -> float:
    """The largest difference over candidates that both have measured."""
    values = [
        {(c["position"], c["layer"]): c[score] for c in record["candidates"]}
        for record in (one, other)
    ]
    differences = [
        abs(values[0][key] - values[1][key])
        for key in values[0].keys() & values[1].keys()
        if None not in (values[0][key], values[1][key])
    ]
    return max(differences, default=math.nan)


def _answers(folder: Path) -> dict[tuple[str, str], str]:
    """The answer to each prompt, by file and prompt."""
    return {
        (path.name, line["prompt"]): line["response"]
        for path in sorted((folder / "completions").glob("*.jsonl"))
        for line in map(json.loads, path.read_text().splitlines())
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=str(demo_model_dir()))
    parser.add_argument("--prompts", type=int, default=32, help="of each kind, in each stage")
    options = parser.parse_args()
    titles = ["changed", "directions", "cosine, least", "relative difference, largest",
              "bypass", "induce", "KL", "choice", "answers that are equal"]  # fmt: skip
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    print(f"{Path(options.model).name}, {options.prompts} prompts of each kind, {made}, "
          f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}\n")  # fmt: skip
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    with tempfile.TemporaryDirectory(prefix="abliterate-") as place:
        first = Path(place, "first")
        run(options.model, first, Change("first"), options.prompts)
        for number, change in enumerate(CHANGES):
            other = Path(place, str(number))
            run(options.model, other, change, options.prompts)
            print("| " + " | ".join([change.name, *compare(first, other)]) + " |", flush=True)


if __name__ == "__main__":
    main()
