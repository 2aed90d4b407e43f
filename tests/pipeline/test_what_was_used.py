"""Every record of a stage that runs a model says how it was computed, as that was resolved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

OPEN = ("--kl-threshold", "1e9", "--induce-threshold=-1e9", "--no-filter", "--n-val", "3")
TRAIN = ("--no-filter", "--refusal-token", "I", "--positions", "last", "--n-train", "6")
SHORT = ("--n-test", "2", "--max-new-tokens", "2")
WARNED = "runs in {}, extract ran in {}"


@pytest.fixture
def run(tiny, cli, tmp_path: Path) -> Path:
    """A run folder of a checkpoint that is stored in bfloat16, which a CPU runs in float32."""
    path = tmp_path / "run"
    result = cli("extract", tiny("llama", dtype=torch.bfloat16), "-o", path, *TRAIN, "--json")
    assert result.code == 0, result.err
    return path


def _used(record: dict[str, Any]) -> tuple[str, str, str]:
    held = record["computed_with"]
    return held["dtype"], held["device"], held["attention"]


def test_every_stage_records_what_it_resolved_to_and_the_batches_that_ran(
    run: Path, tiny, cli
) -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    for line in (
        ("select", run, *OPEN, "--prune-layers", "0", "--batch-size", "2"),
        ("evaluate", model, "--direction", run, *SHORT, "--attn-implementation", "eager"),
        ("inspect", run),
        ("trace", run, "--n-prompts", "2"),
        ("fragility", run, "--steps", "2", *SHORT, "--no-picture"),
    ):
        result = cli(*line, "--json")
        assert result.code == 0, result.err
        assert "extract ran in" not in result.err
    records = {
        name: json.loads((run / f"{name}.json").read_text())
        for name in ("extract", "selection", "evaluation", "inspect", "trace", "fragility")
    }
    for name, record in records.items():
        attention = "eager" if name == "evaluation" else "sdpa"
        assert _used(record) == ("float32", "cpu", attention), name
        assert record["computed_with"]["threads"] == torch.get_num_threads()
        assert {"torch", "transformers", "abliterate"} <= record["versions"].keys()
    # What ran, not what was asked for: 2 of 3 prompts, and all 6 at once where nothing was asked.
    assert records["selection"]["computed_with"]["batch_size"] == "2"
    assert records["selection"]["batches"]["rows"] == 2
    assert records["extract"]["computed_with"]["batch_size"] == "auto"
    assert 2 <= records["extract"]["batches"]["rows"] <= 6
    assert records["evaluation"]["batches"]["answer_rows"] == 2
    assert "trace" not in records["inspect"]
    assert cli("report", run).code == 0
    assert "float32, cpu, sdpa, --batch-size 2" in (run / "report.html").read_text()


def test_scores_that_are_kept_record_how_they_were_computed(run: Path, cli) -> None:
    first = cli("select", run, *OPEN, "--prune-layers", "0", "--json").json
    again = cli("select", run, *OPEN, "--prune-layers", "0", "--json")
    assert "the model is not opened" in again.err
    assert _used(again.json) == _used(first)
    assert "batches" not in again.json  # nothing ran


def test_a_stage_in_another_dtype_than_extract_says_so(run: Path, tiny, cli) -> None:
    narrow = ("--dtype", "bfloat16", "--json")
    chosen = cli("select", run, *OPEN, "--prune-layers", "0", *narrow)
    assert WARNED.format("bfloat16", "float32") in chosen.err
    assert _used(chosen.json)[0] == "bfloat16"
    model = tiny("llama", dtype=torch.bfloat16)
    for line in (
        ("evaluate", model, "--direction", run, *SHORT),
        ("trace", run, "--n-prompts", "2"),
        ("inspect", run),
        ("fragility", run, "--steps", "2", *SHORT, "--no-picture"),
    ):
        result = cli(*line, *narrow)
        assert result.code == 0, result.err
        assert WARNED.format("bfloat16", "float32") in result.err, line[0]
        assert _used(result.json)[0] == "bfloat16"
    assert cli("report", run).code == 0
    assert (run / "report.html").read_text().count("(extract ran in float32)") == 4


def test_verify_says_how_it_measured_the_leak(run: Path, tiny, cli, tmp_path: Path) -> None:
    model, out = tiny("llama", dtype=torch.bfloat16), tmp_path / "out"
    assert cli("select", run, *OPEN, "--prune-layers", "0", "--json").code == 0
    assert cli("orthogonalize", model, "--direction", run, "-o", out, "--json").code == 0
    told = cli("verify", out, "--direction", run, "--forward", "--n-prompts", "2", "--json").json
    assert _used(told) == ("float32", "cpu", "sdpa")
    assert told["versions"]["torch"] == torch.__version__
