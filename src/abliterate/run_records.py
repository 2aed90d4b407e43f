"""Reading the records of a run folder that may come from a stranger.

A record is data: what later stages use of it is checked by type and bounds here, and of its
settings only those are taken that ``abliterate.settings`` marks as recorded. Nothing in a record
makes a command run code, ask an address, send a key or write to a place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from abliterate.errors import CheckpointError, InputError, UsageError
from abliterate.run_folder import EXTRACT, SELECTION
from abliterate.settings import Settings, take_recorded
from abliterate.storage.artifacts import read_record


def _check_name(value: str) -> str:
    """A name that can be looked up as a folder or hub id without harm."""
    whole = value.encode(errors="ignore").decode() == value
    if not whole or not value.strip() or "\0" in value or len(value) > 4096:
        raise ValueError("must name a checkpoint")
    return value


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class _Model(_Part):
    id: Annotated[str, AfterValidator(_check_name)]


class _Position(_Part):
    position: int = Field(lt=0, gt=-(2**31))
    token: str


class _Token(_Part):
    id: int = Field(ge=0, lt=2**31)
    token: str


class _Prompts(_Part):
    harmful: list[str]
    harmless: list[str]


class _Selection(_Part):
    """What later stages use of ``selection.json``."""

    prompts: _Prompts
    refusal_tokens: list[_Token] = Field(min_length=1)


class _Rendering(_Part):
    prompt: str
    template: str
    hash: str
    date: str | None


class _Bootstrap(_Part):
    """What is said of how sure the choice is."""

    resamples: int
    chosen: float | None
    none: float
    undecided: float
    covered: int
    scored: int
    winners: list[dict[str, int]]
    cosines: list[list[float]]


class _Choice(_Part):
    bootstrap: _Bootstrap | None = None


class _Extract(_Selection):
    """What later stages use of ``extract.json``."""

    model: _Model
    positions: list[_Position] = Field(min_length=1)
    n_layers: int = Field(ge=1, lt=2**31)
    settings: dict[str, JsonValue]
    inputs: str
    outputs: dict[str, str]
    rendering: _Rendering | None = None


def read_extract(run: Path) -> dict[str, Any]:
    """``RUN/extract.json``, checked.

    Raises:
        InputError: it is missing or malformed.
    """
    return _read(run / EXTRACT, f"extract MODEL -o {run}", _Extract)


def read_selection(run: Path) -> dict[str, Any]:
    """``RUN/selection.json``, checked; raises as :func:`read_extract`."""
    return _read(run / SELECTION, f"select {run}", _Selection)


def read_bootstrap(run: Path) -> dict[str, Any] | None:
    """What ``RUN/selection.json`` says of how sure its choice is, but for the single candidates.

    None if there is no such record, or an older one.

    Raises:
        InputError: it is malformed.
    """
    if not (run / SELECTION).is_file():
        return None
    held = _read(run / SELECTION, f"select {run}", _Choice).get("bootstrap")
    return held and {name: value for name, value in held.items() if name != "candidates"}


def read_used(run: Path) -> list[dict[str, Any]]:
    """The records of ``run`` that name prompts in use: extract's and select's, where present.

    Raises:
        InputError: one of them is malformed.
    """
    readers = {EXTRACT: read_extract, SELECTION: read_selection}
    return [read(run) for name, read in readers.items() if (run / name).exists()]


def used_prompts(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """By kind, the keys of the prompts that the records (of :func:`read_used`) name."""
    return {
        kind: [key for record in records for key in record["prompts"][kind]]
        for kind in ("harmful", "harmless")
    }


def used_refusal_tokens(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The refusal tokens of the first of the records, as ``--refusal-token`` takes them."""
    return [str(token["id"]) for record in records[:1] for token in record["refusal_tokens"]]


def _read(path: Path, made_by: str, kind: type[BaseModel]) -> dict[str, Any]:
    document = read_record(path, made_by)
    try:
        kind.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(
            f"{path}: {key}: {message}, not {first['input']!r:.80}: make it again with "
            f"`abliterate {made_by}`"
        ) from None
    return document


#: What a record of ``extract`` says of a candidate beside its direction.
STABILITY = ("split_half_cosine", "norm", "norm_standard_error")


def recorded_stability(
    extracted: Mapping[str, Any], position: int, layer: int
) -> dict[str, float | None]:
    """How sure a candidate is (``abliterate.extraction.group_sums.Stability``).

    None for what the record does not say: an older one, or a candidate without a direction.
    """
    held = extracted.get("stability")
    positions = [entry["position"] for entry in extracted["positions"]]

    def value(name: str) -> float | None:
        try:
            found = held[name][positions.index(position)][layer]  # type: ignore[index]
        except (LookupError, TypeError, ValueError):
            return None
        return found if isinstance(found, float) and math.isfinite(found) else None

    return {name: value(name) for name in STABILITY}


def recorded_settings(run: Path, extracted: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings that ``extract`` recorded, as the base of a later stage's own.

    Raises:
        InputError: one has the wrong type, or is no setting.
    """
    return take_recorded(extracted["settings"], str(run / EXTRACT))


def take_base(
    run: Path, extracted: Mapping[str, Any], model: str | None, own: Settings
) -> dict[str, dict[str, Any]]:
    """What the record gives a command beneath its own settings.

    Args:
        run: the run folder.
        extracted: its ``extract.json``.
        model: the checkpoint that the command line names, or None for the recorded one.
        own: the settings of the command line and its configuration file alone.

    Raises:
        InputError: the record is malformed.
        UsageError: remote code of a named model would run at a revision that only the record names.
    """
    base = recorded_settings(run, extracted)
    if model is not None and model != extracted["model"]["id"]:
        base["model"].pop("revision", None)  # it is one of another repository
    revision = base["model"].get("revision")
    if model is None or revision is None or own.model.revision is not None:
        return base
    # Anybody can put code into some revision of a hub repository, as a pull request.
    if own.model.trust_remote_code and not Path(model).is_dir():
        raise UsageError(
            f"--trust-remote-code runs the code of one revision of {model}: give --revision "
            f"yourself ({run / EXTRACT} records '{revision}')"
        )
    return base


def check_trust(run: Path, extracted: Mapping[str, Any], settings: Settings) -> None:
    """Refuse to go on from a run of remote code unless that code is trusted here and now.

    Without the code the model may be another one. A configuration file that says no to it is an
    answer too.

    Raises:
        CheckpointError: the run was made with remote code, and nobody said here that it may run.
    """
    decided = "trust_remote_code" in settings.model.model_fields_set
    if extracted["settings"].get("model", {}).get("trust_remote_code") and not decided:
        raise CheckpointError(
            f"{run / EXTRACT}: the run was made with the code of {extracted['model']['id']}, which "
            "a run folder cannot allow: give --trust-remote-code yourself if you have read that "
            "code and trust it"
        )
