"""What was measured of every candidate on every prompt: the table that every choice is made from.

A choice under other thresholds, one after an interruption and the resamples of the prompts start
from it and need no model for what it holds (``RUN/scores.safetensors``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from abliterate.errors import InputError
from abliterate.metrics.refusal import MAX_REFUSAL_SCORE
from abliterate.storage.artifacts import read_tensors, tensor_metadata, versions, write_tensors

NAN = float("nan")


@dataclass(frozen=True)
class PromptScores:
    """Scores by candidate and prompt, all float64 on the CPU; filled in place.

    NaN is what was not measured, infinite what was measured and is not finite.

    Attributes:
        bypass: refusal scores, direction ablated, ``[n_positions, n_layers, n_harmful]``.
        induce: refusal scores, direction added, ``[n_positions, n_layers, n_harmless]``.
        kl: KL(unmodified || ablated), ``[n_positions, n_layers, n_harmless]``.
        kl_floor: what no KL of a prompt is below, ``[n_harmless]``.
        harmful: refusal scores of the unmodified model, ``[n_harmful]``.
        harmless: the same, ``[n_harmless]``.
    """

    bypass: Tensor
    induce: Tensor
    kl: Tensor
    kl_floor: Tensor
    harmful: Tensor
    harmless: Tensor

    @classmethod
    def empty(cls, directions: Tensor, n_harmful: int, n_harmless: int) -> PromptScores:
        """A table of the candidates ``[n_positions, n_layers, d_model]`` with nothing measured."""
        n_positions, n_layers, _ = directions.shape

        def unknown(*shape: int) -> Tensor:
            return torch.full(shape, NAN, dtype=torch.float64)

        return cls(
            unknown(n_positions, n_layers, n_harmful),
            unknown(n_positions, n_layers, n_harmless),
            unknown(n_positions, n_layers, n_harmless),
            unknown(n_harmless),
            unknown(n_harmful),
            unknown(n_harmless),
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {f.name: tuple(getattr(self, f.name).shape) for f in fields(self)}

    @property
    def has_baselines(self) -> bool:
        """Whether the unmodified model was scored on every prompt."""
        return not bool(self.harmful.isnan().any() | self.harmless.isnan().any())

    @property
    def n_touched(self) -> int:
        """How many candidates were measured on some prompt."""
        touched = [(~table.isnan()).any(-1) for table in (self.bypass, self.induce, self.kl)]
        return int(torch.stack(touched).any(0).sum())

    def leave_out(self, harmful: Tensor, harmless: Tensor) -> None:
        """Note which prompts (bool, where False) have no score: a thought about them has not ended,
        so that their first token is none of an answer."""
        self.harmful[~harmful] = float("inf")
        self.harmless[~harmless] = float("inf")

    @property
    def left_out(self) -> tuple[int, int]:
        """How many harmful and harmless prompts these are."""
        return int(self.harmful.isinf().sum()), int(self.harmless.isinf().sum())

    def forget_kl(self) -> None:
        """Drop all KL, as of another question than the one that is asked now."""
        self.kl.fill_(NAN)
        self.kl_floor.fill_(NAN)


#: Called with the table whenever candidates are finished.
Save = Callable[[PromptScores], None]


def measured(values: Tensor) -> Tensor:
    """``values`` as a table holds them: what is not finite is infinite there."""
    return torch.where(values.isfinite(), values, torch.full_like(values, float("inf")))


def save_scores(
    path: Path,
    scores: PromptScores,
    inputs: str,
    kl_on: str,
    offload: Any = None,
    computed: Mapping[str, str] | None = None,
) -> None:
    """Keep a table, atomically.

    Args:
        path: the file.
        scores: the table.
        inputs: the hash of all that the scores depend on, but for where KL was measured.
        kl_on: where it was.
        offload: what the record of ``select`` says of how the model was streamed.
        computed: how it computed: dtype, device, attention.
    """
    write_tensors(
        path,
        {f.name: getattr(scores, f.name) for f in fields(scores)},
        {
            "inputs": inputs,
            "kl_on": kl_on,
            "offload": json.dumps(offload),
            "computed": json.dumps(dict(computed or {})),
            "abliterate": versions()["abliterate"],
        },
    )


@dataclass(frozen=True)
class KeptScores:
    """What lay in a file.

    Attributes:
        scores: the table, or None if it is no use.
        problem: why it is none; also where only its KL is no use.
        offload: as it was given to :func:`save_scores`.
        computed: likewise.
    """

    scores: PromptScores | None = None
    problem: str | None = None
    offload: Any = None
    computed: Mapping[str, str] = field(default_factory=dict)


def load_scores(path: Path, empty: PromptScores, inputs: str, kl_on: str) -> KeptScores:
    """What :func:`save_scores` left, if it is of the same inputs.

    The file is data of a stranger: whatever it holds is a table of numbers of the right shape, or
    is not used.

    Args:
        path: the file.
        empty: a table of the shapes that are needed.
        inputs: the hash of what scores depend on now.
        kl_on: where KL is to be measured.
    """
    if not path.is_file():
        return KeptScores()
    try:
        metadata = tensor_metadata(path)
        if metadata.get("inputs") != inputs:
            return KeptScores(
                problem="is of other prompts, directions or refusal tokens, another model or "
                "another version"
            )
        names = [f.name for f in fields(empty)]
        tensors = read_tensors(path, *names)
        offload = json.loads(metadata.get("offload", "null"))
        computed = _texts(json.loads(metadata.get("computed", "{}")))
    except (InputError, SafetensorError, OSError, ValueError, RecursionError):
        return KeptScores(problem="cannot be read")
    found = PromptScores(**tensors)
    if found.shapes != empty.shapes or not _are_scores(found):
        return KeptScores(problem="does not hold the scores of these candidates and prompts")
    offload = offload if _is_summary(offload) else None
    if metadata.get("kl_on") != kl_on:
        found.forget_kl()
        return KeptScores(
            found, "holds KL of another --kl-on, which is measured again", offload, computed
        )
    return KeptScores(found, None, offload, computed)


def _are_scores(found: PromptScores) -> bool:
    tensors = [getattr(found, f.name) for f in fields(found)]
    if any(t.dtype != torch.float64 or bool((t == -torch.inf).any()) for t in tensors):
        return False
    refusal = (found.bypass, found.induce, found.harmful, found.harmless)
    beyond = [bool((t[t.isfinite()].abs() > MAX_REFUSAL_SCORE + 1e-6).any()) for t in refusal]
    # A floor above zero would reject what passes.
    return not any(beyond) and not bool((found.kl_floor > 0).any())


def _texts(value: Any) -> dict[str, str]:
    """What a stranger's file says of how a model has computed: short texts by name, or nothing."""
    held = value if isinstance(value, dict) else {}
    return {name: text for name, text in held.items() if isinstance(text, str) and len(text) <= 100}


def _is_summary(value: Any) -> bool:
    """Whether it is what an engine says of its passes: counts by name."""
    return isinstance(value, dict) and all(
        isinstance(count, int) and not isinstance(count, bool) for count in value.values()
    )
