"""What ``config.json`` says of a model's sizes, held against the tensors that are there.

A model is built from its configuration, and a configuration may say anything: a hundred thousand
layers take minutes and all memory before the first missing tensor is noticed. So its numbers are
compared with the headers of the weights first; where no weights lie beside it, with what any model
has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from abliterate.checkpoints.quantized_formats import read_config
from abliterate.checkpoints.shards import MAX_CONFIG, ShardSet
from abliterate.errors import CheckpointError

CONFIG = "config.json"
#: More heads, experts, loops or groups than this no model has.
MAX_COUNT = 10_000
#: And more layers: building so many takes seconds, even of tensors without memory.
MAX_LAYERS = 1_000
# Doge looks its experts up in tables: 16,384 rows by its own default.
_MAX_OF = {"experts": 1 << 20} | dict.fromkeys(("layer", "layers", "blocks", "depth"), MAX_LAYERS)
#: Numbers and tensors of a model, and the length of one: more than any has.
NUMBERS, TENSORS, LENGTH = 10**13, 150_000, 1 << 26

# The last word of a key that counts what is built, or run, one by one.
_COUNTED = frozenset(
    (
        *("layer", "layers", "block", "blocks", "expert", "experts", "head", "heads", "depth"),
        *("group", "groups", "loops", "cycles", "iters", "iterations", "repeats", "recycles"),
        *("stages", "codebooks", "quantizers"),
    )
)
_PASSES = 4
_AT_LEAST_ONE = (
    *("hidden_size", "intermediate_size", "vocab_size", "head_dim"),
    *("num_attention_heads", "num_key_value_heads"),
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Held:
    """The tensors of a checkpoint.

    Attributes:
        shapes: by name; None where only the index is there.
    """

    shapes: Mapping[str, tuple[int, ...] | None]

    @classmethod
    def of(cls, shards: ShardSet) -> Held:
        return cls({name: entry.shape for name, entry in shards.tensors.items()})

    @cached_property
    def layers(self) -> int | None:
        """Layers, by the first number in the tensors' names; None where none has one."""
        numbers = (
            next((int(p) for p in name.split(".") if _is_number(p)), -1) for name in self.shapes
        )
        return max(numbers, default=-1) + 1 or None

    @cached_property
    def experts(self) -> int | None:
        """Experts of a layer, numbered or stacked; None where there are none."""
        max_experts = 0
        for name, shape in self.shapes.items():
            if "expert" not in name:
                continue
            numbers = [int(part) for part in name.split(".") if _is_number(part)]
            max_experts = max(max_experts, *(n + 1 for n in numbers[1:]), (shape or (0,))[0])
        return max_experts or None

    @cached_property
    def lengths(self) -> frozenset[int]:
        """Every length that some tensor has along an axis."""
        return frozenset(n for shape in self.shapes.values() for n in shape or ())

    @property
    def elements(self) -> int:
        """Numbers in all tensors, as they are stored."""
        return sum(math.prod(shape or ()) for shape in self.shapes.values())

    @property
    def has_shapes(self) -> bool:
        return None not in self.shapes.values()

    def __str__(self) -> str:
        layers = "" if self.layers is None else f" in {_many(self.layers, 'layer')}"
        return _many(len(self.shapes), "tensor") + layers


def check_counts(folder: Path, held: Held | None) -> None:
    """Refuse a ``config.json`` that counts what no model has, before anything is made of it.

    Args:
        folder: of the configuration.
        held: the tensors beside it, or None.

    Raises:
        CheckpointError: it does, or is damaged.
    """
    path = folder / CONFIG
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no regular file")
    if path.is_file() and path.stat().st_size > MAX_CONFIG:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes: it is no configuration")
    config = read_config(folder)
    absurd = absurd_count(config)
    if absurd is not None:
        raise CheckpointError(_absurd(path, *absurd, held))


