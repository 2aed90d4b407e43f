"""Running commands on the emulated device, or on the real one that REAL_ACCELERATOR names."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from abliterate import precision
from abliterate.cli.app import main
from abliterate.resources import demo_model_dir

REAL = os.environ.get("REAL_ACCELERATOR", "")
if not REAL:  # where there is a real one, no other is registered
    import accelerator
NAME = REAL or accelerator.NAME
MODEL = str(demo_model_dir())
# At these sizes the demo model still has a clear winner.
TRAIN = ("--n-train", "16", "--positions", "-2,-1", "--dtype", "float32", "-q")
VAL = ("--n-val", "8", "--dtype", "float32", "-q")


def on_device(*args: str | Path, code: int = 0, **kind: Any) -> accelerator.State | None:
    """Run a command on the device; gives what was counted, None on a real one.

    Args:
        args: the command line.
        code: the exit code that it has to end with.
        kind: of :func:`accelerator.accelerator`.
    """
    if REAL:
        assert main([str(arg) for arg in args]) == code
        return None
    precision._computes_float64.cache_clear()  # the device of this name is another one now
    with accelerator.accelerator(**kind) as state:
        precision.has_float64(torch.device("emu"))  # tried once a process; of CUDA it is known
        state.waits.clear()
        assert main([str(arg) for arg in args]) == code
    return accelerator.snapshot(state)


def on_host(*args: str | Path, code: int = 0) -> None:
    """Run it on the CPU."""
    assert main([*map(str, args), "--device", "cpu"]) == code


def check_same(ours: Any, theirs: Any, tolerance: float = 1e-4) -> None:
    """Nested figures are the same, numbers to so much, absolute or relative."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            check_same(ours[key], value, tolerance)
    elif isinstance(theirs, list):
        for one, other in zip(ours, theirs, strict=True):
            check_same(one, other, tolerance)
    elif isinstance(theirs, float):
        assert math.isclose(ours, theirs, rel_tol=tolerance, abs_tol=tolerance), (ours, theirs)
    else:
        assert ours == theirs
