"""A direction or a direction set from where a user says it lies."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from abliterate.direction import FILE_NAME, Direction, recorded_direction
from abliterate.direction_interpolation import interpolated, parse_interpolation
from abliterate.direction_set import (
    DIRECTIONS,
    DirectionSet,
    recorded_set,
    set_of_foreign,
    set_of_means,
    set_of_tensors,
)
from abliterate.errors import AbliterateError, InputError, UsageError
from abliterate.exchange import (
    ForeignVectors,
    is_foreign,
    read_foreign,
    steering_layers,
)
from abliterate.projection import WHOLE, Projection
from abliterate.settings import parse_layers
from abliterate.storage.artifacts import (
    hash_file,
    hash_text,
    read_record,
    read_tensors,
    tensor_metadata,
)
from abliterate.storage.file_kinds import describe_file

if TYPE_CHECKING:
    from torch import Tensor


# The record of an edit, which holds its direction: ``editing.file_names``, a floor above.
_EDIT = "abliterate.json"
# Of the same run folder: the means that extract left.
MEANS_NAME = "directions.safetensors"


# Its tensor for the first token, ``[n_layers, d_model]``, and what is said where there is none.
FIRST_TOKEN_MEAN = "mean_first_token"


NO_FIRST_TOKEN = (
    "holds no mean residual stream of the first token, which --project-first-token needs: run "
    "extract again"
)


def is_edit_record(source: str | Path) -> bool:
    """Whether a user's name for a direction means the record of an edit, ``abliterate.json``."""
    return Path(source).suffix.lower() == ".json"


def find_direction(source: str | Path, position: int | None = None) -> Path:
    """The file of a run folder's direction, or the file itself; imports no torch.

    Args:
        source: the folder or file.
        position: the means of this position are meant, which a run folder holds.

    Raises:
        InputError: there is none.
        UsageError: means are meant, and it is no run folder.
    """
    path = Path(source)
    if position is not None:
        if not path.is_dir():
            raise UsageError(
                f"--position {position} takes the means that a run folder holds: give the folder "
                f"of extract as --direction, not {source}"
            )
        path = path / MEANS_NAME
        if not path.is_file():
            raise InputError(f"{path} does not exist: run `abliterate extract` first")
        return path
    if path.is_dir():
        record, path = path / _EDIT, path / FILE_NAME
        if record.is_file() and not path.is_file():
            raise InputError(
                f"{source} is an edited checkpoint: give its record, {record}, or the run folder "
                "that its direction is from"
            )
        checkpoint = (path.parent / "config.json").is_file()
        if not path.is_file() and checkpoint:
            raise InputError(f"{source} is a checkpoint, which holds no direction: {_READ}")
        if not path.is_file():
            again = shlex.join(["abliterate", "select", str(source)])
            if _chose_none(Path(source)):
                raise InputError(
                    f"{path} does not exist, as no candidate passed the filters of select: "
                    f"`{again}` says which options admit one"
                )
            raise InputError(f"{path} does not exist: run `{again}` first")
    if not path.is_file():
        raise InputError(f"{path} {'is no file' if path.exists() else 'does not exist'}")
    _check_kind(path)
    return path


def _chose_none(run: Path) -> bool:
    """Whether the record of select in a run folder says that it chose nothing."""
    try:
        return read_record(run / "selection.json", "select").get("winner", True) is None
    except (AbliterateError, OSError):
        return False


# Beside what it is in: what else is read, and how what is not is made into it.
_READ = (
    "give a run folder, a safetensors file with a tensor 'direction' or 'directions', a control "
    "vector (.gguf), an .npz or the abliterate.json of an edit"
)
_CONVERTED = (
    (
        "pickle",
        "which is never opened here, since it could run code: save its vector as 'direction' with "
        "safetensors.torch.save_file, or ",
    ),
    ("one numpy array", "save it with numpy.savez(FILE, direction=VECTOR), or "),
    ("(.npz)", "name it .npz, or "),
    ("GGUF", "name it .gguf, or "),
    ("safetensors", "name it .safetensors, or "),
    ("Git LFS", "fetch it with `git lfs pull`, or "),
)


def _check_kind(path: Path) -> None:
    """Refuse a file whose beginning is not that of the kind that its name says.

    Raises:
        InputError: no direction is read from it.
    """
    kind, suffix = describe_file(path), path.suffix.lower()
    of_suffix = {".gguf": "GGUF", ".npz": "zip of", ".json": "JSON object"}.get(
        suffix, "safetensors"
    )
    if of_suffix in kind or (suffix == ".npz" and kind.startswith("a zip archive")):
        return
    how = next((told for part, told in _CONVERTED if part in kind), "")
    raise InputError(f"{path} is {kind}: {how}{_READ}")


