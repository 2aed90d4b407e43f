"""``scripts/gpu_check.py``, a local judge and lm-eval on the emulated accelerator."""

from __future__ import annotations

from pathlib import Path

from inside_runs import APART, check_inside, needs_backends


@needs_backends
def test_the_check_and_the_judge_run_on_an_accelerator(tmp_path: Path) -> None:
    check_inside(APART, 2, tmp_path)
