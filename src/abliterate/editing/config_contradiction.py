"""Which number of ``config.json`` is not that of the tensors beside it.

A wrong number of heads or a wrong inner width changes the shapes of parameters that no edit
touches: the checkpoint would be written, and could be loaded by nobody.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from abliterate.checkpoints.config_sizes import CONFIG
from abliterate.errors import CheckpointError, PlanError, ShapeMismatchError
from abliterate.models.model_classes import build_draft, text_config
from abliterate.writers.disk_tensors import DiskMap, disk_map


def map_matching(
    folder: Path,
    model: PreTrainedModel,
    parameters: Mapping[str, int],
    on_disk: Mapping[str, tuple[int, ...]],
    whole: bool = True,
) -> DiskMap:
    """As :func:`~abliterate.writers.disk_tensors.disk_map`; a contradiction names its number.

    Args:
        folder: of ``config.json``.
        model: on the meta device.
        parameters: the d_model axis of each parameter of interest.
        on_disk: the shape of every tensor in the checkpoint.
        whole: refuse one that lacks other parameters, with which nothing could load it.

    Raises:
        PlanError: as there.
        CheckpointError: a tensor has another shape than the model of the configuration, or none
            loads as a parameter.
    """
    try:
        found = disk_map(model, parameters, on_disk)
    except ShapeMismatchError as error:
        said = _wrong_number(model.config, error, parameters, on_disk)
        raise CheckpointError(
            f"{folder / CONFIG} {said}, but tensor '{error.tensor}' gives {error.parameter} the "
            f"shape {list(error.found)} and not {list(error.expected)}: they do not belong together"
        ) from None
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    absent = [n for n in found.absent if not any(re.search(pattern, n) for pattern in ignored)]
    if absent and whole:
        raise CheckpointError(
            f"{folder} lacks a tensor for parameter '{absent[0]}'"
            + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
            + f" of the model that {CONFIG} describes: the checkpoint is incomplete, or another's"
        )
    return found


def _wrong_number(
    config: Any,
    error: ShapeMismatchError,
    parameters: Mapping[str, int],
    on_disk: Mapping[str, tuple[int, ...]],
) -> str:
    """The number that, mended, gives the tensors their shapes; or those that it may be."""
    possible = []
    for key, value, mended in _mends(config, error):
        other = deepcopy(config)
        setattr(text_config(other), key, mended)
        try:
            model = build_draft(other)
            shape = tuple(model.get_parameter(error.parameter).shape)
            if shape != error.found:
                continue
            possible.append(f"{key} is {value:,}")
            disk_map(model, parameters, on_disk)
        except PlanError:
            continue  # another one does not fit then
        except Exception:  # whatever a constructor objects to
            continue
        return f"says {key} is {value:,}"
    return f"says {' and '.join(possible)}" if possible else "describes another model"


def _mends(config: Any, error: ShapeMismatchError) -> Iterator[tuple[str, int, int]]:
    """Numbers that may make up a length that is wrong: key, value, and what it would have to be."""
    if len(error.expected) != len(error.found):
        return
    wrong = [(e, f) for e, f in zip(error.expected, error.found, strict=True) if e != f]
    for key, value in text_config(config).to_dict().items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            continue
        for expected, found in wrong:
            if expected % value == 0 and (found * value) % expected == 0:
                yield key, value, found * value // expected
