"""The exact commands that made a run folder, from what its records say.

The records may be a stranger's, and commands are there to be pasted: what grants something is not
repeated from them. A placeholder stands for it, or it is left out, and a note says what it was.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel

from abliterate.direction import FILE_NAME
from abliterate.editing.file_names import RECORD
from abliterate.projection import Projection
from abliterate.report.collect import Document, Run
from abliterate.run_folder import DIRECTIONS, EXTRACT, MODEL, SELECTION
from abliterate.selection.candidate_filters import Thresholds, apply_filters
from abliterate.selection.no_candidate import nearest
from abliterate.selection.score_table import read_scores
from abliterate.settings import (
    Settings,
    flags_of,
    followed_table,
    granted,
    is_recorded,
    option_for,
    options_of,
    sections_of,
)
from abliterate.settings.values import split_server
from abliterate.storage.artifacts import read_record

_TRUST, _DIRECTION = "trust_remote_code", "DIRECTION"
_SECTIONS = sections_of(Settings)
# An option that admits a candidate, as a selection that chose nothing names it.
_ADMITS = re.compile(r"(--[a-z-]+)[ =](.+)")


def commands(run: Run, edited: Path | None = None) -> list[str]:
    """The commands, in order, of the stages that are present.

    Args:
        run: the records.
        edited: the edited checkpoint's folder, if it is no part of the run folder.
    """
    report = ["report", _argument(run.folder)]
    report += [] if edited is None else ["--edited", _argument(edited)]
    done = [*_by_part(run, edited).values(), report]
    return [shlex.join(["abliterate", *command]) for command in done]


def renewals(run: Run, edited: Path | None = None) -> dict[str, list[str]]:
    """By stale part of a run, the commands that make it anew of what the folder holds now.

    Args:
        run: the records, and which of them are stale.
        edited: as for :func:`commands`.
    """
    made = _by_part(run, edited, renew=True)
    chosen = run.selection is None or run.selection.get("winner", True) is not None
    again = [] if chosen or "selection" in run.stale else [_admitting(run, made["selection"])]
    found: dict[str, list[str]] = {}
    for part in run.stale:
        first = again if part not in ("extract", "selection") else []
        own = made.get(part, _fragility(run))
        edits = [_edit_again(run, place) for place in run.stale[part].edits]
        found[part] = [shlex.join(["abliterate", *command]) for command in (*first, *edits, own)]
    return found


def _by_part(run: Run, edited: Path | None, renew: bool = False) -> dict[str, list[str]]:
    """The words of each part's command; to renew it, of the direction that the folder holds now."""
    folder = _argument(run.folder)
    done: dict[str, list[str]] = {}
    base: Mapping[str, Any] = {}
    if run.extract is not None:
        base = run.extract["settings"]
        own = _changed("extract", base, {}, ("model", "chat", "extract"))
        done["extract"] = ["extract", *_model(run.extract), "-o", folder, *own]
    if run.selection is not None:
        own = _later("select", run.selection, base)
        own += _changed("select", run.selection["settings"], {}, ("select",))
        done["selection"] = ["select", folder, *own]
    if run.edit is not None:
        place = _argument(edited or run.edit_folder or "")
        words = ["orthogonalize", *_model(run.edit, "source"), "--direction", folder, "-o", place]
        done["edit"] = [*words, *_edit(run.edit, renew), *(["--overwrite"] if renew else [])]
    if run.evaluation is not None:
        done["evaluation"] = _evaluate(run, run.evaluation, base, renew)
    if run.inspect is not None:
        position = f"--position={run.inspect['position']}"
        done["inspect"] = ["inspect", folder, *_later("inspect", run.inspect, base), position]
    if run.trace is not None:
        done["trace"] = _trace(run.trace, folder, base)
    return done


def _edit_again(run: Run, place: Path) -> list[str]:
    """The command of the checkpoint there, along the direction that the run holds now."""
    record, folder = read_record(place / RECORD, "orthogonalize"), _argument(run.folder)
    words = ["orthogonalize", *_model(record, "source"), "--direction", folder]
    own = _own_place(run, place)
    return [*words, "-o", _argument(own), *_edit(record, renew=True), "--overwrite"]


def _own_place(run: Run, place: Path) -> Path:
    """Where an edit of this run is made: never in another run folder, as of a copied one."""
    here = run.folder / MODEL
    foreign = place.name == MODEL and (place.parent / EXTRACT).is_file()
    return here if foreign and place.resolve() != here.resolve() else place


def _fragility(run: Run) -> list[str]:
    """Its record holds no settings, but how many steps and prompts there were."""
    record, command = run.fragility or {}, ["fragility", _argument(run.folder)]
    counts, points = record.get("n_prompts"), record.get("points")
    held = {
        "--steps": len(points) if isinstance(points, list) else None,
        "--n-test": counts.get("harmful") if isinstance(counts, Mapping) else None,
        "--max-new-tokens": record.get("max_new_tokens"),
    }
    usual = {"--steps": 11, "--n-test": 32, "--max-new-tokens": 64}
    for flag, value in held.items():
        if isinstance(value, int) and value != usual[flag]:
            command += _option(flag, value)
    return command


