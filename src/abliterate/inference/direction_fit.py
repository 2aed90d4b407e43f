"""Whether a direction is one for a model, by its configuration alone: before it is loaded."""

from __future__ import annotations

from abliterate.checkpoints.checkpoint import Checkpoint
from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet
from abliterate.inference.interventions import check_direction
from abliterate.models.loading import load_config
from abliterate.models.model_classes import text_config


def stream_shape(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[int, int] | None:
    """``n_layers, d_model`` of its residual stream; None where the configuration does not say.

    Raises:
        CheckpointError: the configuration cannot be read.
    """
    config = text_config(load_config(checkpoint, trust_remote_code))
    n_layers = getattr(config, "num_hidden_layers", None)
    width = getattr(config, "hidden_size", None)
    if not (isinstance(n_layers, int) and isinstance(width, int)):
        return None
    return n_layers, width


def check_fit(
    checkpoint: Checkpoint, direction: Direction | DirectionSet | None, trust_remote_code: bool
) -> None:
    """Refuse what was made for another model, as far as the configuration tells.

    Raises:
        CheckpointError: the configuration cannot be read.
        InputError: the direction has another width, or a set another number of layers.
    """
    if direction is None or (shape := stream_shape(checkpoint, trust_remote_code)) is None:
        return
    if isinstance(direction, Direction):
        check_direction(direction.vector, shape[1])
    # One that holds a direction behind the last block loses it, which is said once it is used.
    elif not (direction.listed and direction.vectors.shape == (shape[0] + 1, shape[1])):
        direction.fit(*shape)
