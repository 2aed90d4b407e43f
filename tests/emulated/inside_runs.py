"""A pytest run of its own over some of ``inside/``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch.utils import backend_registration

INSIDE = Path(__file__).with_name("inside")
# What takes long by itself: a file of its own runs it, beside the stages.
APART = [
    str(INSIDE / name)
    for name in ("test_gpu_check_on_accelerator.py", "test_judge_and_tasks_on_accelerator.py")
]
needs_backends = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot register a device from Python",
)


def check_inside(chosen: Sequence[str], least: int, tmp_path: Path) -> None:
    """The tests pass, none is skipped, and they are so many at least."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short",
         "--show-capture=stderr", f"--basetemp={tmp_path / 'inside'}",
         *chosen],
        env={**os.environ, "EMULATED_ACCELERATOR": "1", "PYTEST_ADDOPTS": ""},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-2000:]
    assert int(passed[1]) >= least
    assert "skipped" not in done.stdout
