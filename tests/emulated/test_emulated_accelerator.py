"""Apple silicon and CUDA, shown without owning either: the tests of ``inside/`` in a process of
their own, as a device that was registered with torch stays for the life of the process.

One of them: ``EMULATED_ACCELERATOR=1 pytest tests/emulated/inside -k NAME``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch.utils import backend_registration
from warm_python import warm_python

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
def test_everything_holds_on_an_accelerator(
    chosen: list[str], least: int, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    done = warm_python().run(
        "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short",
        "--show-capture=stderr", f"--basetemp={tmp_path / 'inside'}", *chosen,
        env={"EMULATED_ACCELERATOR": "1", "PYTEST_ADDOPTS": ""},
        timeout=1200,
    )  # fmt: skip
    assert done.code == 0, done.out[-6000:] + done.err[-2000:]
    passed = re.search(r"(\d+) passed", done.out)
    assert passed, done.out[-2000:]
    assert int(passed[1]) >= least
    assert "skipped" not in done.out
