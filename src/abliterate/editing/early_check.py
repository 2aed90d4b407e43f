"""What is wrong with an edit whatever its direction will be, before there is one."""

from __future__ import annotations

import torch

from abliterate.checkpoints.checkpoint import Checkpoint
from abliterate.checkpoints.quantized_formats import plain_config
from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet
from abliterate.editing.options import EditOptions
from abliterate.editing.output_plan import plan_output
from abliterate.errors import AbliterateError, UnsupportedArchitectureError
from abliterate.inference.direction_fit import stream_shape
from abliterate.models.loading import load_config
from abliterate.writers import proof_of

# Small, so that no multiple of it is too large for a dtype that holds the one of a real direction.
_STAND_IN = 1e-6


def check_edit(
    source: Checkpoint,
    options: EditOptions,
    by_layer: bool,
    trust_remote_code: bool = False,
    allow_leak: float | None = None,
) -> None:
    """Plan the edit along a direction that stands in for one that is not there yet.

    From configuration and headers alone; an architecture that only its own weights prove is left
    to the edit, which loads them.

    Args:
        source: the checkpoint.
        options: of the edit.
        by_layer: the direction will be a set.
        trust_remote_code: the architecture's code lies in the checkpoint, and may run.
        allow_leak: as of the edit.

    Raises:
        CheckpointError: the source cannot be edited so.
        UsageError: the options contradict the model, or one has no effect on it.
    """
    shape = stream_shape(source, trust_remote_code)
    try:
        proof_of(plain_config(load_config(source, trust_remote_code)))
    except UnsupportedArchitectureError:
        return
    if shape is None:
        return
    vectors = _STAND_IN * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stand_ins: list[Direction | DirectionSet] = [Direction(vectors[0])]
    if by_layer:
        stand_ins = [DirectionSet(vectors)]
    elif options.add is not None:  # it may be possible at the layer that is chosen
        stand_ins = [Direction(vectors[0], layer=layer) for layer in range(1, shape[0])]
    problem: AbliterateError | None = None
    for direction in stand_ins:
        try:
            plan_output(source, direction, options, trust_remote_code, allow_leak)
        except AbliterateError as error:
            problem = problem or error
        else:
            return
    if problem is not None:
        raise problem
