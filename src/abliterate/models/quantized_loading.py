"""Models whose matrices are small numbers in memory: on request, by bitsandbytes
(``--load-in``), or because their checkpoint is stored so.

They are for looking at: activations, scores and answers are those of the quantised model. An edit
is always made to the files.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from typing import Any, Literal, get_args

import torch

from abliterate.checkpoints.checkpoint import Checkpoint
from abliterate.checkpoints.quantized_formats import find_quantized, read_config
from abliterate.checkpoints.shards import ShardSet
from abliterate.errors import CheckpointError, UsageError, one_line
from abliterate.extras import import_extra
from abliterate.models.device_placement import Placement

_ABSENT: Any = object()
LoadIn = Literal["none", "8bit", "4bit"]
#: What bitsandbytes calls the four-bit numbers: levels at the quantiles of a normal distribution.
FOUR_BIT = "nf4"
# Rows of a matrix that bitsandbytes packs together for a CPU.
_PACKED_ROWS = 32
# How transformers says that a map mixes devices that hold quantised matrices with such that do not.
_MIXED = "dispatched on the CPU or the disk"
# How safetensors says that it does not understand a header, which we have read by then: its older
# releases lack dtypes.
_HEADER = "Error while deserializing header"


def stored_method(config: Any) -> str | None:
    """What a checkpoint's own ``quantization_config`` names, if it has one."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        text = config.get_text_config(decoder=True)
        settings = getattr(text, "quantization_config", None)
    return None if settings is None else _method(settings)


def _method(settings: Any) -> str:
    method: Any
    if isinstance(settings, dict):
        method = settings.get("quant_method")
    else:
        method = getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method) or "an unnamed method")


def quantizer_options(
    load_in: str,
    checkpoint: Checkpoint,
    config: Any,
    number: torch.dtype,
    place: torch.device,
    placement: Placement,
) -> dict[str, Any]:
    """What ``from_pretrained`` is told, so that matrices are small numbers on their device.

    Args:
        load_in: ``none``, ``8bit`` or ``4bit``.
        checkpoint: what is loaded, for errors.
        config: its configuration.
        number: of the computation.
        place: the device, where ``placement`` names none.
        placement: over which devices and ranks the model is spread.

    Raises:
        CheckpointError: a quantised checkpoint is to be spread in a way that it cannot.
        UsageError: bitsandbytes is missing, or cannot do this here, or not to this checkpoint.
    """
    if load_in not in get_args(LoadIn):
        known = ", ".join(get_args(LoadIn)[:-1])
        raise UsageError(f"--load-in must be {known} or {get_args(LoadIn)[-1]}, not {load_in!r}")
    stored = stored_method(config)
    if load_in == "none" and stored is None:
        return {}
    if placement.tensor_parallel:
        if load_in == "none":
            raise CheckpointError(
                f"{checkpoint.name} is quantised ({stored}), which --tensor-parallel does not "
                "divide: leave it out, or use the checkpoint that it was made from"
            )
        raise UsageError(
            f"--load-in {load_in} and --tensor-parallel exclude each other: leave one out"
        )
    # Quantised where they are to lie: not all of them can be moved afterwards.
    options = {} if placement.device_map is not None else {"device_map": {"": place}}
    if load_in == "none":
        if stored == "bitsandbytes" and importlib.util.find_spec("bitsandbytes") is not None:
            _import_bitsandbytes(checkpoint.name)
        return options
    if stored is not None:
        raise UsageError(
            f"--load-in {load_in}: {checkpoint.name} is quantised already ({stored}): leave it out"
        )
    _check_machine(load_in, place, number, placement)
    from transformers import BitsAndBytesConfig

    if load_in == "8bit":
        return options | {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=FOUR_BIT, bnb_4bit_compute_dtype=number
    )
    return options | {"quantization_config": four}


def _import_bitsandbytes(needed_by: str) -> Any:
    """The package, without what it fetches: on some CPUs its import runs a hub's compiled code.

    Raises:
        UsageError: it is not installed.
    """
    # Of every product, that eight bits take float16; once, that a CPU could use what is fetched.
    for part in ("autograd._functions", "backends.cpu.ops"):
        logging.getLogger(f"bitsandbytes.{part}").setLevel(logging.ERROR)
    fetcher = sys.modules.get("kernels", _ABSENT)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        return import_extra("bitsandbytes", needed_by, "bitsandbytes", "quantized")
    finally:
        del sys.modules["kernels"]
        if fetcher is not _ABSENT:
            sys.modules["kernels"] = fetcher


def _check_machine(
    load_in: str, place: torch.device, number: torch.dtype, placement: Placement
) -> None:
    """Refuse what bitsandbytes does not do."""
    option = f"--load-in {load_in}"
    bitsandbytes = _import_bitsandbytes(option)
    if number == torch.float64:
        raise UsageError(f"{option} and --dtype float64 exclude each other: use float32")
    devices = placement.device_map
    if not isinstance(devices, dict):
        known = getattr(bitsandbytes, "supported_torch_devices", {place.type})
        if devices is None and place.type not in known:
            raise UsageError(
                f"{option}: bitsandbytes does not run on {place.type}: use --device cpu, or leave "
                "it out"
            )
    elif "disk" in devices.values() or len({str(one) == "cpu" for one in devices.values()}) > 1:
        raise UsageError(
            f"{option}: --device-map may not put some modules on the CPU or the disk, where they "
            "would stay as they are: give it accelerators alone, or leave one of the two out"
        )


