"""What each layer lost, as a file: one direction and one scale for every decoder block.

It is a direction set (``abliterate.direction_set``), which ``--direction`` takes.
"""

from __future__ import annotations

import json
from pathlib import Path

from abliterate import direction_set
from abliterate.auditing.edit_form import EditForm
from abliterate.models.loading import Checkpoint
from abliterate.storage.artifacts import finite


def save_direction_set(path: Path, form: EditForm, checkpoint: Checkpoint) -> None:
    """Write the directions of an edit.

    ``directions`` is float64 ``[n_layers, d_model]``, a unit vector for each decoder block, or zero
    where none of its tensors lost one; ``embedding`` ``[d_model]`` is that of the embedding, where
    it lost one. Of ``k`` directions at once these are the first, and ``subspaces``
    ``[n_layers, k, d_model]`` holds all. The metadata are JSON: ``edit`` (form, scale, whether
    behind the gains of norms),
    ``layer_scales`` (null where there is none) and ``model``.

    Args:
        path: the file.
        form: of the edit.
        checkpoint: the edited one.
    """
    document = finite(form.document())
    scales = document.pop("layer_scales")
    metadata = {
        "edit": json.dumps(document, sort_keys=True),
        "layer_scales": json.dumps(scales),
        "model": checkpoint.name,
    }
    if checkpoint.revision is not None:
        metadata["revision"] = checkpoint.revision
    found = direction_set.DirectionSet(form.directions, form.outside)
    direction_set.save_direction_set(path, found, metadata, subspaces=form.subspaces)
