"""Opening a checkpoint for streaming, and whether what is free calls for it."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import PreTrainedModel

from abliterate.console import log
from abliterate.errors import CheckpointError, UnsupportedArchitectureError
from abliterate.inference.forward import can_pad, stand_in
from abliterate.models.attention import attention_options
from abliterate.models.loading import (
    Checkpoint,
    LoadedModel,
    find_checkpoint,
    load_config,
    load_tokenizer,
    pick_device,
    pick_dtype,
    require_safetensors,
)
from abliterate.offload.engine import OffloadedEngine
from abliterate.offload.layer_streaming import RESIDENT, OffloadedModel
from abliterate.offload.weights import Weights
from abliterate.writers.tiny_model import ShrinkError, shrunken

#: What activations may take unless ``--activation-memory`` says otherwise: half of what is free.
ACTIVATION_SHARE = 0.5


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device: of an accelerator its own, of a CPU the machine's, or what
    a control group still allows. Apple's GPU has the machine's memory, up to a limit of its own."""
    import psutil

    free = min(int(psutil.virtual_memory().available), _group_limit())
    if device.type == "mps":
        most = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return min(free, max(0, most))
    if device.type != "cpu":
        # As every accelerator's module of torch calls it; not all have it.
        info = getattr(torch.get_device_module(device), "mem_get_info", None)
        return free if info is None else int(info(device)[0])
    return free


def _group_limit() -> int:
    """What the control groups of this process may still take, as far as they say so."""
    left = 1 << 62
    for folder, version in _groups():
        limit, usage = (
            ("memory.max", "memory.current")
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        )
        try:
            most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
            cached = [
                int(line.split()[1])
                for line in (folder / "memory.stat").read_text().splitlines()
                if line.startswith(("inactive_file ", "active_file "))
            ]
        except (OSError, ValueError):
            continue
        left = min(left, max(0, most - used + sum(cached)))
    return left


def _groups() -> list[tuple[Path, int]]:
    """The folders of this process's memory groups and their version; in a container, the root's."""
    top = Path("/sys/fs/cgroup")
    found = [(top, 2), (top / "memory", 1)]
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            found.append((top / path.lstrip("/"), 2))
        elif "memory" in controllers.split(","):
            found.append((top / "memory" / path.lstrip("/"), 1))
    return found


# A matrix of a decoder block: what bitsandbytes makes small. Embeddings and head stay as they are.
_BLOCK_MATRIX = re.compile(r"\.\d+\..*\.weight$")
# Bytes of a number, with the share of its row's or block's scale.
_SMALL = {"8bit": 1.01, "4bit": 0.5625}


def needed_memory(checkpoint: Checkpoint, dtype: torch.dtype, load_in: str = "none") -> int:
    """Bytes of a checkpoint's weights in memory, from the headers of its files."""
    from abliterate.checkpoints.safetensors_header import BITS, TensorEntry
    from abliterate.checkpoints.shards import read_shards

    def size(entry: TensorEntry) -> float:
        if not entry.dtype.startswith(("F", "BF")):
            return entry.end - entry.start
        numbers = (entry.end - entry.start) * 8 // BITS[entry.dtype]
        is_small = len(entry.shape) == 2 and _BLOCK_MATRIX.search(entry.name)
        each = _SMALL.get(load_in, dtype.itemsize) if is_small else dtype.itemsize
        return numbers * each

    return int(sum(map(size, read_shards(checkpoint.folder).tensors.values())))


def must_stream(
    checkpoint: Checkpoint, device: str, dtype: str, trust_remote_code: bool = False
) -> bool:
    """Whether the weights do not fit into what is free; says so in the log."""
    lacking = too_large(checkpoint, device, dtype, trust_remote_code)
    if lacking is None:
        return False
    log.info("%s: its layers are streamed from disk (--offload)", lacking)
    return True


def too_large(
    checkpoint: Checkpoint,
    device: str,
    dtype: str,
    trust_remote_code: bool = False,
    load_in: str = "none",
) -> str | None:
    """What is lacking for the weights in memory, in words; None if they fit."""
    place = pick_device(device)
    config = load_config(checkpoint, trust_remote_code)
    require_safetensors(checkpoint)
    if getattr(config, "quantization_config", None):
        return None
    number = pick_dtype(dtype, config, checkpoint.folder, place)
    need = needed_memory(checkpoint, number, load_in)
    free = free_memory(place)
    if need <= 0.9 * free:
        return None
    return (
        f"{checkpoint.name} takes {need / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB of "
        f"{place.type} is free"
    )


def open_stream(
    checkpoint: Checkpoint | str,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    activation_memory: int | None = None,
    resident: int = RESIDENT,
    attn_implementation: str = "auto",
) -> LoadedModel:
    """A model that is read block by block while it runs; the tokenizer as usual.

    Args:
        checkpoint: safetensors, in a float dtype.
        device: where to compute.
        dtype: of the computation; ``auto`` is float32 on a CPU, else the checkpoint's own.
        trust_remote_code: run the code that comes with the checkpoint.
        activation_memory: bytes of memory for activations; the rest goes to mapped files in the
            folder for temporary files. None: half of what is free.
        resident: embeddings and projections up to this many bytes are kept in memory.
        attn_implementation: which of transformers' ways to compute attention.

    Raises:
        CheckpointError: files are missing, damaged, quantised or in another format.
        UnsupportedArchitectureError: the architecture cannot be streamed.
    """
    if isinstance(checkpoint, str):
        checkpoint = find_checkpoint(checkpoint)
    place = pick_device(device)
    config = load_config(checkpoint, trust_remote_code)
    require_safetensors(checkpoint)
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"{checkpoint.name} is quantised, which --offload cannot run: use --no-offload, or the "
            "checkpoint that it was made from"
        )
    if dtype == "auto" and place.type == "cpu":
        dtype = "float32"  # a block of it always fits, and CPUs are slow in half precision
    number = pick_dtype(dtype, config, checkpoint.folder, place)
    free = free_memory(torch.device("cpu"))
    budget = activation_memory or int(ACTIVATION_SHARE * free)
    attention = attention_options(attn_implementation, config)
    weights = Weights(checkpoint, config, number, place, trust_remote_code, attention)
    files = {entry.file for entry in weights.mapped.entries.values()}
    weights.mapped.transient = sum(file.stat().st_size for file in files) > free - budget
    try:
        stand_in(weights.model, place, _can_pad(weights.model))
        stream = OffloadedModel(weights, budget, resident=resident)
    except BaseException:
        weights.mapped.close()
        raise
    tokenizer = load_tokenizer(checkpoint, trust_remote_code)
    engine = OffloadedEngine(stream, checkpoint.name)
    return LoadedModel(weights.model, tokenizer, checkpoint, engine=engine)


def _can_pad(model: PreTrainedModel) -> bool:
    """Tried on a small random copy of the architecture, as the model itself has no weights yet.

    A text decoder inside a vision-language model has masks and positions of the whole, which the
    copy does not show.
    """
    try:
        copy = shrunken(model.config)
    except ShrinkError as error:
        raise UnsupportedArchitectureError(
            f"architecture '{model.config.model_type}' cannot be streamed ({error}): use "
            "--no-offload"
        ) from None
    return type(copy) is type(model) and can_pad(copy)
