"""The options that the record of an edit, ``abliterate.json``, names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterate.editing.layer_scale import check_layer_scale
from abliterate.editing.options import EditOptions
from abliterate.errors import InputError, UsageError

_KINDS: dict[str, Any] = {
    "layers": str,
    "components": str,
    "scale": int | float,
    "norm_preserve": bool | str,
    "tied_embeddings": str,
    "quantized": str,
    "add": int | float,
    "as_lora": bool,
}


def recorded_options(record: Mapping[str, Any], path: Path) -> EditOptions:
    """The options of an edit, all but where it was computed.

    Args:
        record: ``abliterate.json``.
        path: where it lies, for errors.

    Raises:
        InputError: it is no record of an edit.
    """
    wrong = InputError(f"{path} is no record of an edit: restore it or remove it")
    said = record.get("options")
    if not isinstance(said, dict):
        raise wrong
    given = {name: said[name] for name in _KINDS if said.get(name) is not None}
    if not all(isinstance(value, _KINDS[name]) for name, value in given.items()):
        raise wrong
    if given.get("quantized") not in (None, "requantize", "dequantize"):
        raise wrong
    left = said.get("leave_behind", ["*"])  # before there was the option, all stayed behind
    if not isinstance(left, list) or not all(isinstance(name, str) for name in left):
        raise wrong
    try:
        weights = said.get("layer_scale")
        scales = None if weights is None else check_layer_scale(weights, str(path))
        return EditOptions(**given, layer_scale=scales, leave_behind=tuple(left))
    except UsageError:
        raise wrong from None