def _admitting(run: Run, command: list[str]) -> list[str]:
    """The command of a select that chose nothing, with what admits the nearest that it named."""
    record: Document = run.selection or {}
    scores, n_layers = read_scores(record, None, str(run.folder / SELECTION))
    limits = record["thresholds"]
    thresholds = Thresholds(limits["kl"], limits["induce"], limits["prune_layers"])
    found = nearest(apply_filters(scores, n_layers, thresholds), thresholds)
    for miss in found[0][1] if found else ():
        if (option := _ADMITS.fullmatch(miss.option)) is not None:
            command = [*_without(command, option[1]), f"{option[1]}={option[2]}"]
    return command


def _without(command: Sequence[str], flag: str) -> list[str]:
    """A command less an option and its value."""
    kept = [word for word in command if not word.startswith(f"{flag}=")]
    if flag in kept:
        at = kept.index(flag)
        del kept[at : at + 2]
    return kept


def notes(run: Run) -> list[str]:
    """What the commands do not say: what the reader must grant, and what the placeholders are."""
    records = {
        "extract": run.extract,
        "select": run.selection,
        "evaluate": run.evaluation,
        "inspect": run.inspect,
        "trace": run.trace,
    }
    found = []
    trusting = [
        name
        for name, record in records.items()
        if record is not None and record["settings"].get("model", {}).get(_TRUST)
    ]
    if trusting:
        found.append(
            f"{', '.join(trusting)}: made with the code of {run.model}. Add --trust-remote-code "
            "yourself if you have read that code and trust it."
        )
    if run.evaluation is not None:
        settings = run.evaluation["settings"].get("evaluate", {})
        for key in _SECTIONS["evaluate"].model_fields:
            mark = granted(_SECTIONS["evaluate"], key)
            held = settings.get(key)
            if mark is not None and mark.placeholder and held not in (None, []):
                places = held if isinstance(held, list) else [held]
                shown = ", ".join(_public(str(place)) for place in places)
                found.append(f"{mark.placeholder}: {shown}, by the record.")
        if (direction := run.evaluation.get("direction")) and not _own_direction(run):
            found.append(f"{_DIRECTION}: the file with {direction['sha256']}.")
    return found


def _public(place: str) -> str:
    """An address without what may be secret in it: user, password and query."""
    row, url = split_server(place)
    if row is not None and "://" in url:
        return f"{row}={_public(url)}"
    parts = urlsplit(place)
    if not parts.scheme:
        return place
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _argument(value: Any) -> str:
    """A name as a positional argument: never read as an option."""
    text = str(value)
    return f"./{text}" if text.startswith("-") else text


def _model(record: Document, key: str = "model") -> list[str]:
    identity = record[key]
    revision = identity.get("revision")
    return [_argument(identity["id"]), *_option("--revision", revision)]


def _changed(
    command: str, settings: Mapping[str, Any], base: Mapping[str, Any], tables: Sequence[str]
) -> list[str]:
    """The command's options for values that are not what it has without them.

    Args:
        command: its name; settings that it has no option for are left out.
        settings: what a stage recorded.
        base: what the stage took its recorded settings from; empty where it took none.
        tables: which tables to look at.
    """
    found: list[str] = []
    for table in tables:
        section, held = _SECTIONS[table], settings.get(table, {})
        for key, field in section.model_fields.items():
            usual = field.get_default(call_default_factory=True)
            if table in base and is_recorded(section, key):
                usual = base[table].get(key, usual)
            # The revision is the commit that the record's model names.
            told = key == "revision" or option_for(command, section, key) is None
            # One that follows another is told where either differs: the command may have both.
            followed = settings.get(followed_table(section, key) or "", {}).get(key, usual)
            if not told and key in held and (held[key] != usual or held[key] != followed):
                found += _setting(section, key, held[key])
    return found


def _setting(section: type[BaseModel], key: str, value: Any) -> Iterator[str]:
    """The option that gives a setting this value; what the reader must grant is not repeated."""
    flag, _, negated = flags_of(section, key).partition("/")
    mark = granted(section, key)
    if isinstance(value, list | tuple) and mark is not None:  # servers, each of its row
        rows = [split_server(str(item))[0] for item in value]
        value = [f"{row}={mark.placeholder}" if row else mark.placeholder for row in rows]
    elif value is not None and mark is not None:
        value = mark.placeholder
    if value is True or (value is False and negated):
        yield flag if value else negated
    elif value is not None and any(option.implied for option in options_of(section, key)):
        yield f"{flag}={value}"  # its value may be left out, so it cannot stand apart
    elif value is not False:
        yield from _option(flag, value)


