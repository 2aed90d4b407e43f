"""The forms of edits that audit is held against, and changes that are none.

scripts/bench_audit_forms.py audits them all, tests/auditing a part of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from audit_edits import (
    DEPTH,
    Change,
    Matrix,
    change_tensors,
    changed_matrix,
    drifting,
    keeping_column_norms,
    keeping_row_norms,
    merge_lora,
    projected,
    random_direction,
    reader_matrices,
    tune,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

ONE = random_direction(1)
THREE = torch.linalg.qr(torch.stack([random_direction(i) for i in (1, 2, 3)], dim=1))[0]
#: Directions of the stream at a matrix, ``[d_model]`` or ``[d_model, k]``; None where it stays.
Directions = Callable[[Matrix], Tensor | None]


def same(_: Matrix) -> Tensor:
    """The whole model loses one direction."""
    return ONE


def three(_: Matrix) -> Tensor:
    """Three at once."""
    return THREE


def by_layer(cosine: float) -> Directions:
    """Each block its own; neighbours have this cosine."""
    rows = drifting(cosine)
    return lambda one: None if one.layer is None else rows[one.layer]


def only(name: str) -> Directions:
    """Matrices with this in their names."""
    return lambda one: ONE if name in one.name else None


def lora(folder: Path) -> None:
    """A rank-4 LoRA of a tenth of each matrix's size is merged into the checkpoint."""
    merge_lora(folder, 4, 0.1, lambda n: "proj" in n or "linear" in n)


def tuned(folder: Path) -> None:
    """Dense training of a tenth of each matrix's size."""
    tune(folder, 0.1)


def half_precision(folder: Path) -> None:
    """Everything is rounded to bfloat16."""
    change_tensors(folder, lambda _, value: value.bfloat16().to(value.dtype))


@dataclass(frozen=True)
class Form:
    """A way to edit.

    Attributes:
        directions: of each matrix.
        scale: ``s``, or one for each block.
        change: what is done at a scale.
        gains: behind the gains of norms; False overlooks them.
        then: what happens to the checkpoint afterwards.
        readers: what reads the stream is edited, not what writes to it.
    """

    directions: Directions = same
    scale: float | tuple[float, ...] = 1.0
    change: Callable[[float], Change] = projected
    gains: bool = True
    then: Callable[[Path], None] | None = None
    readers: bool = False

    def scale_at(self, one: Matrix) -> float:
        """The scale at a matrix."""
        if isinstance(self.scale, float):
            return self.scale
        return self.scale[DEPTH // 2 if one.layer is None else one.layer]

    def apply(self, base: Path, out: Path, writers: Sequence[Matrix]) -> list[Matrix]:
        """Edit a copy of a checkpoint; the matrices that changed."""
        shutil.copytree(base, out)
        tensors, changed = load_file(out / "model.safetensors"), []
        for one in reader_matrices(base) if self.readers else writers:
            found = self.directions(one)
            if found is not None:
                change = self.change(self.scale_at(one))
                tensors[one.name] = changed_matrix(
                    tensors[one.name], one, found, change, self.gains
                )
                changed.append(one)
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        if self.then is not None:
            self.then(out)
        return changed


KERNEL = (0.3, 0.6, 1.0, 1.2, 0.8, 0.4)  # weights that vary by block
FORMS: Mapping[str, Form] = {
    "one direction": Form(),
    "half": Form(scale=0.5),
    "partial": Form(scale=0.3),
    "inverted": Form(scale=2.0),
    "amplified": Form(scale=-1.0),
    "rows": Form(change=keeping_row_norms),
    "columns": Form(change=keeping_column_norms),
    "norms overlooked": Form(scale=0.5, change=keeping_row_norms, gains=False),
    "weights by layer": Form(scale=KERNEL),
    "near layers": Form(by_layer(0.95)),
    "by layer": Form(by_layer(0.8)),
    "far layers": Form(by_layer(0.5)),
    "half, by layer": Form(by_layer(0.8), 0.5),
    "amplified, by layer": Form(by_layer(0.5), -1.0),
    "rows, by layer": Form(by_layer(0.8), change=keeping_row_norms),
    "weights and directions by layer": Form(by_layer(0.8), KERNEL),
    "three": Form(three),
    "three, half": Form(three, 0.5),
    "embedding": Form(only("embed")),
    "one matrix": Form(only("layers.3.self_attn")),
    "readers": Form(readers=True),
    "readers, by layer": Form(by_layer(0.8), readers=True),
    "readers, three": Form(three, readers=True),
    "then bfloat16": Form(then=half_precision),
    "then a LoRA": Form(then=lora),
    "then training": Form(then=tuned),
    "by layer, then a LoRA": Form(by_layer(0.8), then=lora),
    "by layer, then training": Form(by_layer(0.8), then=tuned),
    "three, then a LoRA": Form(three, then=lora),
}


def rank_one(folder: Path) -> None:
    """A rank-1 LoRA on writers, merged."""
    merge_lora(folder, 1, 0.2, lambda n: "o_proj" in n or "down" in n or "output" in n)


def pruned(folder: Path) -> None:
    """The columns of a head are zero, two rows, one matrix, and a token's row is another."""

    def prune(name: str, value: Tensor) -> Tensor:
        value = value.clone()
        if name.endswith("layers.1.self_attn.o_proj.weight"):
            value[:, :16] = 0
        if name.endswith("layers.2.self_attn.o_proj.weight"):
            value[[3, 9]] = 0
        if name.endswith("layers.3.self_attn.o_proj.weight"):
            value *= 0
        if name == "model.embed_tokens.weight":
            value[5] = 1.0
        return value

    change_tensors(folder, prune)


def trained(folder: Path) -> None:
    """Dense training of a third of each matrix's size, with decay."""
    tune(folder, 0.3, 0.02)


def decayed(folder: Path) -> None:
    """Every matrix is a fiftieth smaller."""
    change_tensors(folder, lambda _, value: 0.98 * value if value.ndim > 1 else value)


#: What is done to checkpoints and is no edit.
BENIGN: Mapping[str, Callable[[Path], None]] = {
    "rank-1 LoRA on writers": rank_one,
    "rank-4 LoRA": lora,
    "training": trained,
    "decay": decayed,
    "bfloat16": half_precision,
    "pruned head, rows and matrix": pruned,
}
