"""Whether a run has been inspected already: then ``inspect`` shows its record, without the model.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abliterate.direction import FILE_NAME as DIRECTION
from abliterate.errors import AbliterateError
from abliterate.run_folder import ACTIVATIONS, EXTRACT, INSPECT, Session
from abliterate.run_records import read_bootstrap
from abliterate.run_stage import input_hash, load_if_current
from abliterate.storage.artifacts import hash_file, read_json, tensor_metadata

# Prompts of each kind that directions are tried on, and labellings that their separation on the
# training prompts is compared with.
HELD_OUT, PERMUTATIONS = 64, 1000


def inspection_inputs(
    extracted: Mapping[str, Any],
    direction: str | None,
    position: int,
    kept: bool,
    bootstrap: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What ``inspect.json`` depends on beside the model and its settings.

    Args:
        extracted: the record of ``extract``.
        direction: hash of the selected direction's file.
        position: the position that is looked at.
        kept: the activations that ``extract`` recorded are there.
        bootstrap: what :func:`abliterate.run_records.read_bootstrap` gives.
    """
    inputs = {
        "extract": extracted["inputs"],
        "direction": direction,
        "position": position,
        "activations": kept,
        "held_out": HELD_OUT,
        "permutations": PERMUTATIONS,
    }
    return inputs if bootstrap is None else inputs | {"bootstrap": bootstrap}


def finished_inspection(
    session: Session, run: Path, position: int | None = None
) -> dict[str, Any] | None:
    """The record of ``run``, if it is of the same model, settings and artifacts.

    None, too, where an artifact is missing or damaged: ``inspect_stage`` says what is wrong.

    Args:
        session: the model and settings.
        run: the run folder, selected.
        position: as for ``inspect_stage``.
    """
    if not (run / INSPECT).is_file():
        return None
    try:
        extracted = read_json(run / EXTRACT, "extract MODEL -o RUN")
        made = extracted["outputs"]
        if (run / ACTIVATIONS).exists() != (ACTIVATIONS in made):
            return None
        if any(hash_file(run / name) != digest for name, digest in made.items()):
            return None
        chosen = _usual_position(run, extracted) if position is None else position
        direction = hash_file(run / DIRECTION)
        bootstrap = read_bootstrap(run)
        inputs = inspection_inputs(extracted, direction, chosen, ACTIVATIONS in made, bootstrap)
        return load_if_current(run / INSPECT, input_hash(session, inputs), {})
    except (AbliterateError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _usual_position(run: Path, extracted: Mapping[str, Any]) -> int:
    """Where nobody names a position: the last one kept, else that of the selected direction."""
    if "activations" in extracted:
        return int(extracted["activations"]["positions"][-1])
    try:
        return int(tensor_metadata(run / DIRECTION)["position"])
    except (KeyError, ValueError):
        return int(extracted["positions"][-1]["position"])
