"""A model without weights, and its weights by the piece, through ``transformers``' own loading.

The model is built on the meta device. A piece (a decoder block, a projection, the norms) gets its
parameters when they are needed: the tensors on disk that they come from pass through the library's
renaming and conversion (fused experts, split projections), exactly as ``from_pretrained`` does it
for the whole model, and go again afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from abliterate.checkpoints.shards import read_shards
from abliterate.errors import CheckpointError, UsageError
from abliterate.models.library_versions import load_tensors
from abliterate.models.loading import Checkpoint, incomplete, name_of
from abliterate.models.model_classes import build_empty
from abliterate.offload.mmap_weights import Mapped
from abliterate.writers.loaded_names import loaded_names


@dataclass(frozen=True)
class Group:
    """What the library loads together: the tensors on disk, and the names that come of them."""

    targets: tuple[str, ...]
    names: tuple[str, ...]
    plain: bool


@dataclass(eq=False)
class Slot:
    """A parameter or persistent buffer, under every name that it has."""

    empty: Tensor
    owners: dict[str, tuple[nn.Module, str]] = field(default_factory=dict)
    group: Group | None = None
    kept: bool = False

    @property
    def keys(self) -> list[str]:
        return list(self.owners)

    @property
    def owner(self) -> nn.Module:
        """The first module that has it."""
        return next(iter(self.owners.values()))[0]

    def put(self, value: Tensor) -> None:
        for module, name in self.owners.values():
            where: dict[str, Any] = module._parameters
            where = where if name in where else module._buffers
            where[name] = value


class Weights:
    """The model of a checkpoint on the meta device, and what gives its modules their weights.

    Attributes:
        model: the model; only what :meth:`load` was asked for has weights.
        mapped: its files.
        device: where weights go.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Any,
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool = False,
        attention: Mapping[str, str] | None = None,
    ) -> None:
        self.device, self.checkpoint = device, checkpoint
        shards = read_shards(checkpoint.folder)
        self.model: PreTrainedModel = build_empty(
            config, trust_remote_code, shards, dtype=dtype, **(attention or {})
        ).eval()
        self.mapped = Mapped(shards)
        self._config = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            weight_mapping=get_model_conversion_mapping(self.model),
        )
        groups = list(_groups(self.model, self.mapped, self._config.weight_mapping))
        self.slots = _slots(
            self.model, {target: group for group in groups for target in group.targets}
        )
        self._by_key = {key: slot for slot in self.slots for key in slot.keys}
        self._of_module: dict[int, list[Slot]] = {}
        for slot in self.slots:
            for module, _ in slot.owners.values():
                self._of_module.setdefault(id(module), []).append(slot)
        self._fill_buffers()

    def slots_of(self, module: nn.Module) -> list[Slot]:
        """The parameters and buffers on disk of a module and all within it."""
        found = [slot for each in module.modules() for slot in self._of_module.get(id(each), [])]
        return list(dict.fromkeys(found))

    def direct_slots(self, module: nn.Module) -> list[Slot]:
        """Those of the module itself, without its children's."""
        return self._of_module.get(id(module), [])

    def names(self, slots: Iterable[Slot]) -> list[str]:
        """The tensors on disk that slots are loaded from."""
        groups = {slot.group: None for slot in slots if slot.group and not slot.kept}
        return [name for group in groups for name in group.names]

    def size(self, slots: Iterable[Slot]) -> int:
        """Bytes of slots in memory."""
        return sum(slot.empty.numel() * slot.empty.element_size() for slot in slots)

    def source(self, slot: Slot) -> str | None:
        """The tensor on disk whose rows are those of a parameter, if there is one."""
        group = slot.group
        if group is None or not group.plain or len(group.names) != 1:
            return None
        same = tuple(self.mapped.entry(group.names[0]).shape) == tuple(slot.empty.shape)
        return group.names[0] if same else None

    def load(self, slots: Sequence[Slot], keep: bool = False) -> None:
        """Give slots their values.

        Args:
            slots: which.
            keep: they are never dropped.

        Raises:
            CheckpointError: a tensor is missing or does not fit.
        """
        wanted = [slot for slot in slots if not slot.kept]
        self._require_on_disk(wanted)
        groups = list(dict.fromkeys(slot.group for slot in wanted if slot.group))
        self.mapped.fetch(self.names(wanted))
        # What is converted is a copy, whose source need not stay beside it.
        plain = [name for group in groups if group.plain for name in group.names]
        self._convert(plain)
        self.mapped.forget(name for name in plain if not self._stays(name))
        for group in groups:
            if not group.plain:
                self._convert(group.names)
                self.mapped.forget(group.names)
        self._place(wanted, keep)

    def _require_on_disk(self, wanted: Sequence[Slot]) -> None:
        absent = [
            slot.keys[0]
            for slot in wanted
            if slot.group is None and slot.empty.is_meta and isinstance(slot.empty, nn.Parameter)
        ]
        if absent:
            raise incomplete(self.checkpoint, absent)

    def _place(self, wanted: Sequence[Slot], keep: bool) -> None:
        """Leave what was loaded in the slots that want it, and in no others of its groups."""
        mine = set(wanted)
        produced = {key for slot in wanted if slot.group for key in slot.group.targets}
        for key in produced & self._by_key.keys():
            slot = self._by_key[key]
            if slot in mine:
                slot.put(_get(self.model, key).requires_grad_(False))
                slot.kept = keep
            elif not slot.kept:
                slot.put(slot.empty)

    def drop(self, slots: Iterable[Slot]) -> None:
        """Take values away again, and their pages out of the process."""
        gone = [slot for slot in slots if not slot.kept]
        for slot in gone:
            slot.put(slot.empty)
        self.mapped.forget(self.names(gone))

    def _stays(self, name: str) -> bool:
        """Whether a parameter is the mapped tensor itself, not a copy."""
        return self.device.type == "cpu" and self.mapped.tensor(name).dtype == self._config.dtype

    def _convert(self, names: Sequence[str]) -> None:
        if not names:
            return
        tensors = {name: self.mapped.tensor(name) for name in names}
        with _one_by_one():
            info = load_tensors(self.model, tensors, self._config)
        texts = [str(text) for text in info.conversion_errors.values()]
        # As the allocators of a CPU and of an accelerator say it.
        if any(words in text for text in texts for words in ("allocate memory", "out of memory")):
            smaller = "--activation-memory or --dtype" if self.device.type == "cpu" else "--dtype"
            raise UsageError(
                f"a block of {self.checkpoint.name} and what it is converted from do not fit into "
                f"memory beside what waits there: use a smaller {smaller}"
            )
        wrong = sorted(map(name_of, info.mismatched_keys)) or sorted(
            map(str, info.conversion_errors)
        )
        if wrong:
            raise CheckpointError(
                f"{self.checkpoint.folder} lacks a usable tensor for parameter '{wrong[0]}': the "
                "checkpoint does not fit its config.json"
            )

    def _fill_buffers(self) -> None:
        """Compute the buffers that are not on disk (rotary frequencies), as the library does."""
        model = self.model
        for slot in self.slots:
            slot.empty._is_hf_initialized = True  # type: ignore[attr-defined]
        absent = {
            key
            for slot in self.slots
            if slot.group is None and not isinstance(slot.empty, nn.Parameter)
            for key in slot.keys
        }
        model._move_missing_keys_from_meta_to_device(absent, {"": self.device}, None, None)
        # What is on disk keeps its mark, so this reaches the others only.
        model._initialize_missing_keys(False)
        for slot in self.slots:
            if slot.keys[0] in absent:
                slot.empty, slot.kept = _get(model, slot.keys[0]), True
            else:
                slot.put(slot.empty)


