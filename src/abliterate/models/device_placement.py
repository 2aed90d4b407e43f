"""Where a model's weights lie: on one device, over several (``--device-map``), or over the
ranks (``--tensor-parallel``)."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from abliterate.distributed.rank_group import ALONE, RankGroup
from abliterate.errors import UnsupportedArchitectureError, UsageError

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True)
class Placement:
    """How a model is spread.

    Attributes:
        device_map: accelerate's: a strategy, or devices (``disk`` is one) by module; None for one
            device.
        tensor_parallel: each rank holds a part of every matrix.
        ranks: the ranks.
    """

    device_map: str | Mapping[str, Any] | None = None
    tensor_parallel: bool = False
    ranks: RankGroup = ALONE

    @property
    def is_spread(self) -> bool:
        return self.tensor_parallel or self.device_map is not None

    def loading_options(self) -> dict[str, Any]:
        """What ``from_pretrained`` is told of it."""
        if self.tensor_parallel:
            from transformers.distributed import DistributedConfig

            return {
                "distributed_config": DistributedConfig(tp_size=self.ranks.size, tp_plan="auto")
            }
        if self.device_map is not None:
            # For what goes to disk in another form than the checkpoint's (experts that are fused).
            folder = tempfile.mkdtemp(prefix="abliterate-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            return {"device_map": self.device_map, "offload_folder": folder}
        return {}

    def describe(self, model: Any) -> str:
        """Where the weights of ``model`` lie, for the log."""
        if not self.tensor_parallel:
            return ", ".join(devices(model))
        here = sum(parameter.to_local().numel() if hasattr(parameter, "to_local")
                   else parameter.numel() for parameter in model.parameters())  # fmt: skip
        whole = sum(parameter.numel() for parameter in model.parameters())
        share = f"{here / whole:.0%} of the parameters on each"
        return f"{', '.join(devices(model))}, {self.ranks.size} ranks with {share}"


def devices(model: Any) -> list[str]:
    """What kinds of devices hold the weights of ``model``."""
    spread = getattr(model, "hf_device_map", None)
    if not spread:
        return [str(model.device.type)]
    kinds = [place if place == "disk" else torch.device(place).type for place in spread.values()]
    return list(dict.fromkeys(kinds))


def find_placement(
    ranks: RankGroup, device: str, device_map: str | None, tensor_parallel: bool
) -> Placement:
    """The placement that ``--device``, ``--device-map`` and ``--tensor-parallel`` ask for.

    Raises:
        UsageError: two of them, or one of them and the launcher, exclude each other.
    """
    if device_map is not None:
        if tensor_parallel:
            raise UsageError("--device-map and --tensor-parallel exclude each other: choose one")
        if ranks.size > 1:
            raise UsageError(
                "--device-map gives one process all devices, but a launcher started "
                f"{ranks.size}: run without it, or use --tensor-parallel"
            )
        if device != "auto":
            raise UsageError(f"--device-map and --device {device} exclude each other: choose one")
        return Placement(parse_device_map(device_map))
    if not tensor_parallel:
        return Placement(ranks=ranks)
    if ranks.size == 1:
        raise UsageError(
            "--tensor-parallel needs a process for each part: start it with "
            "`torchrun --nproc-per-node N -m abliterate ...`"
        )
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if accelerator is None else accelerator.type
    if device not in ("auto", kind):
        raise UsageError(
            f"--tensor-parallel computes on every rank's own {kind}, not on --device {device}: "
            "leave --device out"
        )
    return Placement(tensor_parallel=True, ranks=ranks.together())


def parse_device_map(text: str) -> str | dict[str, Any]:
    """``auto`` and the like, or a JSON object of devices by module name.

    Raises:
        UsageError: it is neither.
    """
    if text in _STRATEGIES:
        return text
    try:
        devices = json.loads(text)
    except (ValueError, RecursionError):
        devices = None
    valid = isinstance(devices, dict) and devices
    if not valid or not all(isinstance(device, str | int) for device in devices.values()):
        raise UsageError(
            f"--device-map must be {', '.join(_STRATEGIES)} or a JSON object of devices by module "
            f"name, not '{text}'"
        )
    for name, device in devices.items():
        if device != "disk":
            reachable_device(device, f"--device-map: '{device}' of '{name}'")
    return dict(devices)


def reachable_device(device: str | int, named: str) -> torch.device:
    """A device that torch knows and this machine has.

    Args:
        device: as the user wrote it; a number is one of the accelerator's.
        named: the option with its value, for the error message.

    Raises:
        UsageError: there is none.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    here = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    instead = f"use auto or {' or '.join(here)}"
    if isinstance(device, int):
        device = f"{'cuda' if accelerator is None else accelerator.type}:{device}"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"{named} is no device that torch knows: {instead}") from None
    if chosen.type in ("cpu", "meta"):
        return chosen
    if chosen.type not in here:
        raise UsageError(f"{named} is not on this machine, or its torch lacks it: {instead}")
    count = torch.accelerator.device_count()
    if (chosen.index or 0) >= count:
        last = f"{chosen.type}:0" + (f" to {chosen.type}:{count - 1}" if count > 1 else "")
        raise UsageError(f"{named} does not exist: this machine has {last}")
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{named} cannot be used here ({reason}): {instead}") from None
    return chosen


def check_plan(config: Any, ranks: RankGroup, placement: Placement) -> None:
    """Refuse tensor parallelism that transformers would not do, or do wrong.

    Raises:
        UnsupportedArchitectureError: the architecture has no plan for it.
        UsageError: its heads cannot be dealt out to the ranks, or transformers is too old.
    """
    if not placement.tensor_parallel:
        return
    if not getattr(config, "base_model_tp_plan", None):
        raise UnsupportedArchitectureError(
            f"transformers has no tensor parallel plan for '{config.model_type}': leave out "
            "--tensor-parallel, and use --device-map auto"
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % ranks.size:
            raise UsageError(
                f"--tensor-parallel: {ranks.size} ranks cannot share {heads} {name[4:-6]} heads "
                f"({name}): start as many ranks as divide them"
            )
    from abliterate.models.library_versions import has_distributed_tensors

    if not has_distributed_tensors():
        raise UsageError(
            "--tensor-parallel needs transformers 5.16 or newer: upgrade it, or use "
            "--device-map auto"
        )


# Where a copy from pinned memory runs beside the host. Apple's GPU shares the host's memory.
_COPIES_BESIDE = ("cuda", "xpu")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on ``device``; what comes from the host is not waited for.

    It goes through pinned memory, which its allocator does not give away before the copy is done.
    """
    known = (*_COPIES_BESIDE, torch._C._get_privateuse1_backend_name())  # may be registered late
    if tensor.device.type != "cpu" or device.type not in known:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def own_device(device: torch.device) -> torch.device:
    """``device``, or the one of its kind that belongs to this rank of several on the machine.

    Raises:
        UsageError: there are more ranks on this machine than devices of that kind.
    """
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    several = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1
    if device.type in ("cpu", "meta") or not several or device.index is not None:
        return device
    count = torch.accelerator.device_count()
    if rank >= count:
        raise UsageError(
            f"local rank {rank} finds no {device.type} device of its own: this machine has "
            f"{count}; start no more ranks on it (--nproc-per-node {count})"
        )
    return torch.device(device.type, rank)
