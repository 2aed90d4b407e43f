"""Whether a run has been inspected already: then ``inspect`` shows its record, without the model.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abliterate.direction import FILE_NAME as DIRECTION
from abliterate.errors import AbliterateError, InputError
from abliterate.prompts.sources import Prompt
from abliterate.run_folder import (
    ACTIVATIONS,
    EXTRACT,
    INSPECT,
    Session,
    prompt_keys,
    prompt_sources,
)
from abliterate.run_records import read_bootstrap, read_used, used_prompts
from abliterate.run_stage import input_hash, load_if_current
from abliterate.storage.artifacts import hash_file, read_json, tensor_metadata

# Prompts of each kind that directions are tried on, and labellings that their separation on the
# training prompts is compared with.
HELD_OUT, PERMUTATIONS = 64, 1000


def held_out_prompts(session: Session, run: Path) -> dict[str, list[Prompt]]:
    """At most 64 test prompts per kind of the run's sources that no stage of it has used.

    Raises:
        InputError: a source is unusable, or has fewer than two left.
    """
    used, settings = used_prompts(read_used(run)), session.settings
    sources = prompt_sources(settings, settings.extract.harmful, settings.extract.harmless)
    left = session.draw(sources, "test", None, "--n-test", used)
    few = {kind: min(HELD_OUT, len(prompts)) for kind, prompts in left.items()}
    if min(few.values()) < 2:
        raise InputError("the run's prompt sources have fewer than two prompts left")
    return {
        kind: session.draw({kind: sources[kind]}, "test", few[kind], "--n-test", used)[kind]
        for kind in sources
    }


def find_held_out(session: Session, run: Path) -> tuple[dict[str, list[Prompt]] | None, list[str]]:
    """:func:`held_out_prompts`, or None and why there are none."""
    try:
        return held_out_prompts(session, run), []
    except InputError as error:
        return None, [f"nothing is tried on held-out prompts: {error}"]


def inspection_inputs(
    extracted: Mapping[str, Any],
    direction: str | None,
    position: int,
    kept: bool,
    bootstrap: Mapping[str, Any] | None = None,
    held_out: Mapping[str, Sequence[Prompt]] | None = None,
) -> dict[str, Any]:
    """What ``inspect.json`` depends on beside the model and its settings.

    Args:
        extracted: the record of ``extract``.
        direction: hash of the selected direction's file.
        position: the position that is looked at.
        kept: the activations that ``extract`` recorded are there.
        bootstrap: what :func:`abliterate.run_records.read_bootstrap` gives.
        held_out: the prompts that directions are tried on, or None.
    """
    inputs = {
        "extract": extracted["inputs"],
        "direction": direction,
        "position": position,
        "activations": kept,
        "held_out": None if held_out is None else prompt_keys(held_out, keep_text=True),
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
        prompts, _ = find_held_out(session, run)
        inputs = inspection_inputs(
            extracted, direction, chosen, ACTIVATIONS in made, bootstrap, prompts
        )
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
