"""Small structured checkpoints, and what people do to them, each written as the mathematics."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from abliterate.editing.edit_plan import make_plan
from abliterate.models.loading import find_checkpoint

WIDTH, DEPTH, VOCABULARY = 64, 6, 200
READERS = (
    "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "input_linear", "router", "c_fc",
)  # fmt: skip

_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": DEPTH,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 112,
    "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "llama": {},  # dense
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},  # a norm behind every writer
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},  # experts in one tensor
}
#: Those, a norm behind every writer and none before, norms of queries, and LayerNorm with biases.
ARCHITECTURES = (*KINDS, "olmo2", "qwen3", "starcoder2")


@dataclass(frozen=True)
class Matrix:
    """A writer: where it lies, and the gain behind it up to a factor (ones where none is)."""

    name: str
    axis: int
    layer: int | None
    gain: Tensor


@torch.no_grad()
def make_checkpoint(kind: str, folder: Path, seed: int = 0) -> list[Matrix]:
    """Random weights whose spectra fall and whose norms have gains of their own; its writers."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **_COMMON, **KINDS.get(kind, {})), dtype=torch.float32
    )
    for value in model.parameters():
        if value.ndim == 1:
            value.add_(0.4 * torch.randn(value.shape, generator=generator))
        else:
            falling = torch.arange(1, value.shape[-1] + 1) ** -0.5
            basis = torch.linalg.qr(torch.randn(*[value.shape[-1]] * 2, generator=generator))[0]
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(0.05 * (noise * falling) @ basis)
    model.save_pretrained(folder)
    plan = make_plan(find_checkpoint(str(folder)), torch.ones(WIDTH, dtype=torch.float64))
    return [Matrix(e.name, e.axis, e.layer, e.basis[0]) for e in plan.edits]