def load_direction(
    source: str | Path,
    project_harmless: bool = False,
    winner: bool = False,
    *,
    project_first_token: bool = False,
) -> Direction:
    """Read a run folder's direction, a safetensors file with a tensor ``direction``, or the one
    that the record of an edit holds.

    Args:
        source: the folder or file.
        project_harmless: remove what the direction has along the mean harmless activation of its
            position and layer, which the run folder holds; nothing where that was done before.
        winner: of a set that ``select --per-layer`` wrote, the one direction that it chose.
        project_first_token: likewise, what it has along the first token's mean residual stream.

    Raises:
        InputError: there is none, it is not one vector of numbers, or nothing is left of it.
        UsageError: it is a direction set.

    Source:
        Section 2.3: the vector that selection chose.

    Examples:
        >>> ab.load_direction(d.save(tmp / "d.safetensors")).layer == d.layer
        True
    """
    path = find_direction(source)
    found = _read(path, winner)
    if isinstance(found, DirectionSet):
        raise UsageError(
            f"{path} holds a direction for each layer, and this needs one for all: give a file "
            "that holds one, or run select without --per-layer"
        )
    return _projected(found, Projection(project_harmless, project_first_token), path)


def load_directions(
    source: str | Path,
    projection: Projection = WHOLE,
    position: int | None = None,
    interpolate: str | None = None,
) -> Direction | DirectionSet:
    """Read what :func:`load_direction` reads, or a direction set.

    Args:
        source: the folder or file.
        projection: what is to be taken out as by :func:`load_direction`, for each layer of a set.
        position: take the differences of the run folder's means at this position.
        interpolate: ``linear`` or ``spherical``: fill the layers between those that have a
            direction, or (``linear:4,10``) between these.

    Raises:
        InputError: there is none, or nothing is left of it.
        UsageError: the run folder has no such position, or there is nothing to interpolate.
    """
    path = find_direction(source, position)
    if position is not None:
        means = _of_means(path, position, projection)
        found: Direction | DirectionSet = replace(means, place=str(path))
    else:
        found = _read(path)
        if isinstance(found, DirectionSet):
            found = _projected_set(replace(found, place=str(path)), projection, path)
        else:
            found = _projected(found, projection, path)
    if interpolate is None:
        return found
    kind, layers = parse_interpolation(interpolate)
    chosen = parse_layers(layers, "--interpolate")
    if not isinstance(found, DirectionSet):
        raise UsageError(
            f"--interpolate needs a direction for each of several layers, and {path} holds one for "
            "all"
        )
    return interpolated(found, kind, None if chosen is None else sorted(chosen))


def _of_means(path: Path, position: int, projection: Projection) -> DirectionSet:
    """The differences of a run folder's means at one position.

    Raises:
        InputError: the file holds no means.
        UsageError: it holds none at that position.
    """
    means = read_tensors(path, "mean_harmful", "mean_harmless")
    try:
        positions = json.loads(tensor_metadata(path)["positions"])
        held = [int(one) for one in positions]
        harmful, harmless = (mean[list(range(len(held)))] for mean in means.values())
        if harmful.ndim != 3 or harmful.shape != harmless.shape:
            raise ValueError
    except (LookupError, TypeError, ValueError):
        raise InputError(
            f"{path} does not hold means by position and layer: run extract again"
        ) from None
    if position not in held:
        raise UsageError(
            f"--position {position}: {path} holds positions {', '.join(map(str, held))}"
        )
    row, sha256 = held.index(position), hash_file(path)
    first_token = find_first_token(path, harmful.shape[1:])
    if projection.first_token and first_token is None:
        raise InputError(f"{path} {NO_FIRST_TOKEN}")
    return set_of_means(harmful[row], harmless[row], position, sha256, projection, first_token)


def find_first_token(means: Path, shape: Sequence[int]) -> Tensor | None:
    """The mean residual stream of the first token, if ``extract`` has left it.

    Args:
        means: a run folder's file of means.
        shape: ``n_layers, d_model``.

    Raises:
        InputError: it is of another shape.
    """
    mean: Tensor | None = read_tensors(means).get(FIRST_TOKEN_MEAN)
    if mean is not None and tuple(mean.shape) != tuple(shape):
        raise InputError(
            f"{means}: tensor '{FIRST_TOKEN_MEAN}' has shape {list(mean.shape)}, the other means "
            f"need {list(shape)}: run extract again"
        )
    return mean


