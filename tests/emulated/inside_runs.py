"""A pytest run in a process of its own over some of ``inside/``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch.utils import backend_registration
from warm_python import warm_python

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
    done = warm_python().run(
        "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short",
        "--show-capture=stderr", f"--basetemp={tmp_path / 'inside'}", *chosen,
        env={"EMULATED_ACCELERATOR": "1", "PYTEST_ADDOPTS": ""},
    )  # fmt: skip
    assert done.code == 0, done.out[-6000:] + done.err[-2000:]
    passed = re.search(r"(\d+) passed", done.out)
    assert passed, done.out[-2000:]
    assert int(passed[1]) >= least
    assert "skipped" not in done.out
