"""Directions that mean nothing, and what interventions along them do: controls of one that does.

Without them a KL of 0.3 says little: another direction of the same model may give as much. They are
scored by first tokens alone, all in one pass of batches; no answers are generated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abliterate.direction import Direction
from abliterate.inference.engine import BatchActivations, CandidateRun, Engine, Prompts
from abliterate.inference.in_memory import engine_of
from abliterate.metrics.refusal import kl_divergence, refusal_score
from abliterate.metrics.spread import place_among
from abliterate.models.device_placement import to_device
from abliterate.models.loading import LoadedModel

COVARIANCE, ISOTROPIC, LAYERS = "covariance", "isotropic", "layers"
FIGURES = ("harmful_score", "harmless_score", "kl_divergence")
# Prompts whose activations the covariance is of.
MOST_PROMPTS = 128


@dataclass(frozen=True)
class Control:
    """A direction that is compared with the selected one.

    Attributes:
        family: how it was found: ``covariance``, ``isotropic`` or ``layers``.
        vector: float64 ``[d_model]``; of the selected direction's norm if it is random.
        layer: the layer of a candidate of another layer; None of a random one.
    """

    family: str
    vector: Tensor
    layer: int | None = None


def activations_at(
    loaded: LoadedModel,
    ids: Prompts,
    layer: int | None,
    position: int | None,
    batch_size: int | str,
) -> tuple[Tensor, int, int]:
    """``resid_pre`` of prompts where a direction was found.

    Args:
        loaded: the model.
        ids: token ids of the prompts, of which the first 128 count.
        layer: of the direction; None for the middle one.
        position: of the direction, from the end; None for the last.
        batch_size: prompts per batch, or ``auto``.

    Returns:
        float64 ``[prompts, d_model]``, the layer and the position.
    """
    ranks, chosen = loaded.ranks, ids[:MOST_PROMPTS]
    # What a file from elsewhere says may be of another model.
    known = position is not None and -min(map(len, chosen)) <= position < 0
    place = position if known and position is not None else -1
    local = ranks.split(chosen)
    reader = engine_of(loaded).resid_pre({"harmless": local}, [place], batch_size)
    _, n_layers, width = reader.shape
    block = layer if layer is not None and 0 <= layer < n_layers else n_layers // 2
    found = torch.empty(len(local), width, dtype=torch.float64)

    def keep(batch: BatchActivations) -> None:
        found[list(batch.rows)] = batch.activations[:, 0, block].cpu().double()

    if local:
        reader.read("harmless", range(len(local)), keep, "controls: activations")
    return ranks.gather_rows(found), block, place


def random_controls(
    direction: Direction, activations: Tensor | None, count: int, seed: int
) -> list[Control]:
    """``count`` directions of either random family, of the norm of ``direction``.

    Args:
        direction: the selected one.
        activations: float64 ``[prompts, d_model]``; None for isotropic directions alone.
        count: of each family.
        seed: of the draws.

    Returns:
        First those of the normal distribution with the covariance of ``activations`` (as far as
        they vary), then those of the standard normal distribution.
    """
    norm, width = float(direction.vector.double().norm()), len(direction.vector)

    def scaled(vectors: np.ndarray[Any, Any], family: str) -> list[Control]:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        units = torch.from_numpy(vectors / np.where(lengths > 0, lengths, 1.0))
        return [Control(family, norm * unit) for unit in units]

    found = []
    if activations is not None and varies(activations):
        centred = (activations - activations.mean(0)).numpy()
        # Standard normal weights of the centred prompts: their sum has the prompts' covariance.
        weights = np.random.default_rng([seed, *b"covariance"]).standard_normal(
            (count, len(centred))
        )
        found += scaled(weights @ centred, COVARIANCE)
    drawn = np.random.default_rng([seed, *b"isotropic"]).standard_normal((count, width))
    return found + scaled(drawn, ISOTROPIC)


def varies(activations: Tensor) -> bool:
    """Whether prompts differ at all: those of a template token entering block 0 do not."""
    spread = (activations.amax(0) - activations.amin(0)).max()
    return len(activations) > 1 and bool(spread > 1e-6 * activations.abs().max())


def measure_controls(
    loaded: LoadedModel,
    ids: Mapping[str, Prompts],
    baseline: Tensor,
    refusal_tokens: Sequence[int],
    vectors: Tensor,
    layer: int | None,
    batch_size: int | str,
) -> dict[str, list[float]]:
    """Mean refusal scores and KL with each of some directions ablated, or added at a layer.

    Args:
        loaded: the model.
        ids: token ids of ``harmful`` and ``harmless`` prompts.
        baseline: last-token logits ``[n_harmless, vocabulary]`` of the unmodified model.
        refusal_tokens: ids of the first tokens that count as refusing.
        vectors: ``[directions, d_model]``.
        layer: at whose input to add them as they are; None to ablate them.
        batch_size: prompts per batch, or ``auto``.

    Returns:
        ``harmful_score``, ``harmless_score`` and ``kl_divergence``, a figure for each direction.
    """
    engine, ranks = engine_of(loaded), loaded.ranks
    if layer is None:
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
    rows = {kind: ranks.split(range(len(ids[kind]))) for kind in ("harmful", "harmless")}
    kinds = {"harmful_score": "harmful", "harmless_score": "harmless", "kl_divergence": "harmless"}
    tables = {
        figure: torch.zeros(len(ids[kind]), len(vectors), dtype=torch.float64)
        for figure, kind in kinds.items()
    }

    def note(first: int, kind: str) -> Callable[[Tensor, Sequence[int], Sequence[int]], None]:
        def use(logits: Tensor, candidates: Sequence[int], seen: Sequence[int]) -> None:
            for index, own in zip(candidates, logits, strict=True):
                scores = refusal_score(own, refusal_tokens)
                tables[f"{kind}_score"][list(seen), first + index] = scores.cpu()
                if kind == "harmless":
                    base = to_device(baseline[list(seen)], own.device)
                    divergence = kl_divergence(base, own).cpu()
                    tables["kl_divergence"][list(seen), first + index] = divergence

        return use

    for part in _portions(engine, len(vectors), sum(len(row) for k in rows for row in ids[k])):
        layers = None if layer is None else [layer] * len(part)
        runs = [
            CandidateRun(
                ids[kind],
                rows[kind],
                vectors[part.start : part.stop],
                layers,
                note(part.start, kind),
            )
            for kind in ("harmful", "harmless")
            if rows[kind]
        ]
        engine.run_candidates(runs, batch_size, "controls")
    gathered = {
        figure: ranks.gather_rows(table[list(rows[kinds[figure]])])
        for figure, table in tables.items()
    }
    return {figure: table.mean(0).tolist() for figure, table in gathered.items()}


def _portions(engine: Engine, count: int, tokens: int) -> list[range]:
    size = engine.candidates_at_once(tokens)
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def compared(
    real: Mapping[str, float], controls: Sequence[Control], figures: Mapping[str, Sequence[float]],
    direction: Tensor,
) -> dict[str, Any]:  # fmt: skip
    """The figures of controls by family, and where the selected direction's lie among them.

    Args:
        real: of the selected direction, by the names of ``FIGURES``.
        controls: the others.
        figures: theirs, by the same names, in their order.
        direction: the selected one.

    Returns:
        ``selected``: its figures. ``families``: of each its ``members``, with their cosine with the
        selected direction, and under ``place`` for each figure how many of them lie ``below`` the
        selected one's, ``of`` how many, their ``mean`` and ``sd`` (``n - 1``) and by how many of
        these the selected one lies off, ``z``; None where too few draws tell it.
    """
    unit = direction.double() / direction.double().norm()
    families: dict[str, Any] = {}
    for family in dict.fromkeys(control.family for control in controls):
        of_family = [i for i, control in enumerate(controls) if control.family == family]
        families[family] = {
            "members": [
                ({} if controls[i].layer is None else {"layer": controls[i].layer})
                | {"cosine": float(controls[i].vector @ unit / controls[i].vector.norm())}
                | {name: figures[name][i] for name in FIGURES}
                for i in of_family
            ],
            "place": {
                name: place_among(real[name], [figures[name][i] for i in of_family])
                for name in FIGURES
            },
        }
    return {"selected": {name: real[name] for name in FIGURES}, "families": families}