def _projected(direction: Direction, projection: Projection, path: Path) -> Direction:
    """The direction less what is to be taken out and has not been.

    Raises:
        InputError: the file does not lie in a run folder, or nothing is left.
    """
    # Of all at once: what one leaves behind the other could bring back.
    wanted = direction.projection | projection
    if wanted == direction.projection:
        return direction
    options, means = " and ".join(projection.options), path.with_name(MEANS_NAME)
    if path.name != FILE_NAME or not means.is_file():
        raise InputError(
            f"{path}: {options} needs {projection.words}, which a run folder's {MEANS_NAME} "
            "holds: give that folder as --direction"
        )
    mean = read_tensors(means, "mean_harmless")["mean_harmless"]
    first_token = find_first_token(means, mean.shape[1:])
    if wanted.first_token and first_token is None:
        raise InputError(f"{means} {NO_FIRST_TOKEN}")
    try:
        row = json.loads(tensor_metadata(means)["positions"]).index(direction.position)
        layer = range(mean.shape[1])[direction.layer]  # type: ignore[index]
        along = None if first_token is None else first_token[layer]
        vector = wanted.of(direction.vector.double(), mean[row, layer], along)
    except (LookupError, TypeError, ValueError, RuntimeError):
        raise InputError(
            f"{means} does not hold position {direction.position}, layer {direction.layer} of "
            f"{path}: run select again"
        ) from None
    if not vector.any():
        raise InputError(f"{path} lies along {wanted.words}: {options} leaves nothing")
    return replace(
        direction,
        vector=vector,
        project_harmless=wanted.harmless,
        project_first_token=wanted.first_token,
        taken_out=wanted - direction.projection,
    )


def _projected_set(directions: DirectionSet, projection: Projection, path: Path) -> DirectionSet:
    """Each direction less what is to be taken out, by the means of where it was taken.

    Raises:
        InputError: where one was taken is not known, or nothing is left of it.
    """
    held, wanted = directions.projection, directions.projection | projection
    if wanted == held:
        return directions
    rows = directions.vectors.clone()
    for layer in directions.layers:
        candidate = directions.candidates[layer]
        if candidate is None:
            raise InputError(
                f"{path} does not say where its direction of layer {layer} was taken, which "
                f"{' and '.join(projection.options)} needs: give the run folder of select "
                "--per-layer, or --position"
            )
        own = Direction(
            rows[layer],
            *candidate,
            project_harmless=held.harmless,
            project_first_token=held.first_token,
        )
        rows[layer] = _projected(own, projection, path).vector
    sha256 = hash_text(str(directions.sha256), *wanted.names)
    return replace(
        directions, vectors=rows, sha256=sha256, projection=wanted, taken_out=wanted - held
    )


def _read(path: Path, winner: bool = False) -> Direction | DirectionSet:
    if is_edit_record(path):
        record = read_record(path, "orthogonalize")
        return recorded_set(record, path) or recorded_direction(record, path)
    if is_foreign(path):
        return _foreign(path)
    tensors = read_tensors(path)
    if DIRECTIONS in tensors and not (winner and "direction" in tensors):
        return set_of_tensors(tensors, tensor_metadata(path), path, hash_file(path))
    if "direction" not in tensors and steering_layers(list(tensors)):
        return _foreign(path)
    if "direction" not in tensors and "mean_harmful" in tensors:
        raise InputError(
            f"{path} holds the means of extract: give its folder as --direction, with --position"
        )
    vector = read_tensors(path, "direction")["direction"]
    if vector.ndim != 1 or not vector.is_floating_point():
        raise InputError(
            f"{path}: tensor 'direction' must be one vector of floats, not "
            f"{list(vector.shape)} {vector.dtype} (a set is called 'directions')"
        )
    metadata = tensor_metadata(path)
    projection = Projection.recorded(metadata)

    def number(key: str) -> int | None:
        text = metadata.get(key, "None")
        if text == "None":
            return None
        try:
            return int(text)
        except ValueError:
            raise InputError(
                f"{path}: metadata '{key}' must be a whole number, not '{text[:40]}'"
            ) from None

    return Direction(
        vector.double(),
        number("position"),
        number("layer"),
        hash_file(path),
        projection.harmless,
        metadata.get("model"),
        projection.first_token,
    )


def _foreign(path: Path) -> Direction | DirectionSet:
    """What a file of another program holds."""
    import torch

    found = read_foreign(path)
    if isinstance(found, ForeignVectors):
        return set_of_foreign(found, hash_file(path))
    return Direction(
        torch.from_numpy(found.values), found.position, found.layer, sha256=hash_file(path)
    )
