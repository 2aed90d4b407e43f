"""What extract finds: the mean activations, and the candidates that are their differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import Any

from torch import Tensor

from abliterate.direction import Direction
from abliterate.direction_loading import NO_FIRST_TOKEN, find_first_token
from abliterate.errors import InputError
from abliterate.extraction.group_sums import Stability
from abliterate.extraction.mean_activations import Kept
from abliterate.projection import Projection
from abliterate.result_tables import to_frame, to_html, to_json
from abliterate.storage.artifacts import read_tensors


@dataclass(frozen=True, repr=False)
class Extraction:
    """Mean activations at each position and layer.

    Attributes:
        mean_harmful: float64 ``[n_positions, n_layers, d_model]``.
        mean_harmless: the same over harmless prompts.
        positions: ascending positions counted from the prompt's end (-1 is its last token).
        tokens: the template's token at each position.
        refusal_tokens: ids of the first tokens that count as refusing.
        kept_harmful: for each prompt given, whether its activations were used.
        kept_harmless: the same for the harmless prompts.
        unfinished: by kind, about how many prompts a thought did not end; empty if none was had.
        stability: how sure each candidate is, if it was extracted now.
        project_harmless: of the candidates what they have along their mean harmless activation is
            removed.
        model: folder or hub id of the model.
        mean_first_token: mean ``resid_pre`` of the first token of the harmless prompts, float64
            ``[n_layers, d_model]``; None of an extraction that has not taken it.
        project_first_token: of the candidates what they have along it is removed.
        prompts: by kind the keys of the prompts that were given, where these are known.

    ``extraction[position, layer]`` is the candidate there, a :class:`Direction`.
    """

    mean_harmful: Tensor
    mean_harmless: Tensor
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    refusal_tokens: tuple[int, ...]
    kept_harmful: Kept = ()
    kept_harmless: Kept = ()
    unfinished: Mapping[str, int] = field(default_factory=dict)
    stability: Stability | None = None
    project_harmless: bool = False
    model: str | None = None
    mean_first_token: Tensor | None = None
    project_first_token: bool = False
    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.mean_harmful.shape))
        counts = f"{sum(self.kept_harmful)} harmful, {sum(self.kept_harmless)} harmless prompts"
        return f"Extraction({shape} of positions {list(self.positions)}, layers, d_model; {counts})"

    def rows(self) -> list[dict[str, Any]]:
        """A row for each candidate: its length, and how sure it is where that is known."""
        values = {"norm": self.directions.norm(dim=-1).tolist()}
        if self.stability is not None:
            for name in ("norm_standard_error", "split_half_cosine"):
                values[name] = getattr(self.stability, name).tolist()
        return [
            {"position": position, "token": token, "layer": layer}
            | {name: table[row][layer] for name, table in values.items()}
            for row, (position, token) in enumerate(zip(self.positions, self.tokens, strict=True))
            for layer in range(self.mean_harmful.shape[1])
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it but the means and the prompts."""
        used = {"harmful": self.kept_harmful, "harmless": self.kept_harmless}
        return to_json(
            {
                "model": self.model,
                "n_layers": self.mean_harmful.shape[1],
                "d_model": self.mean_harmful.shape[2],
                "refusal_tokens": list(self.refusal_tokens),
                "counts": {k: {"given": len(v), "used": sum(v)} for k, v in used.items()},
                **self.projection.record,
                "candidates": self.rows(),
            }
        )

    def to_pandas(self) -> Any:
        """:meth:`rows` as a DataFrame; lengths are those of the residual stream."""
        return to_frame(self.rows())

    def _repr_html_(self) -> str:
        return to_html(repr(self), self.rows(), limit=100)

    def __getitem__(self, key: tuple[int, int]) -> Direction:
        """The candidate at a position (counted from the prompt's end) and a layer.

        Raises:
            KeyError: there is none there, or the key is no pair; it says which there are.
        """
        n_layers = self.mean_harmful.shape[1]
        try:
            position, layer = map(index, key)
            row, column = self.positions.index(position), range(n_layers).index(layer)
        except (TypeError, ValueError):
            shown = ", ".join(map(repr, key)) if isinstance(key, tuple) else repr(key)
            raise KeyError(
                f"[{shown}] is no candidate: give [position, layer], of positions "
                f"{list(self.positions)} and layers 0 to {n_layers - 1}"
            ) from None
        vector = self.directions[row, column]
        return Direction(
            vector,
            position,
            layer,
            None,
            self.project_harmless,
            self.model,
            self.project_first_token,
        )

    @property
    def projection(self) -> Projection:
        """What the candidates are without."""
        return Projection(self.project_harmless, self.project_first_token)

    @property
    def directions(self) -> Tensor:
        """The candidates, ``mean_harmful - mean_harmless``.

        Raises:
            InputError: they are to be without what the extraction does not hold.
        """
        differences = self.mean_harmful - self.mean_harmless
        if not self.projection:
            return differences
        if self.project_first_token and self.mean_first_token is None:
            raise InputError(f"the extraction {NO_FIRST_TOKEN}")
        return self.projection.of(differences, self.mean_harmless, self.mean_first_token)

    def check(self, n_layers: int, d_model: int) -> None:
        """Refuse means that are not of a model with so many blocks of that width.

        Raises:
            InputError: their shape or number of positions is another.
        """
        expected = (len(self.positions), n_layers, d_model)
        for name, mean, shape in (
            ("harmful prompts", self.mean_harmful, expected),
            ("harmless prompts", self.mean_harmless, expected),
            ("first token", self.mean_first_token, expected[1:]),
        ):
            if mean is not None and tuple(mean.shape) != shape:
                raise InputError(
                    f"the mean of the {name} has shape {list(mean.shape)}, the model and "
                    f"its positions need {list(shape)}: extract from this model again"
                )

    @classmethod
    def load(cls, tensors: Path, record: Mapping[str, Any]) -> Extraction:
        """What ``extract`` wrote to ``directions.safetensors`` and ``extract.json``.

        Raises:
            InputError: the two do not belong together.
        """
        means = read_tensors(tensors, "mean_harmful", "mean_harmless")
        wanted = len(record["positions"]), record["n_layers"]
        shapes = {tuple(mean.shape) for mean in means.values()}
        if len(shapes) > 1 or any(len(s) != 3 or s[:2] != wanted or not s[2] for s in shapes):
            held = " and ".join(str(list(mean.shape)) for mean in means.values())
            raise InputError(
                f"{tensors} holds means of {held}, extract.json says {wanted[0]} positions of "
                f"{wanted[1]} layers: run extract again"
            )
        return cls(
            means["mean_harmful"],
            means["mean_harmless"],
            tuple(entry["position"] for entry in record["positions"]),
            tuple(entry["token"] for entry in record["positions"]),
            tuple(entry["id"] for entry in record["refusal_tokens"]),
            mean_first_token=find_first_token(tensors, means["mean_harmful"].shape[1:]),
            prompts=record.get("prompts") or {},
        )
