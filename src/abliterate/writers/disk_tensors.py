"""From parameters in memory to tensors on disk.

transformers renames, splits, fuses and transposes tensors while it loads a checkpoint. The edit is
made on the files, so this module finds, for each parameter, the tensors on disk that it is loaded
from and which axis of each is d_model. It goes in the direction of loading: the names from the
safetensors headers pass through the library's own renaming, and shapes without values through its
own conversion operations, whose results then say which element came from where. So there is no
table of names here, and a checkpoint may be in any layout that ``from_pretrained`` accepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from abliterate.errors import PlanError, ShapeMismatchError
from abliterate.models.model_classes import values_of
from abliterate.writers.loaded_names import loaded_names
from abliterate.writers.parameter_names import parameter_aliases
from abliterate.writers.provenance import Traced, TraceError, leaf
from abliterate.writers.tensor_slices import Ranges, Region, RegionError, regions


@dataclass(frozen=True)
class DiskTensor:
    """A tensor on disk, or a region of one, that a parameter is loaded from.

    Attributes:
        name: name in the safetensors files.
        shape: shape of the whole tensor on disk.
        axis: the axis of the tensor on disk that is d_model.
        parameter: the parameter in memory, as in ``model.named_parameters()``.
        loads_as: the state-dict name that the library gives it; other than ``parameter`` where the
            parameter is tied and this tensor is stored under the other name.
        part: index ranges of the parameter, one per axis, that it holds; None for all of it.
        region: index ranges of the tensor on disk, one per axis, that belong to the parameter;
            None for all of it.
    """

    name: str
    shape: tuple[int, ...]
    axis: int
    parameter: str
    loads_as: str
    part: Ranges | None = None
    region: Ranges | None = None


@dataclass(frozen=True)
class DiskMap:
    """Where the given parameters are on disk, and what on disk the model does not load.

    Attributes:
        tensors: those of the parameters.
        untouched: names on disk that the model does not load.
        absent: parameters of the model, asked for or not, that nothing on disk loads as.
    """

    tensors: tuple[DiskTensor, ...]
    untouched: tuple[str, ...]
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Group:
    """What the library loads together: one conversion, and the tensors on disk that it reads."""

    target: str
    conversion: Any
    names: list[str]


_maps: dict[tuple[Any, ...], DiskMap] = {}
_KEPT = 4


def disk_tensors(
    model: PreTrainedModel,
    parameters: Mapping[str, int],
    on_disk: Mapping[str, tuple[int, ...]],
) -> list[DiskTensor]:
    """The tensors on disk that hold ``parameters``; see ``disk_map``."""
    return list(disk_map(model, parameters, on_disk).tensors)


def disk_map(
    model: PreTrainedModel,
    parameters: Mapping[str, int],
    on_disk: Mapping[str, tuple[int, ...]],
) -> DiskMap:
    """Finds where on disk each parameter is.

    Args:
        model: the model as it is loaded; it may be on the meta device, values are never read.
        parameters: the d_model axis of each parameter of interest.
        on_disk: the shape of every tensor in the checkpoint, from the safetensors headers.

    Raises:
        PlanError: a parameter is not on disk, not all of it, or in a form in which d_model is not
            one whole axis; or a tensor cannot be placed.
        ShapeMismatchError: a tensor that the model loads has another shape than it.
    """
    if method := getattr(model.config, "quantization_config", None):
        # Its tensors are codes with scales beside them, on which an edit has no meaning.
        raise PlanError(f"the checkpoint is quantised ({_method(method)}): edit the original")
    # An edit, its check and its source ask for the same map, which depends on these alone.
    held = tuple((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
    shapes = tuple((name, tuple(shape)) for name, shape in on_disk.items())
    config = values_of(model.config)
    key = (type(model), config, held, tuple(parameters.items()), shapes)
    if key not in _maps:
        found = _find(model, parameters, dict(shapes))
        while len(_maps) >= _KEPT:
            del _maps[next(iter(_maps))]
        _maps[key] = found
    return _maps[key]


def _find(
    model: PreTrainedModel, parameters: Mapping[str, int], disk: dict[str, tuple[int, ...]]
) -> DiskMap:
    aliases = parameter_aliases(model)
    axes = _checked_axes(model, parameters, aliases)
    groups, untouched = _groups(model, disk)
    names, shapes = list(disk), list(disk.values())
    tensors: list[DiskTensor] = []
    loaded: set[str] = set()
    for group in groups:
        tensors += _group_tensors(model, group, axes, aliases, names, shapes, loaded)
    for name in axes.keys() - {tensor.parameter for tensor in tensors}:
        raise PlanError(f"{name} is not on disk: nothing in the checkpoint loads as it")
    _check_disjoint(tensors)
    absent = tuple(sorted(set(aliases.values()) - loaded))
    return DiskMap(tuple(tensors), tuple(untouched), absent)


def _method(quantization: Any) -> str:
    if isinstance(quantization, dict):
        return str(quantization.get("quant_method"))
    return str(getattr(quantization, "quant_method", quantization))


def _checked_axes(
    model: PreTrainedModel, parameters: Mapping[str, int], aliases: Mapping[str, str]
) -> dict[str, int]:
    axes: dict[str, int] = {}
    for name, axis in parameters.items():
        if name not in aliases:
            raise PlanError(f"{name} is not a parameter of {type(model).__name__}")
        parameter: nn.Parameter = model.get_parameter(name)
        if not 0 <= axis < parameter.ndim:
            raise PlanError(f"{name} has no axis {axis}: its shape is {tuple(parameter.shape)}")
        if axes.setdefault(aliases[name], axis) != axis:
            raise PlanError(f"{name} is tied to {aliases[name]}, planned along another axis")
    return axes


def _groups(
    model: PreTrainedModel, disk: Mapping[str, tuple[int, ...]]
) -> tuple[list[_Group], list[str]]:
    """Gives every tensor on disk to the conversion that reads it, as the library does on loading.

    The second element has the names that the model does not load.
    """
    numbers = {name: number for number, name in enumerate(disk)}
    groups: dict[str, _Group] = {}
    untouched: list[str] = []
    for loaded in loaded_names(model, disk, get_model_conversion_mapping(model)):
        name, key = loaded.name, loaded.key
        if key is None:
            untouched.append(name)
            continue
        if key not in groups:
            conversion = loaded.converter or WeightRenaming(name, key)
            groups[key] = _Group(key, deepcopy(conversion), [])
        tensor = leaf(numbers[name], disk[name])
        groups[key].conversion.add_tensor(key, name, loaded.pattern or name, tensor)
        groups[key].names.append(name)
    return list(groups.values()), untouched


def _group_tensors(
    model: PreTrainedModel,
    group: _Group,
    axes: Mapping[str, int],
    aliases: Mapping[str, str],
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    loaded: set[str],
) -> list[DiskTensor]:
    """The planned tensors among those that ``group`` reads; all its parameters go to ``loaded``."""
    placed: list[DiskTensor] = []
    results = _convert(model, group, axes, aliases)
    targets = results or _targets(group)
    loaded.update(aliases.get(key, key) for key in targets)
    for key, traced in results.items():
        parameter = aliases.get(key, key)
        if parameter not in aliases:
            continue  # a buffer
        # Of parameters that are not planned too: a model of other shapes is another model.
        expected = tuple(model.get_parameter(parameter).shape)
        if tuple(traced.shape) != expected:
            raise ShapeMismatchError(parameter, group.names[0], expected, tuple(traced.shape))
        if parameter not in axes:
            continue
        try:
            held = regions(traced, axes[parameter], shapes)
        except (RegionError, TraceError) as error:
            raise PlanError(f"cannot place {parameter} on disk: {error}") from error
        placed += [
            DiskTensor(
                name=names[box.source],
                shape=shapes[box.source],
                axis=_axis(box, axes[parameter]),
                parameter=parameter,
                loads_as=key,
                part=_unless_whole(box.part, expected),
                region=_unless_whole(box.region, shapes[box.source]),
            )
            for box in held
        ]
    # Where everything that is read is planned, a tensor that is not was left out by the library.
    unplanned = set(group.names) - {tensor.name for tensor in placed}
    if unplanned and results and all(aliases.get(key, key) in axes for key in results):
        raise PlanError(f"{min(unplanned)} also claims to be {group.target}, which is loaded twice")
    return placed


def _convert(
    model: PreTrainedModel, group: _Group, axes: Mapping[str, int], aliases: Mapping[str, str]
) -> dict[str, Traced]:
    """The parameters that the library makes of ``group``, traced to the tensors on disk."""
    conversion = group.conversion
    try:
        results = conversion.convert(group.target, model=model, config=model.config)
    except Exception as error:
        # Of no concern unless a planned parameter should have come out.
        if any(aliases.get(target, target) in axes for target in _targets(group)):
            reason = str(error).partition("\n")[0]
            raise PlanError(
                f"cannot follow {group.names[0]} into {group.target}: {reason}"
            ) from error
        return {}
    return {key: v[0] if isinstance(v, list) else v for key, v in results.items()}


def _targets(group: _Group) -> list[str]:
    """The names of what the library makes of ``group``."""
    patterns = group.conversion.target_patterns
    return [group.target.replace(patterns[0], pattern) for pattern in patterns]


def _axis(box: Region, axis: int) -> int:
    disk_axis = box.axes[axis]
    if disk_axis is None:
        raise PlanError("d_model is 1")
    return disk_axis


def _unless_whole(ranges: Ranges, shape: tuple[int, ...]) -> Ranges | None:
    return None if ranges == tuple((0, size) for size in shape) else ranges


def _check_disjoint(tensors: list[DiskTensor]) -> None:
    """No element on disk is planned twice."""
    seen: dict[str, list[DiskTensor]] = {}
    for tensor in tensors:
        for other in seen.setdefault(tensor.name, []):
            if (
                tensor.region is None
                or other.region is None
                or all(
                    max(a[0], b[0]) < min(a[1], b[1])
                    for a, b in zip(tensor.region, other.region, strict=True)
                )
            ):
                raise PlanError(
                    f"{tensor.name} is planned twice, for {other.parameter} and {tensor.parameter}"
                )
        seen[tensor.name].append(tensor)