def loading_failure(
    load_in: str, checkpoint: Checkpoint, config: Any, error: Exception
) -> CheckpointError | UsageError | None:
    """The error about a quantised model that transformers does not load; None if it is not one."""
    text = one_line(error)[:300] or type(error).__name__
    if load_in != "none":
        if _MIXED in text:
            return UsageError(
                f"--load-in {load_in}: {checkpoint.name} does not fit into the accelerators alone, "
                "and on the CPU or the disk it would stay as it is: leave out --load-in"
            )
        if "bitsandbytes" in text.lower():
            return UsageError(f"--load-in {load_in} cannot be used here: {text}")
        return None
    method = stored_method(config)
    if method is None:
        return None
    if _HEADER in text:
        text = "the installed safetensors does not know a dtype of its tensors (upgrade it)"
    return CheckpointError(
        f"{checkpoint.name} is quantised ({method}), which cannot be used here: {text}: mend that, "
        "or use the checkpoint that it was made from"
    )


def keep_precision(model: Any) -> None:
    """Keep four-bit products on a CPU in the numbers that were asked for.

    Where the CPU multiplies in bfloat16 (AVX-512), bitsandbytes packs its matrices anew at the
    first product, computes in bfloat16 whatever it was given, and fails with shapes that do not
    divide. Its other way, which it takes on any other CPU, does neither.
    """
    for module in model.modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        state = getattr(module.weight, "quant_state", None) or module.quant_state
        module.support_avx512bf16_for_cpu = (
            module.compute_dtype == torch.bfloat16
            and state is not None
            and state.shape[0] % _PACKED_ROWS == 0
            and state.shape[1] % state.blocksize == 0
        )


def check_products(
    model: Any, load_in: str, checkpoint: Checkpoint, config: Any, device: torch.device
) -> None:
    """Run a quantised model on one token: what computes with its matrices is looked for then,
    in the numbers that were asked for.

    On a GPU transformers takes the products of FP8 matrices from packages that it loads at the
    first of them, and that may not be there.

    Raises:
        CheckpointError: the matrices of the checkpoint cannot be computed with here.
        UsageError: those of ``--load-in`` cannot.
        torch.OutOfMemoryError: as it comes.
    """
    if not is_quantized(model):
        return
    keep_precision(model)
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a package, a kernel or a compiler says
        failure = loading_failure(load_in, checkpoint, config, error)
        if failure is None:
            text = one_line(error)[:300] or type(error).__name__
            failure = UsageError(f"--load-in {load_in} cannot be used here: {text}")
        raise failure from None


def check_widened(model: Any, checkpoint: Checkpoint, shards: ShardSet) -> None:
    """Refuse FP8 weights that transformers has widened with scales of other blocks than theirs.

    Where there is no GPU for it, it spreads the scales of a matrix evenly over its rows and
    columns: wrong where these are no multiples of the block's.

    Raises:
        CheckpointError: there is such a matrix.
    """
    if is_quantized(model):
        return
    for name, stored in find_quantized(shards, read_config(checkpoint.folder)).items():
        rows, columns = stored.block
        if stored.scheme == "fp8" and (stored.shape[0] % rows or stored.shape[1] % columns):
            raise CheckpointError(
                f"{name} of {checkpoint.name} is {stored.shape[0]} x {stored.shape[1]}, no "
                f"multiples of its FP8 blocks ({rows} x {columns}): the installed transformers "
                "widens it wrongly on this machine; use a GPU that computes in FP8, or a "
                "checkpoint in bfloat16"
            )


def is_quantized(model: Any) -> bool:
    """Whether matrices of a model are small numbers in memory, whose products round by more."""
    return bool(getattr(model, "is_quantized", False))


def how_it_computes(model: Any) -> dict[str, Any]:
    """What records say of a model beside its dtype: quantised how, attention by which code."""
    attention = getattr(model.config, "_attn_implementation", None)
    return {"quantization": quantization(model), "attention": attention}


def quantization(model: Any) -> dict[str, Any] | None:
    """What records say of a model whose activations are a quantised one's; None of any other.

    Returns:
        The method's name, the bits of a weight where it is known, and the version of the package
        that computes.
    """
    settings = getattr(model.config, "quantization_config", None)
    if not is_quantized(model) or settings is None:
        return None
    record: dict[str, Any] = {"method": _method(settings)}
    if record["method"] != "bitsandbytes":
        return record | {"bits": getattr(settings, "bits", None)}
    import bitsandbytes

    four = bool(getattr(settings, "load_in_4bit", False))
    record |= {"bits": 4 if four else 8, "version": bitsandbytes.__version__}
    return record | ({"type": settings.bnb_4bit_quant_type} if four else {})
