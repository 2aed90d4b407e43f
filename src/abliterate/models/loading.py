"""Loading a model and its tokenizer from a checkpoint, onto which device and in which dtype."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from abliterate.checkpoints.checkpoint import Checkpoint as Checkpoint  # also given from here
from abliterate.checkpoints.checkpoint import find_checkpoint as find_checkpoint
from abliterate.checkpoints.config_sizes import Held, check_counts, check_sizes
from abliterate.checkpoints.file_list import ADAPTER_CONFIG, adapter_base, check_files
from abliterate.checkpoints.hub import read_remote_shards
from abliterate.checkpoints.safetensors_header import read_shard
from abliterate.checkpoints.shards import (
    INDEX,
    ShardSet,
    check_unchanged,
    inside,
    read_index,
    read_shards,
    shard_names,
    weight_files,
)
from abliterate.console import bars_hidden, log
from abliterate.distributed.rank_group import ALONE, RankGroup
from abliterate.errors import (
    CheckpointError,
    FetchError,
    UnsupportedArchitectureError,
    UsageError,
    one_line,
)
from abliterate.models.attention import attention_failure, attention_options
from abliterate.models.bounded_build import TooLargeError, bounded_build
from abliterate.models.device_placement import (
    Placement,
    check_plan,
    own_device,
    reachable_device,
)
from abliterate.models.embedding_rows import remember_tokenizer
from abliterate.models.library_versions import adapter_options, even_out_widened
from abliterate.models.model_classes import model_class, size_bounds, text_config, too_large
from abliterate.models.quantized_loading import (
    check_products,
    check_widened,
    is_quantized,
    loading_failure,
    quantizer_options,
    stored_method,
)
from abliterate.precision import has_float64, widest
from abliterate.prompts.template_process import start_rendering

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with its tokenizer and the checkpoint they came from.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        checkpoint: where both came from.
        ranks: the processes that share the work with it.
        engine: what runs it (``abliterate.inference.engine.Engine``) where it was opened in another
            way than into memory; ``model`` may then have no weights of its own.
    """

    model: PreTrainedModel
    tokenizer: Any
    checkpoint: Checkpoint
    ranks: RankGroup = ALONE
    engine: Any = None

    def __post_init__(self) -> None:
        remember_tokenizer(self.model, self.tokenizer)


# The name that the library's users know.
Loaded = LoadedModel


def pick_device(device: str) -> torch.device:
    """``auto`` is the machine's accelerator if it has one, else the CPU.

    Raises:
        UsageError: torch does not know the device or cannot reach it.
    """
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return own_device(accelerator) if accelerator is not None else torch.device("cpu")
    chosen = own_device(reachable_device(device, f"--device {device}"))
    if chosen.type == "meta":
        raise UsageError(f"--device {device} holds no weights: nothing can be computed there")
    return chosen