def check_sizes(folder: Path, config: Any, held: Held | None) -> None:
    """Refuse a configuration whose language model is larger than what is there.

    Args:
        folder: of the configuration.
        config: the language model's, as transformers read it.
        held: the tensors of the checkpoint, or None if only the configuration is there.

    Raises:
        CheckpointError: layers, experts, width or vocabulary are not those of the tensors.
    """
    path, raw = folder / CONFIG, dict(_numbers(read_config(folder)))

    def refuse(key: str, value: int, of_it: str = "") -> None:
        same = [k for k, v in raw.items() if v == value and key not in raw]
        key = same[0] if len(same) == 1 else key
        raise CheckpointError(_absurd(path, key, value, held, of_it))

    contradiction = _contradiction(config, raw)
    if contradiction is not None:
        raise CheckpointError(f"{path} says {contradiction}: it is damaged")
    layers = _size(config, "num_hidden_layers")
    # Some count a block several times that is passed several times, or its halves.
    known = None if held is None else held.layers
    max_layers = (
        MAX_LAYERS if held is None or known is None else max(_PASSES * known, len(held.shapes))
    )
    if layers is not None and not 1 <= layers <= max_layers:
        refuse("num_hidden_layers", layers)
    if held is None or not held.has_shapes or getattr(config, "quantization_config", None):
        return
    for key in _EXPERTS:
        value = _size(config, key)
        if value is not None and held.experts is not None and value > held.experts:
            refuse(key, value, f" of {_many(held.experts, 'expert')}")
    width, vocabulary = _size(config, "hidden_size"), _size(config, "vocab_size")
    if width is not None and width not in held.lengths:
        refuse("hidden_size", width, f", none {width:,} long")
    longest = max(held.lengths, default=0)
    if vocabulary is not None and vocabulary > longest:
        refuse("vocab_size", vocabulary, f", none longer than {longest:,}")


def _contradiction(config: Any, raw: Mapping[str, float]) -> str | None:
    """What a configuration says that no model can be, if anything: a field and its value.

    Args:
        config: as transformers read it, which may call a field by several names.
        raw: the numbers of the file, by the name that they have there.
    """
    for key in _AT_LEAST_ONE:
        value = _size(config, key)
        if value is not None and value < 1:
            return f"{key} is {value}, which no model has"
    heads, grouped = (_size(config, f"num_{which}_heads") for which in ("attention", "key_value"))
    if heads is not None and grouped is not None and heads % grouped:
        return f"num_key_value_heads is {grouped}, which does not divide {heads} attention heads"
    used = _size(config, "num_experts_per_tok")
    for key in sorted(_EXPERTS, key=lambda key: key not in raw):
        experts = _size(config, key)
        if experts is not None and used is not None and used > experts:
            return f"num_experts_per_tok is {used}, of {key} {experts}"
    return None


def absurd_count(config: Mapping[str, Any]) -> tuple[str, float] | None:
    """A key of a configuration that counts more than any model has, and its value."""
    for key, value in _numbers(config):
        counted = key.rpartition("_")[2].lower()
        max_count = _MAX_OF.get(counted, MAX_COUNT)
        if counted in _COUNTED and not value <= max_count:
            return key, value
    return None


def _absurd(path: Path, key: str, value: float, held: Held | None, of_it: str = "") -> str:
    said = f"{path} says {key[:80]} is {value:,}"
    if held is None:
        return f"{said}, which no model has: it is damaged"
    return f"{said}, but the files beside it hold {held}{of_it}: they do not belong together"


def _numbers(config: Any) -> Iterator[tuple[str, float]]:
    """Every number under a key, at any depth."""
    sections = [config]
    while sections:
        section = sections.pop()
        for key, value in section.items() if isinstance(section, dict) else ():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield str(key), value
            elif isinstance(value, dict):
                sections.append(value)
            elif isinstance(value, list):
                sections += [item for item in value if isinstance(item, dict)]


def _size(config: Any, key: str) -> int | None:
    try:
        value = getattr(config, key, None)
    except Exception:  # the library's own: one that differs by layer has no single value
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal() and len(part) <= 9


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
