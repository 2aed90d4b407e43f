"""Getting at a model: a local folder or a hub id, its tokenizer, its decoder blocks."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)

from abliterate.checkpoints.checkpoint import Checkpoint as Checkpoint  # also given from here
from abliterate.checkpoints.checkpoint import find_checkpoint as find_checkpoint
from abliterate.checkpoints.config_sizes import (
    CONFIG,
    NUMBERS,
    TENSORS,
    Held,
    check_counts,
    check_sizes,
)
from abliterate.checkpoints.hub import check_files
from abliterate.checkpoints.shards import (
    INDEX,
    ShardSet,
    check_unchanged,
    inside,
    read_index,
    read_shard,
    read_shards,
    shard_names,
    weight_files,
)
from abliterate.console import bars_hidden
from abliterate.distributed.rank_group import ALONE, RankGroup
from abliterate.errors import CheckpointError, UnsupportedArchitectureError, UsageError
from abliterate.models.bounded_build import TooLargeError, bounded_build
from abliterate.models.device_placement import (
    Placement,
    check_plan,
    own_device,
    reachable_device,
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
        if isinstance(self.model, PreTrainedModel):
            _tokenizers[self.model] = self.tokenizer


# The name that the library's users know.
Loaded = LoadedModel

# Names tokens in errors, where a model is at hand without its tokenizer.
_tokenizers: WeakKeyDictionary[PreTrainedModel, Any] = WeakKeyDictionary()


def embedding_rows(model: Any) -> int | None:
    """How many token ids a model's embedding knows; None where that cannot be said."""
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    if rows is None:
        rows = next(iter(getattr(getattr(embedding, "weight", None), "shape", ())), None)
    if not isinstance(rows, int):
        return None
    said = getattr(text_config(model), "vocab_size", None)  # where ranks hold parts of it
    return max(rows, said) if isinstance(said, int) else rows


def require_token(model: Any, token: int, where: str) -> None:
    """Refuse a token for which the embedding has no row.

    A tokenizer often has more tokens than that: it matters only once one is fed to the model.

    Args:
        model: the model.
        token: its id.
        where: what it occurs in, in words.

    Raises:
        CheckpointError: there is no row.
    """
    rows = embedding_rows(model)
    if rows is None or token < rows:
        return
    tokenizer = _tokenizers.get(model) if isinstance(model, PreTrainedModel) else None
    name, size = "", ""
    if tokenizer is not None:
        name = f" {tokenizer.convert_ids_to_tokens(token)!r}"
        size = f", the tokenizer {len(tokenizer):,} tokens"
    raise CheckpointError(
        f"token{name} (id {token}) of {where} has no row in the embedding of "
        f"{getattr(model, 'name_or_path', '') or 'the model'}, which has {rows:,} rows{size}: give "
        "a tokenizer and chat template that belong to the model"
    )


def pick_device(device: str) -> torch.device:
    """``auto`` is the machine's accelerator if it has one, else the CPU.

    Raises:
        UsageError: torch does not know the device or cannot reach it.
    """
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return own_device(found) if found is not None else torch.device("cpu")
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
    own = getattr(config, "dtype", None) or torch.float32
    if isinstance(own, str):
        own = getattr(torch, own)
    if own == torch.float64:
        own = widest(device)
    if device.type != "cpu" or own in (torch.float32, torch.float64):
        return own
    import psutil

    size = sum((folder / name).stat().st_size for name in weight_files(folder))
    needed = 2 * size * copies
    return torch.float32 if needed <= psutil.virtual_memory().available / 2 else own


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


