"""What the interventions of an evaluation do to the model."""

from __future__ import annotations

from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet
from abliterate.errors import UsageError
from abliterate.evaluation.intervention_names import check_name
from abliterate.inference.engine import Change


def change_of(name: str, direction: Direction | DirectionSet | None) -> Change:
    """What an intervention, checked, does to the model."""
    if direction is None or name == "baseline":
        return None
    if isinstance(direction, DirectionSet):
        return direction, None
    if name == "ablate":
        return direction.vector, None
    return (direction.vector if name == "add" else -direction.vector), direction.layer


def check_intervention(name: str, direction: Direction | DirectionSet | None) -> None:
    """Refuse what is no ``baseline``, ``ablate``, ``add`` or ``subtract``.

    Raises:
        UsageError: the name is unknown, or it needs a direction or a source layer it lacks, or one
            direction where there is a set.
    """
    check_name(name, direction)
    if name in ("add", "subtract") and isinstance(direction, DirectionSet):
        raise UsageError(
            f"--intervention {name} needs one direction, and a set holds one for each layer: give "
            "one direction, or --intervention ablate"
        )
    single = direction if isinstance(direction, Direction) else None
    if name in ("add", "subtract") and single is not None and single.layer is None:
        raise UsageError(f"--intervention {name} needs a direction file that records its layer")
