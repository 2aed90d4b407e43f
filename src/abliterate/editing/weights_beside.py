"""Safetensors files beside the weights: which come along with an edited checkpoint.

A draft head (multi-token prediction, EAGLE, Medusa) lies in a file that the index does not name and
writes to a stream of its own: without it the edited checkpoint would lose what the original has. A
second set of the model's own weights (``consolidated.safetensors``) would still hold the unedited
model. Names tell nothing: what decides is whether a file holds a writer of the edited model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from abliterate.checkpoints.safetensors_header import DTYPES, TensorEntry, read_shard
from abliterate.checkpoints.shards import ShardSet, inside, is_adapter
from abliterate.editing.edit_plan import EditPlan
from abliterate.errors import CheckpointError, UsageError

_SUFFIX = ".safetensors"
_SKIPPED_FOLDERS = {".git", ".cache"}
# Elements that are compared, from the middle: the first rows of an embedding may be all zero.
_SAMPLE = 4096
# The same matrix in another dtype is far above, two matrices of one model far below.
_SAME = 0.9


@dataclass(frozen=True)
class WeightsBeside:
    """The safetensors files beside a checkpoint's shards, by their paths in its folder.

    Attributes:
        kept: those that come along; with how many tensors each holds.
        left: the others, and why.
    """

    kept: Mapping[Path, int]
    left: Mapping[Path, str]


def weights_beside(source: Path, plan: EditPlan, leave_behind: Sequence[str]) -> WeightsBeside:
    """Which of the files beside the shards hold nothing that writes to the edited stream.

    Args:
        source: the checkpoint's folder.
        plan: of the whole edit, before any option: a writer that stays as it was counts too.
        leave_behind: names, or patterns of them, of files that stay behind in any case.

    Raises:
        CheckpointError: one is a link that leaves the checkpoint.
        UsageError: no file has one of the names.
    """
    kept, left = dict[Path, int](), dict[Path, str]()
    writers, named = _Writers(plan), set[str]()
    for path in sorted(source.rglob(f"*{_SUFFIX}")):
        relative = path.relative_to(source)
        own = len(relative.parts) == 1 and relative.name in plan.shards.shards
        if own or is_adapter(path.name) or _SKIPPED_FOLDERS & set(relative.parts):
            continue
        if not inside(source, path).is_file():
            continue
        asked = [name for name in leave_behind if fnmatchcase(relative.as_posix(), name)]
        named.update(asked)
        if asked:
            left[relative] = "as asked"
            continue
        try:
            tensors = read_shard(path).tensors
        except CheckpointError:
            left[relative] = "its header cannot be read"
            continue
        reason = writers.found_in(tensors)
        if reason is None:
            kept[relative] = len(tensors)
        else:
            left[relative] = reason
    for name in leave_behind:
        if name not in named and name != "*":
            raise UsageError(
                f"--leave-behind {name}: {source} holds no safetensors file of that name beside "
                "its weights"
            )
    return WeightsBeside(kept, left)


class _Writers:
    """The source's tensors that write to the stream, to look for in other files."""

    def __init__(self, plan: EditPlan) -> None:
        self._shards: ShardSet = plan.shards
        sources = dict.fromkeys(edit.source for edit in (*plan.edits, *plan.heads))
        self._entries = {name: plan.shards.tensors[name] for name in sources}
        self._samples: dict[str, Tensor | None] = {}

    def found_in(self, tensors: Mapping[str, TensorEntry]) -> str | None:
        """Why a file is no stranger to the stream; None if it is one."""
        for name in tensors:
            if name in self._shards.tensors:
                return f"it holds '{_short(name)}' too"
        shapes = Counter(_shape(entry) for entry in self._entries.values() if len(entry.shape) > 1)
        if shapes and shapes <= Counter(map(_shape, tensors.values())):
            return "it has a matrix of the shape of every writer, as a second set of weights would"
        for name, entry in tensors.items():
            for writer, mine in self._entries.items():
                if mine.shape == entry.shape and self._same(writer, mine, entry):
                    return f"its '{_short(name)}' is the model's '{_short(writer)}'"
        return None

    def _same(self, writer: str, mine: TensorEntry, other: TensorEntry) -> bool:
        if writer not in self._samples:
            self._samples[writer] = _sample(mine)
        one, two = self._samples[writer], _sample(other)
        if one is None or two is None:
            return True  # it cannot be told: as if they were
        norms = float(one.norm() * two.norm())
        return norms > 0 and abs(float(one @ two)) > _SAME * norms


def _shape(entry: TensorEntry) -> tuple[int, ...]:
    """In order of size: other libraries store a matrix the other way round."""
    return tuple(sorted(entry.shape))


def _sample(entry: TensorEntry) -> Tensor | None:
    """Values from the middle of a tensor; None if they cannot be read as floats."""
    if entry.dtype not in DTYPES or not entry.file.is_file():
        return None
    kind = DTYPES[entry.dtype]
    count = (entry.end - entry.start) // kind.itemsize
    taken = min(count, _SAMPLE)
    with entry.file.open("rb") as file:
        file.seek(entry.start + (count - taken) // 2 * kind.itemsize)
        raw = bytearray(file.read(taken * kind.itemsize))
    return torch.frombuffer(raw, dtype=kind).double() if raw else torch.zeros(0).double()


def _short(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:77]}..."
