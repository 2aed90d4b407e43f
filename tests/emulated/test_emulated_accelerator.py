"""Apple silicon and CUDA, shown without owning either: the tests of ``inside/`` in a process of
their own, as a device that was registered with torch stays for the life of the process.

One of them: ``EMULATED_ACCELERATOR=1 pytest tests/emulated/inside -k NAME``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

_INSIDE = Path(__file__).with_name("inside")
# What takes long by itself, in a process beside the stages.
_APART = [
    str(_INSIDE / name)
    for name in ("test_gpu_check_on_accelerator.py", "test_judge_and_tasks_on_accelerator.py")
]


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot register a device from Python",
)
@pytest.mark.parametrize(
    ("chosen", "least"),
    [
        pytest.param([str(_INSIDE), *(f"--ignore={name}" for name in _APART)], 40, id="stages"),
        pytest.param(_APART, 2, id="apart"),
    ],
)
def test_everything_holds_on_an_accelerator(chosen: list[str], least: int, tmp_path: Path) -> None:
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
