"""A PEFT adapter and its base, merged into a checkpoint of its own to be judged.

``W' = W + s B A`` with ``s = alpha / r`` (``alpha / sqrt(r)`` for rank-stabilised ones), a shard at
a time, in the base's own dtype: what merging and saving leaves.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.checkpoints.file_list import ADAPTER_CONFIG, MAX_CONFIG
from abliterate.errors import CheckpointError, DiskSpaceError
from abliterate.storage.json_text import parse_json

if TYPE_CHECKING:
    from torch import Tensor

    from abliterate.models.loading import Checkpoint

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SIDES = {
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_A.default.weight": ("A", False),
    ".lora_B.default.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
}
_SPARE = 64 << 20  # bytes that stay free


@dataclass
class _Update:
    """The factors of one tensor's update."""

    sides: dict[str, Tensor]
    transposed: bool = False


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not any(
        path.name != WEIGHTS for path in folder.glob("*.safetensors")
    )


def merge_adapter(adapter: Path, name: str, base: Checkpoint, folder: Path) -> Checkpoint:
    """Merge an adapter into a copy of its base.

    Args:
        adapter: its folder.
        name: as the user gave it.
        base: the model that it was made for; it stays as it is.
        folder: an empty one for the merged checkpoint, which takes as much room as the base.

    Raises:
        CheckpointError: the adapter is no LoRA of plain matrices, or does not fit the base.
        DiskSpaceError: the merged checkpoint does not fit.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from abliterate.checkpoints.quantized_formats import find_quantized, read_config
    from abliterate.checkpoints.safetensors_header import DTYPES
    from abliterate.checkpoints.shards import read_shards
    from abliterate.models.loading import Checkpoint as Merged

    config = _read_config(adapter / ADAPTER_CONFIG)
    shards = read_shards(base.folder)
    if find_quantized(shards, read_config(base.folder)):
        raise CheckpointError(
            f"{base.name} is quantized, and an adapter is merged into plain weights: name the "
            "checkpoint that it was quantized from"
        )
    updates = _read_updates(adapter, config, {n: e.shape for n, e in shards.tensors.items()})
    files = {shards.tensors[n].file for n in updates}
    size = sum(path.stat().st_size for path in {e.file for e in shards.tensors.values()})
    if shutil.disk_usage(folder).free < size + _SPARE:
        raise DiskSpaceError(
            f"merging {name} into its base takes {size / 1e9:.1f} GB, which {folder.parent} does "
            "not have: set TMPDIR to a place that does"
        )
    for path in sorted({e.file for e in shards.tensors.values()} - files):
        _link(path, folder / path.name)
    for path in base.folder.iterdir():
        if path.is_file() and path.suffix == ".json":
            shutil.copyfile(path, folder / path.name)
    for own in ("abliterate.json", "README.md"):  # what it says is said of the merged model
        (folder / own).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            shutil.copyfile(adapter / own, folder / own)
    for file in sorted(files):
        tensors = load_file(file)
        for tensor in tensors.keys() & updates.keys():
            value, update = tensors[tensor], updates[tensor]
            if shards.tensors[tensor].dtype not in DTYPES:
                raise CheckpointError(f"tensor '{tensor}' of {base.name} is not stored as floats")
            change = update.sides["B"].double() @ update.sides["A"].double()
            change = change.T if update.transposed else change
            merged = value.double() + _scaling(config, tensor, len(update.sides["A"])) * change
            tensors[tensor] = merged.to(value.dtype).contiguous()
            if not bool(torch.isfinite(tensors[tensor]).all()):
                raise CheckpointError(f"{name} makes tensor '{tensor}' of {base.name} overflow")
        save_file(tensors, folder / file.name, {"format": "pt"})
        del tensors
    return Merged(name, folder)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise ValueError("it is too large")
        config = parse_json(path.read_bytes())
        kind = config["peft_type"]
        unknown = [k for k in ("use_dora", "lora_bias") if config.get(k)]
        if config.get("bias", "none") != "none":
            unknown.append("bias")
        alphas = dict(config.get("alpha_pattern") or {})
        for alpha in (config["lora_alpha"], *alphas.values()):
            float(alpha)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no configuration of a PEFT adapter: {error}") from None
    # PEFT reads such names as regular expressions; a stranger's may run for ever.
    unknown += [f"the pattern {n!r}" for n in alphas if not re.fullmatch(r"[\w.]+", n)]
    if kind != "LORA" or unknown:
        what = f"with {', '.join(unknown)}" if kind == "LORA" else f"of type {kind!r}"
        raise CheckpointError(
            f"{path} is an adapter {what}, which cannot be merged here: merge it first (PEFT's "
            "merge_and_unload, then save_pretrained), and audit what that gives"
        )
    checked: Mapping[str, Any] = config
    return checked


def _read_updates(
    adapter: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, _Update]:
    """The factors, by the base's tensor."""
    from abliterate.storage.artifacts import read_tensors

    path = adapter / WEIGHTS
    if not path.is_file():
        raise CheckpointError(
            f"{adapter} has no {WEIGHTS}: save the adapter as safetensors (pickles are never "
            "opened)"
        )
    updates: dict[str, _Update] = {}
    for key, value in read_tensors(path).items():
        ending = next((e for e in _SIDES if key.endswith(e)), None)
        if ending is None:
            raise CheckpointError(
                f"{path}: tensor '{key}' is no factor of a LoRA: merge the adapter first (PEFT's "
                "merge_and_unload, then save_pretrained), and audit what that gives"
            )
        side, embedding = _SIDES[ending]
        module = key.removesuffix(ending).removeprefix(_PREFIX)
        tensor = _base_tensor(f"{module}.weight", shapes)
        if tensor is None:
            raise CheckpointError(f"{path}: its base has no tensor '{module}.weight'")
        flipped = embedding or bool(config.get("fan_in_fan_out"))
        updates.setdefault(tensor, _Update({}, flipped)).sides[side] = value
    for tensor, update in updates.items():
        a, b = update.sides.get("A"), update.sides.get("B")
        fits = a is not None and b is not None and a.ndim == b.ndim == 2 and len(a) == b.shape[1]
        if not fits or a is None or b is None:
            raise CheckpointError(f"{path}: the factors of '{tensor}' do not fit each other")
        shape = (b.shape[0], a.shape[1])
        if (shape[::-1] if update.transposed else shape) != tuple(shapes[tensor]):
            raise CheckpointError(
                f"{path}: its update of '{tensor}' is {list(shape)}, the base's tensor "
                f"{list(shapes[tensor])}: name the base that it was made for"
            )
    return updates


def _base_tensor(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The tensor of that name, as far as the base's own prefix differs."""
    if name in shapes:
        return name
    near = [n for n in shapes if n.endswith(f".{name}") or name.endswith(f".{n}")]
    return near[0] if len(near) == 1 else None


def _scaling(config: Mapping[str, Any], tensor: str, rank: int) -> float:
    module = tensor.removesuffix(".weight")
    patterns = config.get("alpha_pattern") or {}
    named = [v for n, v in patterns.items() if module == n or module.endswith(f".{n}")]
    alpha = float(named[0] if named else config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