def _slots(model: PreTrainedModel, groups: Mapping[str, Group]) -> list[Slot]:
    """Every parameter and persistent buffer once, whatever names it has."""
    found: dict[int, dict[str, tuple[nn.Module, str]]] = {}
    tensors: dict[int, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or name in module._non_persistent_buffers_set:
                continue
            tensors[id(tensor)] = tensor
            key = f"{prefix}.{name}" if prefix else name
            found.setdefault(id(tensor), {})[key] = (module, name)
    place = {key: mark for mark, owners in found.items() for key in owners}
    # Parameters that the library ties after loading are one.
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if place.get(target, 0) != place.get(source, 0) and {target, source} <= place.keys():
            moved = found.pop(place[target])
            found[place[source]] |= moved
            place |= dict.fromkeys(moved, place[source])
    slots = []
    for mark, owners in found.items():
        loaded = {groups[key]: key for key in owners if key in groups}
        if len(loaded) < 2:
            slots.append(Slot(tensors[mark], owners, next(iter(loaded), None)))
            continue
        # Each has a tensor of its own on disk, so the checkpoint does not tie them: the same
        # module under two names stays one, and takes the last, as the library does.
        kept: dict[tuple[int, str], Slot] = {}
        for group, key in loaded.items():
            module, name = owners[key]
            own = Slot(torch.empty_like(tensors[mark]), {key: owners[key]}, group)
            if isinstance(tensors[mark], nn.Parameter):
                own.empty = nn.Parameter(own.empty, requires_grad=False)
            kept[id(module), name] = own
        for key, owner in owners.items():
            slot = kept.get((id(owner[0]), owner[1]), next(iter(kept.values())))
            slot.owners[key] = owner
        slots += kept.values()
    return slots


def _groups(model: PreTrainedModel, mapped: Mapped, conversions: Sequence[Any]) -> Iterator[Group]:
    """Which tensors on disk the library would load together, and as what."""
    names: dict[str, list[str]] = {}
    converters: dict[str, Any] = {}
    for loaded in loaded_names(model, mapped.entries, conversions):
        if loaded.key is not None:
            names.setdefault(loaded.key, []).append(loaded.name)
            converters.setdefault(loaded.key, loaded.converter)
    for key, converter in converters.items():
        targets: tuple[str, ...] = (key,)
        if converter is not None:
            first, *_ = patterns = converter.target_patterns
            targets = tuple(key.replace(first, pattern) for pattern in patterns)
        yield Group(targets, tuple(names[key]), converter is None)


def _get(model: nn.Module, key: str) -> Tensor:
    path, _, name = key.rpartition(".")
    value: Tensor = getattr(model.get_submodule(path), name)
    return value


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Within the context the library converts parameter by parameter, without a bar of its own."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before, shown = os.environ.get(name), is_progress_bar_enabled()
    os.environ[name] = "1"
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