def pick_dtype(
    dtype: str, config: Any, folder: Path, device: torch.device, copies: int = 1
) -> torch.dtype:
    """``auto`` is the checkpoint's own dtype, but float32 on a CPU with room for it.

    CPUs compute half precision slowly or not at all; room means that the float32 weights, in as
    many copies as processes of this machine load, take at most half of the memory that is
    available now.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UsageError(f"--dtype must be auto or one of {', '.join(DTYPES)}, not '{dtype}'")
        if dtype == "float64" and not has_float64(device):
            raise UsageError(f"--dtype float64: {device.type} has no float64: use float32")
        return DTYPES[dtype]
    stored = getattr(config, "dtype", None) or torch.float32
    if isinstance(stored, str):
        stored = getattr(torch, stored)
    if stored == torch.float64:
        stored = widest(device)
    if device.type != "cpu" or stored in (torch.float32, torch.float64):
        return stored
    import psutil

    size = sum((folder / name).stat().st_size for name in weight_files(folder))
    needed = 2 * size * copies
    return torch.float32 if needed <= psutil.virtual_memory().available / 2 else stored


def load_config(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """The checkpoint's configuration.

    Raises:
        CheckpointError: it is damaged, or needs remote code that was not trusted, or the tensors
            that lie with it are damaged or those of another model.
        UnsupportedArchitectureError: the installed transformers does not know the model type.
    """
    shards = present_shards(checkpoint)
    if shards is not None:
        held: Held | None = Held.of(shards)
    else:
        index = checkpoint.folder / INDEX
        listed = read_index(index)["weight_map"] if os.path.lexists(index) else None
        held = None if listed is None else Held(dict.fromkeys(listed))
    check_counts(checkpoint.folder, held)
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _loading_error(checkpoint, error) from None
    check_sizes(checkpoint.folder, text_config(config), held)
    return config


def present_shards(checkpoint: Checkpoint) -> ShardSet | None:
    """The tensors that lie with a configuration, their headers and index checked.

    None where a shard is missing, as beside a configuration that was fetched alone: who needs the
    weights finds out which.

    Raises:
        CheckpointError: a header or the index is damaged, or they disagree.
    """
    present = weight_files(checkpoint.folder)
    if checkpoint.remote is not None or not present:
        return None
    names, _ = shard_names(checkpoint.folder, present)
    return read_shards(checkpoint.folder) if set(names) <= set(present) else None


def known_shards(checkpoint: Checkpoint) -> ShardSet | None:
    """The same, or the headers of shards that lie on the hub, if it gives parts of files."""
    if checkpoint.remote is None:
        return present_shards(checkpoint)
    try:
        return read_remote_shards(checkpoint.folder, checkpoint.remote)
    except FetchError as error:
        log.warning("%s: going by config.json alone", error)
        return None


def load_tokenizer(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer; raises as :func:`load_config` does."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            checkpoint.folder, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise _loading_error(checkpoint, error, "tokenizer of ") from None
    if getattr(tokenizer, "chat_template", None):
        start_rendering()
    return tokenizer


def load_model(
    checkpoint: Checkpoint | str,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    placement: Placement | None = None,
    load_in: str = "none",
    attn_implementation: str = "auto",
) -> LoadedModel:
    """Load model and tokenizer for inference, from safetensors only.

    Args:
        checkpoint: the checkpoint, a folder or a hub id.
        device: ``auto`` or a torch device, where ``placement`` names none.
        dtype: ``auto`` or the name of a dtype.
        trust_remote_code: the checkpoint's own code may run.
        placement: over which devices and ranks the model is spread; None for one device.
        load_in: ``8bit`` or ``4bit`` holds its matrices so (bitsandbytes); the files stay.
        attn_implementation: which of transformers' ways to compute attention; ``auto`` is its own
            choice.

    Raises:
        CheckpointError: files are missing, damaged or in another format, or a parameter has no
            tensor on disk (transformers would fill it with random numbers), or the checkpoint is
            quantised in a way that cannot be loaded here.
        UnsupportedArchitectureError: the installed transformers does not know the model type.
        UsageError: device, dtype, ``load_in`` or ``attn_implementation`` cannot be used.

    Source:
        No part of the paper; :func:`abliterate.load` does the same and more.

    Examples:
        >>> ab.load_model(M, device="cpu").model.config.model_type
        'llama'
    """
    if isinstance(checkpoint, str):
        checkpoint = find_checkpoint(checkpoint)
    placement = placement or Placement()
    model = load_weights(
        checkpoint, device, dtype, trust_remote_code, placement, load_in, attn_implementation
    )
    tokenizer = load_tokenizer(checkpoint, trust_remote_code)
    return LoadedModel(model, tokenizer, checkpoint, placement.ranks)


def load_weights(
    checkpoint: Checkpoint,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    placement: Placement | None = None,
    load_in: str = "none",
    attn_implementation: str = "auto",
    classifies: bool = False,
) -> PreTrainedModel:
    """The model alone, as :func:`load_model` loads it; or, told so, a classifier of texts."""
    placement = placement or Placement()
    ranks = placement.ranks
    place = pick_device(device)
    if bars_hidden():
        transformers.utils.logging.disable_progress_bar()
    config = load_config(checkpoint, trust_remote_code)
    shards = _read_headers(checkpoint, config)
    is_stored_small = stored_method(config) is not None
    check_plan(text_config(config), ranks, placement)
    copies = 1 if placement.is_spread else ranks.on_this_machine
    # What memory is free now differs from rank to rank; the dtype must not.
    number = ranks.broadcast(pick_dtype(dtype, config, checkpoint.folder, place, copies))
    model, info = _from_pretrained(
        AutoModelForSequenceClassification if classifies else model_class(config),
        checkpoint,
        config,
        shards,
        placement,
        load_in,
        attn_implementation,
        dtype=number,
        trust_remote_code=trust_remote_code,
        **attention_options(attn_implementation, config),
        **quantizer_options(load_in, checkpoint, config, number, place, placement),
    )
    check_unchanged(shards)
    absent = sorted(info["missing_keys"]) or sorted(map(name_of, info["mismatched_keys"]))
    if absent:
        raise incomplete(checkpoint, absent)
    if is_stored_small:
        check_widened(model, checkpoint, shards)
        if not is_quantized(model):
            even_out_widened(model, number)
    check_products(model, load_in, checkpoint, config, next(model.parameters()).device)
    placed = placement.is_spread or is_quantized(model)
    return cast(PreTrainedModel, (model if placed else model.to(place)).eval())


def _read_headers(checkpoint: Checkpoint, config: Any) -> ShardSet:
    """The checkpoint's shards, and a look into what else the library would read for weights."""
    require_safetensors(checkpoint)
    shards = read_shards(checkpoint.folder)
    for name in getattr(type(config), "extra_files", ()):
        if os.path.lexists(checkpoint.folder / name):
            read_shard(inside(checkpoint.folder, checkpoint.folder / name))
    return shards


