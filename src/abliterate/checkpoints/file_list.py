"""What kind of checkpoint it is, from the names of its files alone. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from abliterate.errors import CheckpointError
from abliterate.storage.json_text import parse_json

MAX_CONFIG = 32 << 20  # bytes of a config.json: no model's is larger
ADAPTER_CONFIG = "adapter_config.json"
# What training leaves beside weights.
_OF_TRAINING = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Weights for other programs, by how their files begin or end.
_OTHER_PROGRAMS = {
    "ONNX": ((), (".onnx",)),
    "OpenVINO": (("openvino_",), ()),
    "MLC": (("params_shard_",), ()),
    "TensorFlow": ((), (".h5",)),
    "Flax": ((), (".msgpack",)),
    "LiteRT": ((), (".tflite", ".task", ".litertlm")),
    "Core ML": ((), (".mlmodel", "weight.bin")),
}


def is_adapter(name: str) -> bool:
    """Whether a file is one of those that PEFT writes for an adapter."""
    return name == ADAPTER_CONFIG or name.startswith("adapter_model.")


def check_files(
    where: str, names: Collection[str], adapter_base: Callable[[], str | None] = lambda: None
) -> None:
    """Refuse a checkpoint that cannot be used, from the names of its files alone.

    Args:
        where: the folder or hub id.
        names: of its files.
        adapter_base: what the adapter says that it was made for.

    Raises:
        CheckpointError: it has no safetensors weights (it says what it has, and how to obtain one
            that does) or no configuration.
    """
    top = [name for name in names if "/" not in name]
    if "model_index.json" in top and "config.json" not in top:
        raise CheckpointError(
            f"{where} holds a diffusers pipeline (model_index.json) and no language model: give a "
            "decoder-only language model"
        )
    tensors = [name for name in top if name.endswith(".safetensors") and not is_adapter(name)]
    if any(not name.startswith("consolidated") for name in tensors):
        if "config.json" not in top:
            raise CheckpointError(f"{where} has no config.json: it is no transformers checkpoint")
        return
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if ggufs:
        raise CheckpointError(
            f"{where} holds GGUF weights ({ggufs[0]}), which can be neither run nor edited here: "
            "use the safetensors checkpoint that they were converted from"
        )
    if tensors:
        raise CheckpointError(
            f"{where} holds consolidated weights ({sorted(tensors)[0]}), whose tensors are named "
            "and joined as their makers' own code has them: use the checkpoint that was converted "
            "for transformers"
        )
    pickles = sorted(
        name
        for name in top
        if name.endswith(_PICKLES)
        and not (is_adapter(name) or name.startswith(_OF_TRAINING) or _program_of(name))
    )
    pickles += sorted(name for name in names if name.endswith(".pth") and name not in pickles)
    if pickles:
        raise CheckpointError(
            f"{where} holds pickle weights ({pickles[0]}), which are never opened: convert them "
            "with safetensors (model.save_pretrained writes them) first"
        )
    if any(map(is_adapter, top)):
        base = adapter_base()
        model = "the model that it was made for" if base is None else f"its base '{base}'"
        raise CheckpointError(
            f"{where} holds a PEFT adapter and no model: give {model}, or merge it into that first "
            "(PEFT's merge_and_unload, then save_pretrained)"
        )
    others = sorted(name for name in names if _program_of(name))
    if others:
        raise CheckpointError(
            f"{where} holds {_program_of(others[0])} weights ({others[0]}), which can be neither "
            "run nor edited here: use the safetensors checkpoint that they were converted from"
        )
    lacks = "" if "config.json" in top else " and no config.json"
    raise CheckpointError(f"{where} has no .safetensors weights{lacks}")


def _program_of(name: str) -> str | None:
    """The program whose weights a file holds, if it is another than PyTorch."""
    base = name.rpartition("/")[2]
    for program, (starts, ends) in _OTHER_PROGRAMS.items():
        if base.startswith(starts) or base.endswith(ends):
            return program
    return None


def adapter_base(path: Path) -> str | None:
    """What an ``adapter_config.json`` names as its base model, if it can be read."""
    try:
        if path.stat().st_size > MAX_CONFIG:
            return None
        base = parse_json(path.read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return base[:200] if isinstance(base, str) and base.strip() else None
