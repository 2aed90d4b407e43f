"""Apple silicon and CUDA, shown without owning either: the tests of ``inside/`` in a process of
their own, as a device that was registered with torch stays for the life of the process.

One of them: ``EMULATED_ACCELERATOR=1 pytest tests/emulated/inside -k NAME``.
"""

from __future__ import annotations

from pathlib import Path

from inside_runs import APART, INSIDE, check_inside, needs_backends


@needs_backends
def test_everything_holds_on_an_accelerator(tmp_path: Path) -> None:
    check_inside([str(INSIDE), *(f"--ignore={name}" for name in APART)], 40, tmp_path)