def _from_pretrained(
    kind: Any,
    checkpoint: Checkpoint,
    config: Any,
    shards: ShardSet,
    placement: Placement,
    load_in: str,
    attention: str,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """The model as the library loads it, and what it says of the loading."""
    try:
        with bounded_build(*size_bounds(config, shards)):
            model, info = kind.from_pretrained(
                checkpoint.folder,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                **adapter_options(checkpoint.folder),
                **placement.loading_options(),
                **options,
            )
    except TooLargeError as error:
        raise too_large(config, error, shards) from None
    except Exception as error:
        failure = loading_failure(load_in, checkpoint, config, error)
        failure = failure or attention_failure(attention, error)
        raise failure or _loading_error(checkpoint, error) from None
    return model, info


def name_of(mismatched: Any) -> str:
    """The parameter of an entry of the library's ``mismatched_keys``: it, or it and two shapes."""
    return str(mismatched[0] if isinstance(mismatched, tuple) else mismatched)


def incomplete(checkpoint: Checkpoint, parameters: Sequence[str]) -> CheckpointError:
    """The error about parameters that have no tensor on disk."""
    more = f" and {len(parameters) - 1} more" if len(parameters) > 1 else ""
    return CheckpointError(
        f"{checkpoint.folder} lacks a usable tensor for parameter '{parameters[0]}'{more}: the "
        "checkpoint is incomplete"
    )


def require_safetensors(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose weights are not safetensors, saying how to convert them."""
    if checkpoint.remote is None:
        folder = checkpoint.folder
        names = [path.name for path in folder.iterdir()]
        check_files(str(folder), names, lambda: adapter_base(folder / ADAPTER_CONFIG))


def _loading_error(checkpoint: Checkpoint, error: Exception, what: str = "") -> CheckpointError:
    text = one_line(error)
    if "trust_remote_code" in text:
        return CheckpointError(
            f"{what}{checkpoint.name} needs code from its repository: pass --trust-remote-code if "
            "you have read and trust it"
        )
    if "does not recognize this architecture" in text or "Unrecognized configuration" in text:
        kind = text.split("`")[1] if "`" in text else "its model type"
        return UnsupportedArchitectureError(
            f"{what}{checkpoint.name}: the installed transformers does not know '{kind}': "
            "upgrade transformers"
        )
    if absent := re.search(r"module 'torch' has no attribute '(\w+)'", text):
        text = f"its config.json names the dtype {absent[1]}, which torch does not have"
    if "ignore_mismatched_sizes" in text:
        text = "its tensors have other shapes than its config.json says"
    short = text[:300] or type(error).__name__
    return CheckpointError(f"{what}{checkpoint.name} cannot be loaded: {short}")
