"""Weights of an edit by layer and component, from a file: ``--layer-scale FILE``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from abliterate.errors import UsageError
from abliterate.settings import parse_layers
from abliterate.settings.complaints import complaint
from abliterate.storage.json_text import parse_json

# What each component is looked up as, the nearest first.
COMPONENTS: dict[str, tuple[str, ...]] = {
    "attention": ("attention",),
    "mixer": ("mixer", "attention"),
    "mlp": ("mlp",),
    "expert": ("expert", "mlp"),
    "embedding": ("embedding",),
    "position": ("position", "embedding"),
    "other": ("other",),
}
_MOST = 1 << 20  # bytes


def _known(value: dict[str, float]) -> dict[str, float]:
    """Refuse a name that is no component's."""
    for name in value:
        if name not in COMPONENTS:
            raise ValueError(f"'{name}' is no component: there are {', '.join(COMPONENTS)}")
    return value


class LayerScale(BaseModel):
    """What the scale of an edit is multiplied by, for each tensor.

    Attributes:
        default: where nothing else is said.
        components: by component, in all layers and outside of them.
        layers: by layer (``4``, ``0-3``): for all of its components, or by component.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    default: float = 1.0
    components: dict[str, float] = Field(default_factory=dict)
    layers: dict[str, float | dict[str, float]] = Field(default_factory=dict)

    _components = field_validator("components")(_known)

    @field_validator("layers")
    @classmethod
    def _each_once(
        cls, value: dict[str, float | dict[str, float]]
    ) -> dict[str, float | dict[str, float]]:
        seen = set[int]()
        for text, held in value.items():
            try:
                layers = parse_layers(text, "a layer") or frozenset()
            except UsageError as error:
                raise ValueError(str(error)) from None
            if both := seen & layers:
                raise ValueError(f"layer {min(both)} is given twice")
            seen |= layers
            if isinstance(held, dict):
                _known(held)
        return value

    def named(self) -> list[int]:
        """The layers that it names."""
        return sorted(layer for text in self.layers for layer in parse_layers(text) or ())

    def weight(self, kind: str, layer: int | None) -> float:
        """The weight of a tensor: that of its layer before that of its component.

        Args:
            kind: what it belongs to.
            layer: its decoder block, or None.
        """
        names = COMPONENTS.get(kind, (kind,))
        for text, held in self.layers.items():
            if layer is None or layer not in (parse_layers(text) or ()):
                continue
            if not isinstance(held, dict):
                return held
            for name in names:
                if name in held:
                    return held[name]
        return next((self.components[n] for n in names if n in self.components), self.default)


def read_layer_scale(path: Path) -> LayerScale:
    """The weights in a JSON or TOML file.

    Raises:
        UsageError: it cannot be read, or names what there is not.
    """
    try:
        if not path.is_file() or path.stat().st_size > _MOST:
            raise UsageError(f"--layer-scale {path}: there is no such file of weights")
        text = path.read_text(encoding="utf-8")
        held: Any = tomllib.loads(text) if path.suffix.lower() == ".toml" else parse_json(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--layer-scale {path} is no JSON or TOML: {str(error)[:200]}") from None
    return check_layer_scale(held, f"--layer-scale {path}")


def check_layer_scale(document: Any, where: str) -> LayerScale:
    """Weights as a document holds them.

    Raises:
        UsageError: they are none.
    """
    try:
        return LayerScale.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][:2])
        message = complaint(first)
        raise UsageError(f"{where}: {place or 'the document'}: {message}") from None
