"""Getting at a model: a local folder or a hub id, its tokenizer, its decoder blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)

from abliterate.checkpoints.hub import HubRepo, check_files, fetch_snapshot, look_up
from abliterate.console import bars_hidden
from abliterate.distributed.rank_group import ALONE, Team
from abliterate.errors import CheckpointError, UnsupportedArchitectureError, UsageError
from abliterate.models.device_placement import Placement, check_plan, own_device
from abliterate.storage.artifacts import hash_file

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        name: the folder or hub id as the user gave it.
        folder: where its files lie (for a hub id, the cache's snapshot).
        revision: the hub commit, or None for a local folder.
        remote: where its shards lie, if they are still on the hub and everything else is here.
    """

    name: str
    folder: Path
    revision: str | None = None
    remote: HubRepo | None = None

    def identity(self) -> dict[str, Any]:
        """What artifacts record of it: name and hub commit, or the hashes of its files."""
        if self.revision is not None:
            return {"id": self.name, "revision": self.revision}
        files = sorted(
            path
            for path in self.folder.iterdir()
            if path.is_file() and path.suffix in (".safetensors", ".json", ".jinja", ".model")
        )
        return {"id": self.name, "files": {path.name: hash_file(path) for path in files}}


def find_checkpoint(
    name: str, revision: str | None = None, leave_shards: bool = False
) -> Checkpoint:
    """Resolve a local folder, or download a hub id into the cache (token from ``HF_TOKEN``).

    Args:
        name: the folder or hub id.
        revision: branch, tag or commit of the hub id.
        leave_shards: download everything but the weights.

    Raises:
        CheckpointError: no such folder, or the hub does not give it.
        UsageError: ``leave_shards`` for a folder.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if leave_shards:
            raise UsageError(
                f"--low-disk is for hub ids: {name} is a folder, which is never deleted"
            )
        if not (folder / "config.json").is_file():
            if any(folder.glob("*.gguf")):
                raise CheckpointError(
                    f"{folder} holds GGUF weights, which can be neither run nor edited here: use "
                    "the safetensors checkpoint that they were converted from"
                )
            raise CheckpointError(f"{folder} has no config.json: it is no transformers checkpoint")
        return Checkpoint(name, folder)
    if folder.exists():
        raise CheckpointError(f"{name} is a file: give the checkpoint's folder or a hub id")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"model '{name}' is neither an existing folder nor a hub id")
    info = look_up(name, revision)
    if info is not None:
        check_files(name, [file.rfilename for file in info.siblings or ()])
    elif leave_shards:
        raise CheckpointError(
            f"model '{name}' cannot be found on the hub, which --low-disk needs: check the id, "
            "--revision and network, and set HF_TOKEN if it is gated"
        )
    if not leave_shards:
        path = fetch_snapshot(name, revision, True)
        return Checkpoint(name, path, path.name)
    path = fetch_snapshot(name, info.sha, False)
    sizes = {file.rfilename: file.size for file in info.siblings or () if file.size is not None}
    return Checkpoint(name, path, info.sha, HubRepo(name, info.sha, sizes))


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, with its tokenizer and the checkpoint they came from.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        checkpoint: where both came from.
        team: the processes that share the work with it.
        stream: where the model is larger than memory, what runs it block by block
            (``abliterate.offload.Stream``); ``model`` then has no weights of its own.
    """

    model: PreTrainedModel
    tokenizer: Any
    checkpoint: Checkpoint
    team: Team = ALONE
    stream: Any = None


def pick_device(device: str) -> torch.device:
    """``auto`` is the machine's accelerator if it has one, else the CPU.

    Raises:
        UsageError: torch does not know the device or cannot reach it.
    """
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return own_device(found) if found is not None else torch.device("cpu")
    try:
        chosen = own_device(torch.device(device))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {device} cannot be used here: {reason}") from None
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
        return DTYPES[dtype]
    own = getattr(config, "dtype", None) or torch.float32
    if isinstance(own, str):
        own = getattr(torch, own)
    if device.type != "cpu" or own in (torch.float32, torch.float64):
        return own
    import psutil

    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    needed = 2 * size * copies
    return torch.float32 if needed <= psutil.virtual_memory().available / 2 else own


def load_config(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """The checkpoint's configuration.

    Raises:
        CheckpointError: it is damaged, or needs remote code that was not trusted.
        UnsupportedArchitectureError: the installed transformers does not know the model type.
    """
    try:
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _loading_error(checkpoint, error) from None


def load_tokenizer(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """The checkpoint's tokenizer; raises as :func:`load_config` does."""
    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _loading_error(checkpoint, error, "tokenizer of ") from None


def load_model(
    checkpoint: Checkpoint | str,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    placement: Placement | None = None,
) -> Loaded:
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
    return Loaded(model, tokenizer, checkpoint, placement.team)


def load_weights(
    checkpoint: Checkpoint,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    placement: Placement | None = None,
) -> PreTrainedModel:
    """The model alone, as :func:`load_model` loads it."""
    placement = placement or Placement()
    team = placement.team
    place = pick_device(device)
    if bars_hidden():
        transformers.utils.logging.disable_progress_bar()
    config = load_config(checkpoint, trust_remote_code)
    require_safetensors(checkpoint)
    check_plan(text_config(config), team, placement)
    copies = 1 if placement.is_spread else team.on_this_machine
    # What memory is free now differs from rank to rank; the dtype must not.
    number = team.tell(pick_dtype(dtype, config, checkpoint.folder, place, copies))
    try:
        model, info = model_class(config).from_pretrained(
            checkpoint.folder,
            config=config,
            dtype=number,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **placement.loading_options(),
        )
    except Exception as error:
        raise _loading_error(checkpoint, error) from None
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


def empty_model(config: Any, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a configuration on the meta device: names and shapes, no memory.

    Raises:
        CheckpointError: the configuration contradicts itself.
    """
    try:
        with torch.device("meta"):
            return build_model(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the architecture's own constructor raises
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"a '{config.model_type}' model cannot be built from config.json ({reason})"
        ) from None


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
    short = text[:300] or type(error).__name__
    return CheckpointError(f"{what}{checkpoint.name} cannot be loaded: {short}")


def text_config(model_or_config: Any) -> Any:
    """The configuration of the text decoder (itself, where there is no nested one)."""
    config = getattr(model_or_config, "config", model_or_config)
    return config.get_text_config(decoder=True)