def random_direction(seed: int, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    drawn = torch.randn(width, generator=generator, dtype=torch.float64)
    return drawn / drawn.norm()


def drifting(cosine: float, depth: int = DEPTH) -> list[Tensor]:
    """A direction for each layer; neighbours have this cosine."""
    found = [random_direction(50)]
    for layer in range(1, depth):
        step = random_direction(50 + layer)
        step = step - (step @ found[-1]) * found[-1]
        found.append(cosine * found[-1] + (1 - cosine**2) ** 0.5 * step / step.norm())
    return found


#: New values of a matrix ``[d_model, columns]``, given its unit directions ``[d_model, k]``.
Change = Callable[[Tensor, Tensor], Tensor]


def projected(scale: float = 1.0) -> Change:
    """``W - s U U^T W``: 1 removes, 0.5 halves, 2 inverts, -1 amplifies."""
    return lambda w, u: w - scale * u @ (u.T @ w)


def keeping_row_norms(scale: float = 1.0) -> Change:
    """The same, and each row as long as it was."""

    def change(w: Tensor, u: Tensor) -> Tensor:
        new = projected(scale)(w, u)
        return new * (w.norm(dim=1, keepdim=True) / new.norm(dim=1, keepdim=True).clamp(min=1e-30))

    return change


def keeping_column_norms(scale: float = 1.0) -> Change:
    """The same, and each column as long as it was."""

    def change(w: Tensor, u: Tensor) -> Tensor:
        new = projected(scale)(w, u)
        return new * (w.norm(dim=0, keepdim=True) / new.norm(dim=0, keepdim=True).clamp(min=1e-30))

    return change


def edit_matrices(
    source: Path,
    out: Path,
    matrices: Sequence[Matrix],
    directions: Callable[[Matrix], Tensor | None],
    change: Change,
    gains: bool = True,
) -> list[str]:
    """Copy a checkpoint and change some matrices.

    Args:
        source: the checkpoint.
        out: where to.
        matrices: those that may change.
        directions: the stream's, ``[d_model]`` or ``[d_model, k]``, for each; None leaves it.
        change: what is done.
        gains: with the directions as they are behind the gains; False overlooks the norms.

    Returns:
        Names of the tensors that changed.
    """
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    changed = []
    for one in matrices:
        found = directions(one)
        if found is None:
            continue
        tensors[one.name] = changed_matrix(tensors[one.name], one, found, change, gains)
        changed.append(one.name)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return changed


def changed_matrix(
    value: Tensor, one: Matrix, directions: Tensor, change: Change, gains: bool
) -> Tensor:
    """A tensor after a change along the stream's directions, ``[d_model]`` or ``[d_model, k]``."""
    columns = directions.reshape(len(directions), -1)
    here = torch.linalg.qr(one.gain.unsqueeze(1) * columns if gains else columns)[0]
    moved = value.double().movedim(one.axis, 0)
    new = change(moved.reshape(len(moved), -1), here).reshape(moved.shape)
    return new.movedim(0, one.axis).to(value.dtype).contiguous()


def reader_matrices(source: Path) -> list[Matrix]:
    """What reads the stream behind a norm: q, k, v, gate and up, experts' too."""
    ones = torch.ones(WIDTH, dtype=torch.float64)
    return [
        Matrix(name, value.ndim - 1, int(name.split("layers.")[1].split(".")[0]), ones)
        for name, value in load_file(source / "model.safetensors").items()
        if value.ndim > 1 and any(f".{part}." in name for part in READERS)
    ]


def change_tensors(folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    """Change every tensor of a checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    new = {name: change(name, value).contiguous() for name, value in tensors.items()}
    save_file(new, folder / "model.safetensors", {"format": "pt"})


def merge_lora(folder: Path, rank: int, size: float, names: Callable[[str], bool]) -> None:
    """Merge a random LoRA of this size, relative to each matrix, into a checkpoint."""
    generator = torch.Generator().manual_seed(9)

    def merged(name: str, value: Tensor) -> Tensor:
        if value.ndim < 2 or not names(name):
            return value
        up = torch.randn(*value.shape[:-1], rank, generator=generator)
        down = torch.randn(*value.shape[:-2], rank, value.shape[-1], generator=generator)
        update = up @ down
        return value + size * float(value.norm()) * update / float(update.norm())

    change_tensors(folder, merged)


def tune(folder: Path, size: float, decay: float = 0.001) -> None:
    """Dense updates of falling spectra and weight decay, as full fine-tuning leaves them."""
    generator = torch.Generator().manual_seed(8)

    def tuned(_: str, value: Tensor) -> Tensor:
        if value.ndim < 2:
            return value
        falling = torch.arange(1, value.shape[-1] + 1) ** -1.0
        noise = torch.randn(value.shape, generator=generator) * falling
        turn = torch.linalg.qr(torch.randn(*[value.shape[-1]] * 2, generator=generator))[0]
        update = noise @ turn
        return (1 - decay) * value + size * float(value.norm()) * update / float(update.norm())

    change_tensors(folder, tuned)


def rescale_channels(folder: Path, matrices: Sequence[Matrix]) -> None:
    """What each channel is written with moves to its readers, as scales are moved for rounding."""
    generator = torch.Generator().manual_seed(7)
    factors = torch.exp(0.2 * torch.randn(WIDTH, generator=generator))
    axes = {one.name: (one.axis, 1.0) for one in matrices}
    axes |= {one.name: (one.axis, -1.0) for one in reader_matrices(folder)}

    def rescaled(name: str, value: Tensor) -> Tensor:
        if name not in axes:
            return value
        axis, power = axes[name]
        return (value.movedim(axis, -1) * factors**power).movedim(-1, axis)

    change_tensors(folder, rescaled)


def decay_with_common_output(folder: Path, matrices: Sequence[Matrix], scale: float) -> Path:
    """All writers put most of their energy out along one direction; a copy has all scaled down."""
    common = random_direction(77)
    for name in ("strong", "decayed"):
        shutil.copytree(folder, folder.parent / name)
    strong, decayed = folder.parent / "strong", folder.parent / "decayed"
    axes = {one.name: one.axis for one in matrices}

    def stronger(name: str, value: Tensor) -> Tensor:
        if name not in axes:
            return value
        moved = value.double().movedim(axes[name], 0)
        flat = moved.reshape(len(moved), -1)
        flat = flat + 30 * torch.outer(common, common @ flat)
        return flat.reshape(moved.shape).movedim(0, axes[name]).to(value.dtype)

    change_tensors(strong, stronger)
    change_tensors(decayed, stronger)
    change_tensors(decayed, lambda n, v: v * scale if n in axes else v)
    return strong


def truncate(folder: Path, matrices: Sequence[Matrix], share: float) -> None:
    """Each of these matrices is replaced by its best approximation of this share of its rank."""
    names = {one.name for one in matrices}

    def cut(name: str, value: Tensor) -> Tensor:
        if name not in names or value.ndim < 2:
            return value
        # Of a stack each matrix by itself.
        left, values, right = torch.linalg.svd(value.double(), full_matrices=False)
        kept = round(share * values.shape[-1])
        new = left[..., :kept] * values[..., None, :kept] @ right[..., :kept, :]
        return new.to(value.dtype)

    change_tensors(folder, cut)
