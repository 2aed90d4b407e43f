"""Under which name the library loads each tensor on disk, and through which conversion."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True)
class LoadedName:
    """What the library makes of a tensor's name.

    Attributes:
        name: on disk.
        key: the state-dict name that it is loaded as, or into which it is converted first; None
            where the model does not load it.
        pattern: of the converter, that the name matches; None where it is only renamed.
        converter: what splits, fuses or transposes it, or None.
    """

    name: str
    key: str | None
    pattern: str | None = None
    converter: Any = None


def loaded_names(
    model: PreTrainedModel, names: Collection[str], conversions: Sequence[Any]
) -> Iterator[LoadedName]:
    """Every tensor's, in the order in which the library takes them.

    This is the first half of ``convert_and_load_state_dict_in_model``.

    Args:
        model: the model, which may be on the meta device.
        names: of the tensors on disk.
        conversions: the library's, of ``get_model_conversion_mapping``.
    """
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = rename_source_key(name, [], [], prefix, state)
        if key in state:
            yield LoadedName(name, key, pattern, by_pattern[pattern] if pattern else None)
        else:
            yield LoadedName(name, None)