def _option(flag: str, value: Any) -> Iterator[str]:
    """The flag with its value, once for each of several; nothing for None."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _option(flag, item)
    elif value is not None:
        text = json.dumps(value) if isinstance(value, Mapping) else str(value)
        # A value such as -5,-1 would be read as an option of its own.
        yield from [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _later(command: str, record: Document, base: Mapping[str, Any]) -> list[str]:
    """Options for the model and the prompts of a stage that starts from what extract recorded."""
    settings = record["settings"]
    found = _changed(command, settings, base, ("model", "chat", "extract"))
    if command not in _SECTIONS:
        return found
    # Prompts that no option of the stage names are those of its configuration file's [extract].
    own, train = settings.get(command, {}), settings.get("extract", {})
    named = {k: train[k] for k in ("harmful", "harmless") if k in train and not own.get(k)}
    return found + _changed("extract", {"extract": named}, base, ("extract",))


def _edit(record: Document, renew: bool = False) -> list[str]:
    options = dict(record["options"])
    if isinstance(kept := options.get("norm_preserve"), bool):
        options["norm_preserve"] = "rows" if kept else None
    if isinstance(options.get("layer_scale"), Mapping):
        options["layer_scale"] = "LAYER_SCALE"  # the record holds the weights, not their file
    quantized = options.pop("quantized", None)
    options |= {} if quantized is None else {quantized.removesuffix("d"): True}
    leak = float(record.get("leak_of_plan") or 0.0)
    found = _changed("orthogonalize", {"orthogonalize": options}, {}, ("orthogonalize",))
    if leak > 1e-3:  # an architecture that is edited only on request
        found += ["--allow-leak", f"{math.ceil(leak * 1000) / 1000:g}"]
    return found + _projected(record, renew)


def _projected(record: Document, renew: bool = False) -> list[str]:
    """The options that say what is made of the run's direction; no harm where select did it, unless
    it is renewed: by then select may have chosen one that is whole."""
    direction = record.get("direction")
    if not isinstance(direction, Mapping):
        return []
    of = Projection.recorded_when_loaded if renew else Projection.recorded
    found = of(direction).options
    if "layers" in direction:  # a set, and what was made into it
        position, kind = direction.get("position"), direction.get("interpolate")
        found += [] if position is None else [f"--position={position}"]
        found += _option("--interpolate", kind)
    return found


def _own_direction(run: Run) -> bool:
    """Whether the evaluation's direction is the one that was selected in this folder."""
    assert run.evaluation is not None
    if run.selection is None:
        return (run.folder / FILE_NAME).is_file()
    outputs = [record.get("outputs", {}) for record in (run.selection, run.extract or {})]
    selected = outputs[0].get(FILE_NAME)
    direction = run.evaluation["direction"]
    held = direction.get("file") or direction.get("sha256")
    return selected is None or held in (selected, outputs[1].get(DIRECTIONS))


def _evaluate(
    run: Run, record: Document, base: Mapping[str, Any], renew: bool = False
) -> list[str]:
    command, folder = ["evaluate", *_model(record)], _argument(run.folder)
    own = bool(record.get("direction")) and (renew or _own_direction(run))
    if own:
        command += ["--direction", folder]
    else:
        base = {}
        command += ["--direction", _DIRECTION] if record.get("direction") else []
        command += ["-o", folder]
    places = record.get("checkpoints") or {}
    rows = list(record["interventions"])
    known = [name for name in rows if name in ("baseline", "ablate", "add", "subtract")]
    default = ["baseline", "ablate", "add"] if record.get("direction") else ["baseline"]
    if "layers" in (record.get("direction") or {}):  # a set is not added
        default.remove("add")
    edited = [name for name in rows if name not in known]
    asked = list(dict.fromkeys(name if name in known else "checkpoint" for name in rows))
    if asked != [*default, *(["checkpoint"] if edited else [])]:
        command += [part for name in asked for part in ("--intervention", name)]
    for name in edited:
        place = str(places.get(name, {}).get("id") or run.edit_folder or name)
        place = str(_own_place(run, Path(place))) if renew else place
        command += _option("--checkpoint", _named(name, place))
    command += _later("evaluate", record, base)
    command += _projected(record, renew) if own else []
    return command + _changed("evaluate", record["settings"], {}, ("evaluate",))


def _named(name: str, place: str) -> str:
    """A checkpoint as ``--checkpoint`` takes it, so that its row has this name."""
    plain = Path(place).name == name and ("=" not in place or "/" in place.partition("=")[0])
    return place if plain else f"{name}={place}"


def _trace(record: Document, folder: str, base: Mapping[str, Any]) -> list[str]:
    command = ["trace", folder]
    asked = record["request"]
    command += _option("--prompts", asked["harmful"])
    command += _option("--harmless", asked["harmless"])
    command += _option("--n-prompts", asked["n_prompts"])
    if record["suffix"]:
        command.append(f"--suffix={record['suffix']['text']}")
    if asked["n_heads"] != 10:
        command += _option("--heads", asked["n_heads"])
    return command + _later("trace", record, base)
