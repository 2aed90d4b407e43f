"""How long commands take to start: those without a model against bare Python, those with one
against `import torch, transformers`.

    python scripts/bench_startup.py [--repeat 5] [--only NAME ...]

Printed for each are the medians of wall time and of CPU time (user and system, of one thread),
which other processes on the machine lengthen less, and what both are more than the baselines'.
Commands without a model run to their end, on a run of the bundled model that is made first. Of
commands with one, what they import is measured: `class` is what transformers itself imports with
the class of any model, and the rest is ours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from abliterate.resources import demo_model_dir

LIBRARIES = "import torch, transformers"
MODEL_CLASS = f"{LIBRARIES}; from transformers import PreTrainedModel"
# What each command imports beside the command line.
WITH_A_MODEL = {
    "extract": "pipeline.extract_stage",
    "select": "pipeline.select_stage",
    "orthogonalize": "pipeline.edit_stage",
    "run": "pipeline.run",
    "evaluate": "evaluation.stage",
    "verify": "verification",
    "writers": "editing.writer_table",
    "inspect (a new run)": "analysis.inspection",
    "trace": "analysis.direction_trace",
    "fragility": "analysis.fragility",
    "audit, diff": "auditing.report",
    "chat": "inference.dialogue",
    "plan": "capacity.resource_estimate",
}


@dataclass(frozen=True)
class Time:
    """Seconds of a process."""

    wall: float
    cpu: float


def environment() -> dict[str, str]:
    """One thread, and compiled code kept, as it is where the package is installed."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def once(arguments: Sequence[str], folder: Path) -> Time:
    """Run Python with ``arguments``; whether the command fails is no matter here."""
    begun = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return Time(time.perf_counter() - begun, used.ru_utime + used.ru_stime)


def measure(arguments: Sequence[str], folder: Path, repeat: int) -> Time:
    """Medians, after a first time that compiles."""
    once(arguments, folder)
    times = [once(arguments, folder) for _ in range(repeat)]
    return Time(
        statistics.median(time.wall for time in times),
        statistics.median(time.cpu for time in times),
    )


def light_commands(folder: Path) -> dict[str, list[str]]:
    """Commands without a model, and the files that they need."""
    quiet = ["--quiet", "--json"]
    small = ["--n-train", "16", "--n-val", "8", "--n-test", "4", "--max-new-tokens", "8"]
    model = str(demo_model_dir())
    for argv in (
        ["run", model, "-o", "run", *small, "--save-activations", *quiet],
        ["inspect", "run", *quiet],
        ["trace", "run", "--n-prompts", "4", *quiet],
    ):
        command = [sys.executable, "-m", "abliterate", *argv]
        subprocess.run(command, cwd=folder, env=environment(), check=True, capture_output=True)
    (folder / "answers.json").write_text(json.dumps([{"prompt": "How?", "response": "I cannot."}]))
    return {
        "--version": ["--version"],
        "--help": ["--help"],
        "select --help": ["select", "--help"],
        "usage error": ["extract", "model", "-o", "out", "--n-train", "0"],
        "no such checkpoint": ["extract", "absent", "-o", "out"],
        "prompts harmful": ["prompts", "harmful"],
        "select --scores": ["select", "--scores", "run/selection.json"],
        "inspect (known run)": ["inspect", "run"],
        "score": ["score", "answers.json"],
        "report": ["report", "run"],
    }


def row(name: str, own: Time, *less: Time) -> str:
    beyond = "".join(f"{own.wall - base.wall:10.2f}{own.cpu - base.cpu:8.2f}" for base in less)
    return f"{name:32}{own.wall:8.2f}{own.cpu:8.2f}{beyond}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="parts of the names")
    chosen = parser.parse_args()

    def wanted(name: str) -> bool:
        return not chosen.only or any(part in name for part in chosen.only)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        bare = measure(["-c", "pass"], folder, chosen.repeat)
        print(f"{'seconds':32}{'wall':>8}{'CPU':>8}{'- python':>10}{'CPU':>8}")
        print(row("python", bare))
        for name, argv in light_commands(folder).items():
            if wanted(name):
                own = measure(["-m", "abliterate", *argv], folder, chosen.repeat)
                print(row(name, own, bare), flush=True)
        libraries = measure(["-c", LIBRARIES], folder, chosen.repeat)
        classes = measure(["-c", MODEL_CLASS], folder, chosen.repeat)
        head = f"{'- torch':>10}{'CPU':>8}{'- class':>10}{'CPU':>8}"
        print(f"\n{'seconds':32}{'wall':>8}{'CPU':>8}{head}")
        print(row("import torch, transformers", libraries))
        print(row("... and the class of a model", classes, libraries))
        for name, module in WITH_A_MODEL.items():
            if wanted(name):
                code = f"import abliterate.cli.app, abliterate.{module}"
                own = measure(["-c", code], folder, chosen.repeat)
                print(row(name, own, libraries, classes), flush=True)


if __name__ == "__main__":
    main()
