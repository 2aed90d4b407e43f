"""A direction as an artifact: the vector and where it was taken from.

The same places may hold a direction set (``abliterate.direction_set``);
``abliterate.direction_loading`` reads either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.direction_set import (
    DirectionSet,
    save_direction_set,
)
from abliterate.errors import InputError, UsageError
from abliterate.metrics.vector_algebra import VectorAlgebra
from abliterate.projection import WHOLE, Projection
from abliterate.storage.artifacts import (
    hash_text,
    write_tensors,
)
from abliterate.storage.ownership import claim_file, has_metadata

if TYPE_CHECKING:
    from torch import Tensor

FILE_NAME = "direction.safetensors"


@dataclass(frozen=True, repr=False)
class Direction(VectorAlgebra):
    """An unnormalised difference of means.

    ``-d``, ``d * 0.5``, ``d + other`` and ``d.cosine(other)`` work as they read.

    Attributes:
        vector: ``[d_model]``, on the host: what a device holds is fetched.
        position: source token, counted from the prompt's end, or None if not recorded.
        layer: source layer, or None if not recorded.
        sha256: hash of the file it was read from.
        project_harmless: what it had along the mean harmless activation was removed.
        model: folder or hub id of the model that it was taken from, or None if not recorded.
        project_first_token: what it had along the first token's mean residual stream was removed.
        taken_out: what of this was removed when it was loaded, and not when it was selected.

    Source:
        Section 2.3.

    Examples:
        >>> d = ex[-1, 5]
        >>> d.layer, d.position
        (5, -1)
        >>> round((-d * 0.5).cosine(d), 6)
        -1.0
    """

    vector: Tensor
    position: int | None = None
    layer: int | None = None
    sha256: str | None = None
    project_harmless: bool = False
    model: str | None = None
    project_first_token: bool = False
    taken_out: Projection = field(default=WHOLE, compare=False)

    def __post_init__(self) -> None:
        # What is computed of a direction alone is float64, which not every device has.
        place = getattr(self.vector, "device", None)
        if place is not None and place.type not in ("cpu", "meta"):
            object.__setattr__(self, "vector", self.vector.detach().cpu())

    @property
    def projection(self) -> Projection:
        """What it is without."""
        return Projection(self.project_harmless, self.project_first_token)

    @property
    def key(self) -> str | None:
        """What decides about the vector: the file, and what was taken out of it then."""
        names = self.projection.names
        return hash_text(str(self.sha256), *names) if names else self.sha256

    def summary(self) -> dict[str, Any]:
        """What other artifacts record of it."""
        return {
            "sha256": self.sha256,
            "position": self.position,
            "layer": self.layer,
            "norm": float(self.vector.double().norm()),
            **self.projection.record,
            **self.taken_out.when_loaded,
        }

    def save(self, path: str | Path) -> Path:
        """Write the direction to a file that :func:`load_direction` and ``--direction`` read.

        Args:
            path: a name that ends in ``.safetensors``; an earlier direction there is replaced.

        Returns:
            The file.

        Raises:
            InputError: the name is taken by a link.
            UsageError: the name ends otherwise, or the file there is something else.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise UsageError(f"{path}: a direction is saved as safetensors: end the name so")
        claim_file(path, has_metadata("position", "layer", "model"), "save")
        save_direction(path, self, self.model or "unknown")
        return path


def save_direction(
    path: Path,
    direction: Direction,
    model: str,
    revision: str | None = None,
    directions: DirectionSet | None = None,
    subspace: Tensor | None = None,
) -> None:
    """Write ``direction.safetensors``; position, layer and model go into the metadata.

    Args:
        path: the file.
        direction: the direction.
        model: folder or hub id of the model.
        revision: its commit on the hub, or None for a folder.
        directions: a set to be kept with it; who reads the file then reads that.
        subspace: ``[k, d_model]``, what the direction is one of; kept beside it.
    """
    metadata = {"position": str(direction.position), "layer": str(direction.layer), "model": model}
    metadata |= {} if revision is None else {"revision": revision}
    metadata |= direction.projection.metadata
    if directions is not None:
        return save_direction_set(path, directions, metadata, direction.vector)
    # A copy: safetensors takes no two tensors of one memory.
    beside = {} if subspace is None else {"subspace": subspace.clone()}
    return write_tensors(path, {"direction": direction.vector, **beside}, metadata)


def recorded_direction(record: Mapping[str, Any], path: Path) -> Direction:
    """The direction that the record of an edit holds, as it was given to the edit.

    Args:
        record: ``abliterate.json``. Older ones hold the unit vector and the norm alone, whose
            product is the direction up to float64's rounding.
        path: where it lies, for errors.

    Raises:
        InputError: it holds no direction.
    """
    own = record.get("direction")
    of_it = own if isinstance(own, Mapping) else {}
    unit: Any = record.get("vector")
    norm: Any = of_it.get("norm")
    values = record.get("unnormalised")
    if not (_numbers(unit) and _numbers([norm]) and (values is None or _numbers(values))):
        held = ", ".join(sorted(record)[:6]) or "nothing"
        raise InputError(
            f"{path} is no record of an edit that holds its direction (it has: {held}): give the "
            "abliterate.json of an edited checkpoint, a run folder or a safetensors file"
        )

    def whole(key: str) -> int | None:
        value = of_it.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    import torch

    sha256, projection = of_it.get("sha256"), Projection.recorded(of_it)
    vector = torch.tensor([*map(float, unit if values is None else values)], dtype=torch.float64)
    return Direction(
        vector * float(norm) if values is None else vector,
        whole("position"),
        whole("layer"),
        sha256 if isinstance(sha256, str) else None,
        projection.harmless,
        project_first_token=projection.first_token,
    )


def _numbers(values: Any) -> bool:
    """Whether it is a list of finite numbers, and not empty."""
    return (
        isinstance(values, list)
        and bool(values)
        and all(
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and abs(value) < 1e300
            and math.isfinite(value)
            for value in values
        )
    )
