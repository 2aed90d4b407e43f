"""The command line as one rank of several, which dies at a given moment: ``ranks.py HOW ARG...``.

HOW is ``RANK:MOMENT`` or ``none``; MOMENT is ``write`` (before its first shard), ``finish`` (once
it has one) or ``nan`` (its first shard seems to hold one).
"""

from __future__ import annotations

import os
import signal
import sys

from abliterate.cli.app import main
from abliterate.editing import orthogonalize
from abliterate.editing.workspace import Workspace
from abliterate.errors import CheckpointError

how, arguments = sys.argv[1], sys.argv[2:]
if how != "none" and how.split(":")[0] == os.environ["RANK"]:
    moment = how.split(":")[1]
    write, finish = orthogonalize.write_shards, Workspace.finish

    def die(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def finish_and_die(self: Workspace, *args: object) -> None:
        finish(self, *args)  # type: ignore[arg-type]
        die()

    def find_nan(*args: object) -> None:
        raise CheckpointError("tensor 'x' in y.safetensors holds NaN or infinity")

    if moment == "finish":
        Workspace.finish = finish_and_die  # type: ignore[method-assign, assignment]
    else:
        orthogonalize.write_shards = die if moment == "write" else find_nan  # type: ignore[assignment]
sys.exit(main(arguments))
