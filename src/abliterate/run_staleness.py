"""Which records of a run folder are of something that the folder no longer holds.

Every record names the hashes of its inputs: ``model`` (commit or files), ``direction``,
``checkpoints`` and, under ``made_from``, the rest. Here they are compared with what lies there now.
Records of older versions, which lack ``made_from``, are compared by what they do name. What cannot
be told is not called stale. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abliterate.checkpoints.checkpoint import Checkpoint
from abliterate.direction import FILE_NAME
from abliterate.editing.file_names import RECORD
from abliterate.errors import AbliterateError
from abliterate.run_folder import (
    ACTIVATIONS,
    COMPLETIONS,
    DIRECTIONS,
    EVALUATION,
    EXTRACT,
    FRAGILITY,
    INSPECT,
    MODEL,
    SELECTION,
    TRACE,
)
from abliterate.storage.artifacts import hash_file, hash_json, is_plain_name, read_record

Document = Mapping[str, Any]
# The parts of a run in the order in which they are made, by their records.
FILES = {
    "extract": EXTRACT,
    "selection": SELECTION,
    "edit": f"{MODEL}/{RECORD}",
    "evaluation": EVALUATION,
    "inspect": INSPECT,
    "trace": TRACE,
    "fragility": FRAGILITY,
}


@dataclass(frozen=True)
class Stale:
    """A record that is of something else than the run folder holds now.

    Attributes:
        part: which, as :data:`FILES` names it.
        file: its record.
        reasons: what has changed since.
        rows: the rows that are stale, where the others of an evaluation are not; empty: all.
        edits: the checkpoints of an evaluation that are to be made again before it.
    """

    part: str
    file: Path
    reasons: tuple[str, ...]
    rows: tuple[str, ...] = ()
    edits: tuple[Path, ...] = ()

    @property
    def why(self) -> str:
        return "; ".join(self.reasons)


def hash_prompts(keys: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """By kind, one hash of the prompts that a record names by their keys."""
    return {kind: hash_json(list(chosen)) for kind, chosen in keys.items()}


def find_stale(run: Path, edited: Path | None = None) -> dict[str, Stale]:
    """The stale parts of a run folder, in the order in which they are made.

    A record that is missing or damaged is none: whoever reads it says so.

    Args:
        run: the run folder.
        edited: the edited checkpoint, if it lies elsewhere than in ``run/model``.
    """
    held = {part: _record(run / name) for part, name in FILES.items()}
    place = edited or run / MODEL
    held["edit"] = _record(place / RECORD)
    now = _Now(run, held["extract"], held["selection"])
    found: dict[str, Stale] = {}
    for part, record in held.items():
        if record is None:
            continue
        file = place / RECORD if part == "edit" else run / FILES[part]
        reasons = [*_inherited(part, record, found), *_REASONS[part](record, now)]
        rows = _stale_rows(record, now) if part == "evaluation" else Stale(part, file, ())
        if reasons:
            found[part] = Stale(part, file, tuple(dict.fromkeys(reasons)), edits=rows.edits)
        elif rows.rows:
            found[part] = rows
    return found


class _Now:
    """What a run folder holds now.

    Attributes:
        run: the folder.
        extract: its record of extract, or None.
        selection: its record of select, or None.
    """

    def __init__(self, run: Path, extract: Document | None, selection: Document | None) -> None:
        self.run, self.extract, self.selection = run, extract, selection
        left = _mapping(selection, "outputs")
        self.candidates = self.hash_of(DIRECTIONS) or _mapping(extract, "outputs").get(DIRECTIONS)
        self.direction = self.hash_of(FILE_NAME) or left.get(FILE_NAME)
        self.chose_none = selection is not None and selection.get("winner", False) is None

    def hash_of(self, name: str) -> str | None:
        try:
            return hash_file(self.run / name) if (self.run / name).is_file() else None
        except OSError:
            return None

    @property
    def used_prompts(self) -> dict[str, str]:
        """The hash of the prompts that extract and select have used, as evaluate records it."""
        return hash_prompts(self.used_keys)

    @property
    def used_keys(self) -> dict[str, list[str]]:
        """By kind, the keys of the prompts that extract and select have used.

        Empty where one of the records is not there: what it used cannot be told.
        """
        records = [record for record in (self.extract, self.selection) if record is not None]
        if len(records) < 2:
            return {}
        try:
            return {
                kind: [key for record in records for key in record["prompts"][kind]]
                for kind in ("harmful", "harmless")
            }
        except (LookupError, TypeError):
            return {}


def _record(path: Path) -> Document | None:
    try:
        return read_record(path, "") if path.is_file() else None
    except (AbliterateError, OSError):
        return None


def _mapping(record: Document | None, key: str) -> Document:
    held = (record or {}).get(key)
    return held if isinstance(held, Mapping) else {}


def _inherited(part: str, record: Document, found: Mapping[str, Stale]) -> Iterator[str]:
    """What comes of a stale record is stale."""
    if part == "selection" and "extract" in found:
        yield f"{EXTRACT} is stale itself"
    elif "selection" in found and (part == "inspect" or _mapping(record, "direction")):
        yield f"{SELECTION} is stale itself"


def _of_extract(record: Document, now: _Now) -> Iterator[str]:
    left, found = _mapping(record, "outputs").get(DIRECTIONS), now.hash_of(DIRECTIONS)
    if left is not None and found is not None and left != found:
        yield f"{DIRECTIONS} is not what it left"


def _of_selection(record: Document, now: _Now) -> Iterator[str]:
    yield from _of_another_model(record, now)
    scored = _mapping(record, "made_from").get("candidates")
    if scored is not None and now.candidates is not None and scored != now.candidates:
        yield f"{DIRECTIONS} holds the candidates of another extraction now"
    # Of an older version, which named no candidates:
    elif scored is None and now.extract is not None and not _same_tokens(record, now.extract):
        yield f"{EXTRACT} is of another extraction now"
    left, found = _mapping(record, "outputs").get(FILE_NAME), now.hash_of(FILE_NAME)
    if found is not None and left != found:
        yield f"{FILE_NAME} is not the one that it chose"


def _same_tokens(record: Document, extract: Document) -> bool:
    return bool(record.get("refusal_tokens") == extract.get("refusal_tokens"))


def _of_another_model(record: Document, now: _Now, key: str = "model") -> Iterator[str]:
    """Where both name the model in the same way: by a commit, or by the hashes of its files."""
    one, other = _mapping(record, key), _mapping(now.extract, "model")
    for name in ("revision", "files"):
        if one.get(name) and other.get(name) and one[name] != other[name]:
            yield f"of another model than {EXTRACT} (its {name} differ)"


def _of_direction(record: Document, now: _Now) -> Iterator[str]:
    held = _mapping(record, "direction")
    digest = held.get("file") or held.get("sha256")  # of what is made of a file, that file
    if digest is None:  # nothing of it is of a direction
        return
    if "layers" in held and held.get("position") is not None:  # the means, whatever was chosen
        if now.candidates is not None and digest != now.candidates:
            yield f"of other means than {DIRECTIONS} holds now"
    elif now.chose_none:
        yield f"{SELECTION} chose no direction since"
    elif now.direction is not None and digest != now.direction:
        winner = _mapping(now.selection, "winner")
        places = [(part.get("position"), part.get("layer")) for part in (held, winner)]
        if winner and places[0] != places[1]:
            at = [f"layer {layer}, position {position}" for position, layer in places]
            yield f"of the direction of {at[0]}; {SELECTION} has chosen {at[1]}"
        else:
            yield f"of another direction than {FILE_NAME} holds now"


def _of_used_prompts(record: Document, now: _Now) -> Iterator[str]:
    used = _mapping(record, "made_from").get("used_prompts")
    if used and now.used_prompts and used != now.used_prompts:
        yield "extract or select has used other prompts since, which a test leaves out"


def _of_edit(record: Document, now: _Now) -> Iterator[str]:
    yield from _of_another_model(record, now, "source")
    yield from _of_direction(record, now)


def _of_test(record: Document, now: _Now) -> Iterator[str]:
    yield from _of_another_model(record, now)
    yield from _of_direction(record, now)
    yield from _of_used_prompts(record, now)


def _of_evaluation(record: Document, now: _Now) -> Iterator[str]:
    yield from _of_test(record, now)
    for name, digest in _mapping(record, "outputs").items():
        found = now.hash_of(f"{COMPLETIONS}/{name}") if is_plain_name(name) else None
        if found is not None and found != digest:
            yield f"{COMPLETIONS}/{name} holds other answers now than it counted"


def _of_inspection(record: Document, now: _Now) -> Iterator[str]:
    yield from _of_another_model(record, now)
    yield from _of_direction(record, now)
    held = _mapping(record, "made_from")
    if held.get("candidates") not in (None, now.candidates):
        yield f"{DIRECTIONS} holds the candidates of another extraction now"
    if "activations" in held and held["activations"] != now.hash_of(ACTIVATIONS):
        yield f"{ACTIVATIONS} is another now, or gone"
    tried, used = _mapping(_mapping(record, "held_out"), "prompts"), now.used_keys
    if any(
        key in used.get(kind, ())
        for kind, keys in tried.items()
        for key in (keys if isinstance(keys, list) else ())
    ):
        yield "extract or select has used prompts since, which it held out"
    chosen = _mapping(now.selection, "bootstrap")
    resampled = {name: value for name, value in chosen.items() if name != "candidates"}
    if "bootstrap" in record and record["bootstrap"] != (resampled or None):
        yield f"{SELECTION} tells otherwise how sure the choice is"


_REASONS = {
    "extract": _of_extract,
    "selection": _of_selection,
    "edit": _of_edit,
    "evaluation": _of_evaluation,
    "inspect": _of_inspection,
    "trace": _of_test,
    "fragility": _of_test,
}


def _stale_rows(record: Document, now: _Now) -> Stale:
    """The rows of an evaluation whose checkpoint is another one now, or of another direction."""
    reasons: dict[str, str] = {}
    edits: list[Path] = []
    for name, identity in _mapping(record, "checkpoints").items():
        held = identity if isinstance(identity, Mapping) else {}
        place = held.get("id")
        if not isinstance(place, str) or "\0" in place or not held.get("files"):
            continue
        try:
            if not Path(place).is_dir():
                continue
            files = Checkpoint(place, Path(place)).identity()["files"]
        except OSError:
            continue
        if files != held["files"]:
            reasons[str(name)] = f"{place} holds another checkpoint now"
        if any(_of_direction(_record(Path(place) / RECORD) or {}, now)):
            reasons[str(name)] = f"{place} is an edit along another direction"
            edits.append(Path(place))
    told = tuple(f"{name}: {reason}" for name, reason in reasons.items())
    return Stale("evaluation", now.run / EVALUATION, told, tuple(reasons), tuple(edits))
