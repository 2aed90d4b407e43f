"""Controls of an evaluation's interventions: the same with directions that mean nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from abliterate.console import log
from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet
from abliterate.evaluation.outcomes import Metrics
from abliterate.inference.control_directions import (
    COVARIANCE,
    FIGURES,
    ISOTROPIC,
    LAYERS,
    Control,
    compared,
    measure_controls,
    random_controls,
)
from abliterate.inference.engine import Prompts
from abliterate.models.loading import LoadedModel
from abliterate.run_folder import Session

# What is done with the direction in rows that have controls: only what a random one can do as well.
CONTROLLED = ("ablate", "add", "subtract")


def count_of(session: Session, direction: Direction | DirectionSet | None) -> int:
    """How many controls of each family are wanted: none where a pass reads all weights, unless they
    are asked for."""
    settings = session.settings.evaluate
    if direction is None or not settings.controls:
        return 0
    if isinstance(direction, DirectionSet):
        log.info("evaluate: a direction set has no controls, which stand for one direction")
        return 0
    costly = session.opener.reads_weights_every_pass
    if costly and "controls" not in settings.model_fields_set:
        log.info(
            "evaluate: controls are left out, as they would read the model twice more: give "
            "--controls %d to have them",
            settings.controls,
        )
        return 0
    return settings.controls


def measure(
    loaded: LoadedModel,
    name: str,
    direction: Direction,
    others: Mapping[int, Tensor],
    activations: Tensor,
    count: int,
    seed: int,
    ids: Mapping[str, Prompts],
    baseline: Tensor,
    refusal_tokens: list[int],
    real: Metrics,
    batch_size: int | str,
) -> dict[str, Any]:
    """The controls of one row, and where the selected direction lies among them.

    Args:
        loaded: the model.
        name: ``ablate``, ``add`` or ``subtract``.
        direction: the selected one.
        others: candidates of other layers, which are compared where they are ablated.
        activations: whose covariance random directions have.
        count: of each random family.
        seed: of the draws.
        ids: token ids of the prompts, by kind.
        baseline: last-token logits of the unmodified model on harmless prompts.
        refusal_tokens: ids of the first tokens that count as refusing.
        real: what the selected direction does.
        batch_size: prompts per batch, or ``auto``.
    """
    controls = random_controls(direction, activations, count, seed)
    if name == "ablate":
        controls += [Control(LAYERS, vector, layer) for layer, vector in others.items()]
    layer = None if name == "ablate" else direction.layer
    vectors = torch.stack([control.vector for control in controls])
    figures = measure_controls(loaded, ids, baseline, refusal_tokens, vectors, layer, batch_size)
    found = dict(zip(FIGURES, (real.harmful, real.harmless, real.kl), strict=True))
    sign = -1 if name == "subtract" else 1
    return compared(found, controls, figures, sign * direction.vector.double())


def are_controls(held: Any) -> bool:
    """Whether something kept is what :func:`measure` gives, and whose covariance it took."""

    def numbers(values: Any) -> bool:
        named = isinstance(values, dict) and set(FIGURES) <= set(values)
        return named and all(map(_is_number, values.values()))

    if not isinstance(held, dict) or set(held) != {"controls", "activations"}:
        return False
    found, of = held["controls"], held["activations"]
    if not isinstance(found, dict) or set(found) != {"selected", "families"}:
        return False
    families = found["families"]
    return (
        isinstance(of, dict)
        and set(of) == {"n_prompts", "layer", "position"}
        and all(map(_is_number, of.values()))
        and numbers(found["selected"])
        and isinstance(families, dict)
        and set(families) <= {COVARIANCE, ISOTROPIC, LAYERS}
        and all(
            isinstance(family, dict)
            and set(family) == {"members", "place"}
            and isinstance(family["members"], list)
            and all(numbers(member) for member in family["members"])
            and isinstance(family["place"], dict)
            and set(family["place"]) == set(FIGURES)
            and all(
                isinstance(place, dict)
                and set(place) == {"below", "of", "mean", "sd", "z"}
                and all(map(_is_number, place.values()))
                for place in family["place"].values()
            )
            for family in families.values()
        )
    )


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and math.isfinite(value))