def load_tokenizer(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer; raises as :func:`load_config` does."""
    try:
        found = AutoTokenizer.from_pretrained(
            checkpoint.folder, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise _loading_error(checkpoint, error, "tokenizer of ") from None
    if getattr(found, "chat_template", None):
        start_rendering()
    return found


def load_model(
    checkpoint: Checkpoint | str,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    placement: Placement | None = None,
) -> LoadedModel:
    """Load model and tokenizer for inference, from safetensors only.

    Args:
        checkpoint: the checkpoint, a folder or a hub id.
        device: ``auto`` or a torch device, where ``placement`` names none.
        dtype: ``auto`` or the name of a dtype.
        trust_remote_code: the checkpoint's own code may run.
        placement: over which devices and ranks the model is spread; None for one device.

    Raises:
        CheckpointError: files are missing, damaged or in another format, or a parameter has no
            tensor on disk (transformers would fill it with random numbers).
        UnsupportedArchitectureError: the installed transformers does not know the model type.
        UsageError: the device or dtype cannot be used.
    """
    if isinstance(checkpoint, str):
        checkpoint = find_checkpoint(checkpoint)
    placement = placement or Placement()
    model = load_weights(checkpoint, device, dtype, trust_remote_code, placement)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code)
    return LoadedModel(model, tokenizer, checkpoint, placement.ranks)


def load_weights(
    checkpoint: Checkpoint,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    placement: Placement | None = None,
) -> PreTrainedModel:
    """The model alone, as :func:`load_model` loads it."""
    placement = placement or Placement()
    ranks = placement.ranks
    place = pick_device(device)
    if bars_hidden():
        transformers.utils.logging.disable_progress_bar()
    config = load_config(checkpoint, trust_remote_code)
    require_safetensors(checkpoint)
    shards = read_shards(checkpoint.folder)
    for name in getattr(type(config), "extra_files", ()):
        if os.path.lexists(checkpoint.folder / name):
            read_shard(inside(checkpoint.folder, checkpoint.folder / name))
    check_plan(text_config(config), ranks, placement)
    copies = 1 if placement.is_spread else ranks.on_this_machine
    # What memory is free now differs from rank to rank; the dtype must not.
    number = ranks.broadcast(pick_dtype(dtype, config, checkpoint.folder, place, copies))
    try:
        with bounded_build(*_bounds(config, shards)):
            model, info = model_class(config).from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=number,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                # An adapter that lies there is no part of the model; here it lies nowhere.
                adapter_kwargs={"subfolder": uuid.uuid4().hex},
                **placement.loading_options(),
            )
    except TooLargeError as error:
        raise _too_large(config, error, shards) from None
    except Exception as error:
        raise _loading_error(checkpoint, error) from None
    check_unchanged(shards)
    absent = sorted(info["missing_keys"]) or sorted(map(str, info["mismatched_keys"]))
    if absent:
        raise CheckpointError(
            f"{checkpoint.folder} lacks a usable tensor for parameter '{absent[0]}'"
            + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
            + ": the checkpoint is incomplete"
        )
    return cast(PreTrainedModel, (model if placement.is_spread else model.to(place)).eval())


def has_causal_class(config: Any) -> bool:
    """Whether transformers has a class for a language model of exactly this configuration."""
    return type(config) in AutoModelForCausalLM._model_mapping or _named_class(config) is not None


def _named_class(config: Any) -> Any:
    """The class that ``architectures`` names, where the auto classes do not know the config."""
    names = getattr(config, "architectures", None) or [""]
    return getattr(transformers, names[0], None)


def model_class(config: Any) -> Any:
    """The class whose ``from_pretrained`` loads the language model of ``config``.

    A text decoder inside a vision-language model comes with the whole of it, unless transformers
    has a text-only class for that configuration.
    """
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    return _named_class(config) or AutoModelForCausalLM


def build_model(config: Any, **options: Any) -> PreTrainedModel:
    """A model of ``config`` with random weights, on the current default device.

    Args:
        config: its configuration.
        options: as for ``from_config`` (``dtype``, ``attn_implementation``, ...).
    """
    kind = model_class(config)
    if hasattr(kind, "from_config"):
        return cast(PreTrainedModel, kind.from_config(config, **options))
    options.pop("trust_remote_code", None)
    return cast(PreTrainedModel, kind._from_config(config, **options))


def empty_model(
    config: Any, trust_remote_code: bool = False, shards: ShardSet | None = None, **options: Any
) -> PreTrainedModel:
    """The model of a configuration on the meta device: names and shapes, no memory.

    Args:
        config: its configuration.
        trust_remote_code: the checkpoint's own code may run.
        shards: its tensors, which a model is not built far beyond.
        options: as for :func:`build_model`.

    Raises:
        CheckpointError: the configuration contradicts itself, or is that of a larger model.
    """
    bounds = (NUMBERS, TENSORS) if shards is None else _bounds(config, shards)
    try:
        with torch.device("meta"), bounded_build(*bounds):
            model = build_model(config, trust_remote_code=trust_remote_code, **options)
    except TooLargeError as error:
        raise _too_large(config, error, shards) from None
    except Exception as error:  # whatever the architecture's own constructor raises
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"a '{config.model_type}' model cannot be built from config.json ({reason})"
        ) from None
    layers = Held(dict.fromkeys(name for name, _ in model.named_parameters())).layers
    held = None if shards is None else Held.of(shards)
    if held is not None and layers is not None and held.layers is not None and layers > held.layers:
        raise _too_large(config, TooLargeError(f"{layers:,} layers"), shards)
    return model


def _bounds(config: Any, shards: ShardSet) -> tuple[int, int]:
    """Elements and tensors of a model beyond which these shards are not its weights."""
    # Some pack eight numbers into one; tied weights count twice, and so does what a quantizer
    # puts in the place of another.
    packed = 8 if getattr(config, "quantization_config", None) else 1
    elements, tensors = Held.of(shards).elements, len(shards.tensors)
    return 4 * packed * elements + (1 << 24), 8 * tensors + 10_000


def _too_large(what: Any, error: TooLargeError, shards: ShardSet | None) -> CheckpointError:
    if shards is None:
        kind = getattr(what, "model_type", what)
        return CheckpointError(
            f"config.json describes a '{kind}' model of {error}, which cannot be: it is damaged"
        )
    return CheckpointError(
        f"{shards.folder / CONFIG} describes a model of {error}, but the files beside it hold "
        f"{Held.of(shards)} with {Held.of(shards).elements:,} numbers: they do not belong together"
    )


def require_safetensors(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose weights are not safetensors, saying how to convert them."""
    if checkpoint.remote is None:
        check_files(str(checkpoint.folder), [path.name for path in checkpoint.folder.iterdir()])


def _loading_error(checkpoint: Checkpoint, error: Exception, what: str = "") -> CheckpointError:
    text = " ".join(str(error).split())
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
    if "ignore_mismatched_sizes" in text:
        text = "its tensors have other shapes than its config.json says"
    short = text[:300] or type(error).__name__
    return CheckpointError(f"{what}{checkpoint.name} cannot be loaded: {short}")


def text_config(model_or_config: Any) -> Any:
    """The configuration of the text decoder (itself, where there is no nested one)."""
    config = getattr(model_or_config, "config", model_or_config)
    return config.get_text_config(decoder=True)
