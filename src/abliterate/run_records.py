"""Reading the records of a run folder that may come from a stranger.

A record is data: what later stages use of it is checked by type and bounds here, and of its
settings only those are taken that ``abliterate.settings`` marks as recorded. Nothing in a record
makes a command run code, ask an address, send a key or write to a place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from abliterate.direction_loading import is_edit_record
from abliterate.editing.file_names import RECORD as EDIT
from abliterate.errors import CheckpointError, InputError, UsageError
from abliterate.exchange import is_foreign
from abliterate.hub import is_commit, split_id
from abliterate.run_folder import EVALUATION, EXTRACT, SELECTION
from abliterate.settings import Settings, take_recorded
from abliterate.settings.complaints import complaint
from abliterate.settings.values import check_revision
from abliterate.storage.artifacts import read_record, tensor_metadata


def _check_name(value: str) -> str:
    """A name that can be looked up as a folder or hub id without harm."""
    whole = value.encode(errors="ignore").decode() == value
    if not whole or not value.strip() or "\0" in value or len(value) > 4096:
        raise ValueError("must name a checkpoint")
    return value


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


def _check_commits(value: dict[str, str]) -> dict[str, str]:
    if not all(map(is_commit, value.values())):
        raise ValueError("must name commits")
    return value


class _Model(_Part):
    id: Annotated[str, AfterValidator(_check_name)]
    revision: Annotated[str | None, AfterValidator(check_revision)] = None


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
    datasets: Annotated[dict[str, str], AfterValidator(_check_commits)] = Field(
        default_factory=dict
    )


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


@dataclass(frozen=True)
class HubSource:
    """A hub id at the commit that something was made from.

    Attributes:
        id: ``org/name``.
        commit: of the repository.
        record: the file that says so.
    """

    id: str
    commit: str
    record: Path

    def is_of(self, model: str) -> bool:
        """Whether a user's name for a model is this id, at whatever revision."""
        named = split_id(model)
        same = named is not None and named[0].casefold() == self.id.casefold()
        return same and not Path(model).expanduser().exists()


def source_of_extract(run: Path, extracted: Mapping[str, Any]) -> HubSource | None:
    """The hub id and commit of a run folder's model; None for a folder."""
    return _hub_source(extracted["model"], run / EXTRACT)


def source_of_direction(direction: str | Path) -> HubSource | None:
    """The hub id and commit that a direction was found in, as far as anything says so.

    Args:
        direction: a run folder, a safetensors file or the record of an edit.

    Raises:
        InputError: the record is malformed.
    """
    path = Path(direction)
    if path.is_dir():
        return source_of_extract(path, read_extract(path)) if (path / EXTRACT).exists() else None
    if is_edit_record(path):
        return _source_in_edit(path)
    if is_foreign(path):
        return None
    from safetensors import SafetensorError

    try:
        metadata = tensor_metadata(path)
    except SafetensorError:  # whoever loads the direction says what is wrong with it
        return None
    return _hub_source({"id": metadata.get("model"), **metadata}, path)


def source_of_edit(folder: Path) -> HubSource | None:
    """The hub id and commit that an edited checkpoint was made from, if its record names one."""
    path = folder / EDIT
    return _source_in_edit(path) if path.is_file() else None


def sources_of_evaluation(folder: Path) -> dict[str, HubSource]:
    """By row, the hub ids and commits of the checkpoints that an evaluation there has compared.

    Empty where there is no such record, or one that cannot be read: evaluate makes it again.
    """
    path = folder / EVALUATION
    try:
        held = read_record(path, "evaluate").get("checkpoints") if path.is_file() else None
    except InputError:
        return {}
    rows = held.items() if isinstance(held, Mapping) else ()
    found = {name: _hub_source(one, path) for name, one in rows if isinstance(one, Mapping)}
    return {name: source for name, source in found.items() if source is not None}


def _source_in_edit(path: Path) -> HubSource | None:
    source = read_record(path, "orthogonalize").get("source")
    return _hub_source(source, path) if isinstance(source, Mapping) else None


def _hub_source(model: Mapping[str, Any], record: Path) -> HubSource | None:
    name, revision = model.get("id"), model.get("revision")
    if not isinstance(name, str) or not isinstance(revision, str) or not is_commit(revision):
        return None
    return HubSource(name, revision, record)


def recorded_commits(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The commits of hub data sets that the records (of :func:`read_used`) name; later ones win."""
    found = (record.get("datasets", {}) for record in records)
    return {name: commit for datasets in found for name, commit in datasets.items()}


def _read(path: Path, made_by: str, kind: type[BaseModel]) -> dict[str, Any]:
    document = read_record(path, made_by)
    try:
        kind.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        message = complaint(first)
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
    source = source_of_extract(run, extracted)
    if source is not None:  # one experiment, one commit: whatever its branch says today
        base["model"]["revision"] = source.commit
    if model is None:
        return base
    same = model == extracted["model"]["id"] if source is None else source.is_of(model)
    if not same or "@" in model:
        base["model"].pop("revision", None)  # it is one of another repository
    revision = base["model"].get("revision")
    if revision is not None and own.model.revision is None and not Path(model).is_dir():
        check_trusted_revision(model, revision, run / EXTRACT, own.model.trust_remote_code)
    return base


def check_trusted_revision(
    model: str, revision: str, record: Path, trusts_code: bool, how: str = "--revision"
) -> None:
    """Refuse to run code at a revision that nobody but a record names.

    Anybody can put code into some revision of a hub repository, as a pull request.

    Raises:
        UsageError: the code of that model would run.
    """
    if trusts_code:
        raise UsageError(
            f"--trust-remote-code runs the code of one revision of {model}: give {how} "
            f"yourself ({record} records '{revision}')"
        )


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
