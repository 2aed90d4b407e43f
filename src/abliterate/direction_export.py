"""A direction, written as a file of another program (``abliterate.exchange``)."""

from __future__ import annotations

from pathlib import Path

from abliterate.direction import Direction
from abliterate.direction_loading import load_direction, load_directions
from abliterate.direction_set import DirectionSet
from abliterate.errors import AbliterateError, UsageError
from abliterate.exchange import SUFFIXES, check_format, encode, steering_layers
from abliterate.storage.artifacts import read_record, read_tensors, write_atomically
from abliterate.storage.ownership import claim_file


def export_direction(
    source: str | Path, to: str, output: Path | None = None
) -> tuple[Path, Direction]:
    """Write a direction as a file of another program (``abliterate.exchange``).

    Args:
        source: anything that :func:`load_direction` takes.
        to: the format.
        output: the file; None for one in the run folder.

    Returns:
        The file, and the direction.

    Raises:
        InputError: there is no direction, or the format cannot hold it.
        UsageError: the format is unknown, its package is missing, or the file is something else.
    """
    kind = check_format(to)
    direction = load_direction(source)
    if output is None:
        if not Path(source).is_dir():
            raise UsageError(f"-o FILE is needed: {source} is no run folder")
        name = f"direction-{kind}.safetensors" if kind == "steering-vectors" else "direction"
        output = Path(source) / (name if "." in name else name + SUFFIXES[kind])
    if output.suffix != SUFFIXES[kind]:
        raise UsageError(f"-o {output}: a file for {kind} ends in {SUFFIXES[kind]}")
    content = encode(
        direction.vector.double().numpy(),
        direction.layer,
        direction.position,
        kind,
        _model_type(source),
    )
    claim_file(output, _is_exported, "export")
    write_atomically(output, content)
    return output, direction


def _is_exported(path: Path) -> bool:
    """Whether a file is one that holds nothing but a direction."""
    try:
        if isinstance(load_directions(path), DirectionSet):
            return False
    except AbliterateError:
        return False
    return path.suffix != ".safetensors" or bool(steering_layers(list(read_tensors(path))))


def _model_type(source: str | Path) -> str:
    """What the run folder's ``extract.json`` says of the model, or nothing."""
    path = Path(source) / "extract.json"
    if not path.is_file():
        return ""
    found = read_record(path, "extract").get("model_type")
    return found if isinstance(found, str) and found.isascii() and len(found) < 100 else ""
