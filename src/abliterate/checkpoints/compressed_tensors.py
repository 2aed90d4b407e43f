"""What ``quantization_config`` says of weights that the compressed-tensors package stores.

Its 8-bit numbers with a scale per tensor, row, group or block can be edited and stored again. What
has fewer bits, a zero point or zeros in fixed places was fitted to the weights in ways that an edit
would undo.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

METHOD = "compressed-tensors"
_FORMATS = {"float-quantized", "naive-quantized", "int-quantized", "pack-quantized"}


def unsupported_scheme(settings: Mapping[str, Any]) -> str | None:
    """The name of what cannot be edited in a checkpoint with these settings; None if all can."""
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, Mapping):
        form = str(sparsity.get("format") or "dense")
        if form != "dense" or sparsity.get("sparsity_structure") == "2:4":
            kind = "2:4 sparse" if "24" in form or form == "dense" else "sparse"
            return f"{METHOD} {kind} ({form})"
    transform = settings.get("transform_config")
    if isinstance(transform, Mapping) and transform.get("config_groups"):
        return f"{METHOD} with transforms of its weights (transform_config)"
    for group in _groups(settings):
        weights = group["weights"]
        form = str(group.get("format") or settings.get("format") or "an unnamed format")
        bits, kind = weights.get("num_bits", 8), str(weights.get("type", "int"))
        name = f"{METHOD} {_short_name(bits, kind, group)} ({form})"
        if bits != 8 or form not in _FORMATS or kind not in ("int", "float"):
            return name
        if weights.get("symmetric", True) is not True:
            return f"{name} with zero points"
        if weights.get("actorder") == "group":
            return f"{name} with reordered groups"
    return None


def _short_name(bits: Any, kind: str, group: Mapping[str, Any]) -> str:
    inputs = group.get("input_activations")
    of_inputs = inputs.get("num_bits", 8) if isinstance(inputs, Mapping) else 16
    return f"{'FP' if kind == 'float' else 'INT'}{bits} W{bits}A{of_inputs}"


def packs_eight_bits(settings: Mapping[str, Any]) -> bool:
    """Whether all that is packed into 32-bit words are eight-bit integers, four to a word."""
    return all(group["weights"].get("num_bits", 8) == 8 for group in _groups(settings))


def scale_blocks(settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Rows and columns that share a scale, for every group that says so in numbers."""
    for group in _groups(settings):
        weights = group["weights"]
        block, size = weights.get("block_structure"), weights.get("group_size")
        if isinstance(block, str):
            block = [int(part) if part.isdecimal() else 0 for part in block.split("x")]
        if isinstance(block, list | tuple) and len(block) == 2:
            rows, columns = block
            if type(rows) is int and type(columns) is int and min(rows, columns) > 0:
                yield rows, columns
        if type(size) is int and size > 0:
            yield 1, size


def _groups(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The groups whose weights are quantized."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping):
            yield group
