"""A direction set as an artifact: one direction for each decoder block.

Row ``l`` was found in (or is meant for) ``resid_pre[l]``, what enters block ``l``. Ablation and the
edit use it for what block ``l`` itself writes; what is written before the first block (embeddings)
takes the first direction that there is, or one of its own. docs/direction-sets.md says why.

In a safetensors file: ``directions`` ``[n_layers, d_model]``, a zero row where a layer has none;
``embedding`` ``[d_model]`` where it has one of its own (zero: none, it is left alone; likewise
where ``audit --save-directions`` wrote the file, with ``edit`` in its metadata, and there is no
such tensor). The metadata may hold ``candidates``: JSON, ``[position, layer]`` or null for each
row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.console import log
from abliterate.errors import InputError
from abliterate.exchange import ForeignVectors
from abliterate.projection import WHOLE, Projection
from abliterate.storage.artifacts import hash_text, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

DIRECTIONS, EMBEDDING = "directions", "embedding"
Candidate = tuple[int, int] | None
# Of a difference of two means this share of them is rounding, not a direction.
_NOTHING = 1e-9
# No prompt is longer; what is read of a file is to stay a number that others can hold.
_FURTHEST = 1 << 31


@dataclass(frozen=True, eq=False)
class DirectionSet:
    """One direction for each decoder block, on the host; none needs to have length one.

    Attributes:
        vectors: float64 ``[n_layers, d_model]``; a zero row where a layer has none.
        embedding: ``[d_model]``, of what writes to the stream before the first block, zero if that
            is left alone; None for the first row that is not zero.
        candidates: position and layer that each row was taken from, as far as that is known.
        sha256: hash of the file it was read from, and of what was done to it then.
        projection: what each is without.
        interpolate: how rows between others were made, as ``--interpolate`` has it, or None.
        position: all are differences of means at this position, counted from the prompt's end.
        file: hash of the file alone.
        listed: its layers are listed one by one, so that it does not say how many the model has.
        place: the file, for messages; empty for one that is made in memory.
        taken_out: what of ``projection`` was removed when it was loaded, not when it was selected.
    """

    vectors: Tensor
    embedding: Tensor | None = None
    candidates: tuple[Candidate, ...] = ()
    sha256: str | None = None
    projection: Projection = WHOLE
    interpolate: str | None = None
    position: int | None = None
    file: str | None = None
    listed: bool = field(default=False)
    place: str = field(default="", compare=False)
    taken_out: Projection = field(default=WHOLE, compare=False)

    @property
    def key(self) -> str | None:
        """What decides about the vectors: the file, and what was done to them then."""
        return self.sha256

    @property
    def layers(self) -> list[int]:
        """The layers that have a direction."""
        return [layer for layer, there in enumerate(self.vectors.any(dim=1).tolist()) if there]

    @property
    def outside(self) -> Tensor:
        """The direction of what is written before the first block, zero if there is none."""
        if self.embedding is not None:
            return self.embedding
        layers = self.layers
        return self.vectors[layers[0]] if layers else self.vectors.new_zeros(self.width)

    @property
    def width(self) -> int:
        return int(self.vectors.shape[1])

    def at(self, layer: int | None) -> Tensor | None:
        """The direction ``[d_model]`` of a block, or of what is before them; None: it has none."""
        vector = self.outside if layer is None else self.vectors[layer]
        return vector if bool(vector.any()) else None

    def fit(self, n_layers: int, d_model: int) -> DirectionSet:
        """The set for a model, checked.

        Raises:
            InputError: it is another model's, empty or not finite.
        """
        if self.vectors.ndim != 2 or not self.vectors.is_floating_point():
            raise InputError(
                f"{self.named}: the directions must be [n_layers, d_model] floats, not "
                f"{list(self.vectors.shape)} {self.vectors.dtype}"
            )
        rows, width = self.vectors.shape
        if self.listed and n_layers == rows - 1:
            # Behind the last block: other programs count the block whose output it is.
            log.warning("the direction behind the last block enters no block: it is left out")
            return self._first(n_layers).fit(n_layers, d_model)
        if width != d_model or not (rows == n_layers or (self.listed and rows < n_layers)):
            held = f"layers up to {rows - 1}" if self.listed else f"{rows} layers"
            raise InputError(
                f"{self.named} is for {held} of width {width}, the model has {n_layers} of "
                f"width {d_model}: it was made for another model"
            )
        if self.embedding is not None and tuple(self.embedding.shape) != (d_model,):
            raise InputError(
                f"{self.named}: the embedding's direction has shape "
                f"{list(self.embedding.shape)}, the model needs [{d_model}]"
            )
        wide = self.vectors.detach().cpu().double()
        own = None if self.embedding is None else self.embedding.detach().cpu().double()
        if not bool(wide.isfinite().all()) or not (own is None or bool(own.isfinite().all())):
            raise InputError(f"{self.named} holds NaN or infinity")
        if rows < n_layers:
            after = wide[-1:] if self.interpolate else wide.new_zeros(1, width)
            wide = concatenated(wide, after.expand(n_layers - rows, -1))
        candidates = (*self.candidates, *[None] * (n_layers - len(self.candidates)))
        fitted = replace(
            self, vectors=wide, embedding=own, candidates=candidates[:n_layers], listed=False
        )
        if not fitted.layers:
            raise InputError(f"{self.named} holds no direction: every row is zero")
        return fitted

    @property
    def named(self) -> str:
        """What errors call it."""
        return f"the direction set of {self.place}" if self.place else "the direction set"

    def _first(self, n_layers: int) -> DirectionSet:
        return replace(self, vectors=self.vectors[:n_layers], candidates=self.candidates[:n_layers])

    def units(self, n_layers: int, d_model: int) -> Tensor:
        """Unit rows ``[1 + n_layers, d_model]``, that of the embedding first; zero: none.

        Raises:
            InputError: as :meth:`fit`.
        """
        fitted = self.fit(n_layers, d_model)
        rows = concatenated(fitted.outside[None], fitted.vectors)
        # Of entries whose squares would vanish or overflow, too.
        largest = rows.abs().amax(dim=1, keepdim=True)
        rows = rows / largest.masked_fill(largest == 0, 1.0)
        norms = rows.norm(dim=1, keepdim=True)
        units: Tensor = rows / norms.masked_fill(norms == 0, 1.0)
        return units

    def summary(self) -> dict[str, Any]:
        """What other artifacts record of it; the keys of one direction are there, and empty."""
        return {
            "sha256": self.sha256,
            "position": self.position,
            "layer": None,
            "norm": None,
            "layers": len(self.vectors),
            "candidates": [held and list(held) for held in self.candidates],
            **self.projection.record,
            **self.taken_out.when_loaded,
            **({"interpolate": self.interpolate} if self.interpolate else {}),
            **({"file": self.file} if self.file else {}),
        }

    def document(self) -> dict[str, Any]:
        """Its values for JSON: a list of numbers for each layer, null where it has none."""
        return {
            "vectors": [row.tolist() if bool(row.any()) else None for row in self.vectors.double()],
            "embedding_vector": (
                None if self.embedding is None else self.embedding.double().tolist()
            ),
        }


def concatenated(*parts: Tensor) -> Tensor:
    """Rows below each other, in float64."""
    import torch

    return torch.cat([part.double() for part in parts])


def set_of_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path, sha256: str
) -> DirectionSet:
    """The set that a safetensors file holds.

    Raises:
        InputError: its tensors are none.
    """
    vectors, embedding = tensors[DIRECTIONS], tensors.get(EMBEDDING)
    if embedding is None and "edit" in metadata and vectors.ndim == 2:
        # What audit found: an embedding that lost nothing is to lose nothing.
        embedding = vectors.new_zeros(vectors.shape[1])
    for name, tensor, ndim in ((DIRECTIONS, vectors, 2), (EMBEDDING, embedding, 1)):
        if tensor is not None and (tensor.ndim != ndim or not tensor.is_floating_point()):
            shape = "[n_layers, d_model]" if ndim == 2 else "[d_model]"
            raise InputError(
                f"{path}: tensor '{name}' must be {shape} floats, not {list(tensor.shape)} "
                f"{tensor.dtype}"
            )
    return DirectionSet(
        vectors.double(),
        None if embedding is None else embedding.double(),
        _candidates(metadata.get("candidates"), len(vectors), f"{path}: metadata 'candidates'"),
        sha256,
        Projection.recorded(metadata),
        file=sha256,
    )


def _candidates(text: str | None, count: int, named: str) -> tuple[Candidate, ...]:
    """Those that a file names; none where it names none.

    Raises:
        InputError: they are no positions and layers, one for each of ``count`` rows.
    """
    try:
        held = json.loads("null" if text is None else text)
    except (ValueError, RecursionError):
        held = text
    if held is None or held == []:
        return (None,) * count
    if not isinstance(held, list):
        raise InputError(f"{named} must be a JSON list: [position, layer] or null for each row")
    if len(held) != count:
        raise InputError(f"{named} lists {len(held)} candidates for {count} directions")
    for row, one in enumerate(held):
        if one is not None and not _is_candidate(one, count):
            raise InputError(
                f"{named}: entry {row} must be null or [position, layer], a position counted from "
                f"the prompt's end (-1, -2, ...) and a layer from 0 to {count - 1}"
            )
    return tuple(None if one is None else (one[0], one[1]) for one in held)


def _is_candidate(one: Any, n_layers: int) -> bool:
    if not isinstance(one, list) or len(one) != 2 or not all(type(n) is int for n in one):
        return False
    position, layer = map(int, one)
    return -_FURTHEST <= position < 0 <= layer < n_layers


def set_of_foreign(found: ForeignVectors, sha256: str) -> DirectionSet:
    """The set in a file of another program."""
    import torch

    rows = torch.zeros(1 + max(found.by_layer), found.width, dtype=torch.float64)
    for layer, values in found.by_layer.items():
        rows[layer] = torch.from_numpy(values)
    return DirectionSet(
        rows,
        candidates=(None,) * len(rows),
        sha256=sha256,
        file=sha256,
        listed=found.listed,
    )


def set_of_means(
    mean_harmful: Tensor,
    mean_harmless: Tensor,
    position: int,
    sha256: str,
    projection: Projection = WHOLE,
    mean_first_token: Tensor | None = None,
) -> DirectionSet:
    """The differences of means at one position, a direction for each layer.

    Args:
        mean_harmful: ``[n_layers, d_model]``.
        mean_harmless: the same.
        position: counted from the prompt's end.
        sha256: of the file of means.
        projection: what each is to be without.
        mean_first_token: ``[n_layers, d_model]``, if that is among it.
    """
    harmful, harmless = mean_harmful.double(), mean_harmless.double()
    vectors = projection.of(harmful - harmless, harmless, mean_first_token)
    # A token of the template has the same embedding in every prompt.
    scale = harmful.norm(dim=1) + harmless.norm(dim=1)
    vectors = vectors.masked_fill((vectors.norm(dim=1) <= _NOTHING * scale)[:, None], 0.0)
    there = vectors.any(dim=1).tolist()
    return DirectionSet(
        vectors,
        candidates=tuple((position, layer) if here else None for layer, here in enumerate(there)),
        sha256=hash_text(sha256, f"position {position}", *projection.names),
        projection=projection,
        position=position,
        file=sha256,
    )


def recorded_set(record: Mapping[str, Any], path: Path) -> DirectionSet | None:
    """The set that the record of an edit holds, as the edit used it; None if it holds none.

    Raises:
        InputError: it is damaged.
    """
    import torch

    rows, own, of_it = (record.get(key) for key in ("vectors", "embedding_vector", "direction"))
    if rows is None:
        return None
    wrong = InputError(f"{path} holds no direction set that could be read: make the edit again")
    if not isinstance(rows, list) or not isinstance(of_it, Mapping):
        raise wrong
    width = next((len(row) for row in rows if isinstance(row, list)), 0)
    try:
        vectors = torch.tensor(
            [[0.0] * width if row is None else row for row in rows], dtype=torch.float64
        )
        embedding = None if own is None else torch.tensor(own, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise wrong from None
    if vectors.ndim != 2 or not width or not (embedding is None or embedding.ndim == 1):
        raise wrong
    sha256, kind, position = (of_it.get(key) for key in ("sha256", "interpolate", "position"))
    return DirectionSet(
        vectors,
        embedding,
        _candidates(json.dumps(of_it.get("candidates")), len(rows), f"{path}: 'candidates'"),
        sha256 if isinstance(sha256, str) else None,
        Projection.recorded(of_it),
        kind if isinstance(kind, str) else None,
        position if isinstance(position, int) else None,
    )


def save_direction_set(
    path: Path,
    directions: DirectionSet,
    metadata: Mapping[str, str],
    winner: Tensor | None = None,
    subspaces: Tensor | None = None,
) -> None:
    """Write a set; every program of this tool that writes one does it here.

    Args:
        path: the file.
        directions: the set.
        metadata: what else to say of it.
        winner: the one direction that was chosen, kept beside the set as ``direction``.
        subspaces: ``[n_layers, k, d_model]``, what each direction is one of; kept beside the set.
    """
    tensors = {DIRECTIONS: directions.vectors}
    if directions.embedding is not None:
        tensors[EMBEDDING] = directions.embedding
    if winner is not None:
        tensors["direction"] = winner
    if subspaces is not None:
        tensors["subspaces"] = subspaces
    more = {"candidates": json.dumps([held and list(held) for held in directions.candidates])}
    write_tensors(path, tensors, {**more, **directions.projection.metadata, **metadata})
