"""The exact commands that made a run folder, from what its records say.

The records may be a stranger's, and commands are there to be pasted: what grants something is not
repeated from them. A placeholder stands for it, or it is left out, and a note says what it was.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel

from abliterate.direction import FILE_NAME
from abliterate.report.collect import Document, Run
from abliterate.run_folder import DIRECTIONS
from abliterate.settings import (
    Settings,
    flags_of,
    granted,
    is_recorded,
    option_for,
    options_of,
    sections_of,
)
from abliterate.settings.values import split_server

_TRUST, _DIRECTION = "trust_remote_code", "DIRECTION"
_SECTIONS = sections_of(Settings)


def commands(run: Run, edited: Path | None = None) -> list[str]:
    """The commands, in order, of the stages that are present.

    Args:
        run: the records.
        edited: the edited checkpoint's folder, if it is no part of the run folder.
    """
    folder = _argument(run.folder)
    done: list[list[str]] = []
    base: Mapping[str, Any] = {}
    if run.extract is not None:
        base = run.extract["settings"]
        own = _changed("extract", base, {}, ("model", "chat", "extract"))
        done.append(["extract", *_model(run.extract), "-o", folder, *own])
    if run.selection is not None:
        own = _later("select", run.selection, base)
        own += _changed("select", run.selection["settings"], {}, ("select",))
        done.append(["select", folder, *own])
    if run.edit is not None:
        place = _argument(edited or run.edit_folder or "")
        source = _model(run.edit, "source")
        done.append(
            ["orthogonalize", *source, "--direction", folder, "-o", place, *_edit(run.edit)]
        )
    if run.evaluation is not None:
        done.append(_evaluate(run, run.evaluation, base))
    if run.inspect is not None:
        position = f"--position={run.inspect['position']}"
        done.append(["inspect", folder, *_later("inspect", run.inspect, base), position])
    if run.trace is not None:
        done.append(_trace(run.trace, folder, base))
    done.append(["report", folder, *([] if edited is None else ["--edited", _argument(edited)])])
    return [shlex.join(["abliterate", *command]) for command in done]


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
            if not told and key in held and held[key] != usual:
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
    named = {k: train[k] for k in ("harmful", "harmless") if k in train and own.get(k) is None}
    return found + _changed("extract", {"extract": named}, base, ("extract",))


def _edit(record: Document) -> list[str]:
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
    return found + _projected(record)


def _projected(record: Document) -> list[str]:
    """The options that say what is made of the run's direction; no harm where select did it."""
    direction = record.get("direction")
    if not isinstance(direction, Mapping):
        return []
    found = ["--project-harmless"] if direction.get("project_harmless") is True else []
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


def _evaluate(run: Run, record: Document, base: Mapping[str, Any]) -> list[str]:
    command, folder = ["evaluate", *_model(record)], _argument(run.folder)
    if record.get("direction") and _own_direction(run):
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
        command += _option("--checkpoint", _named(name, place))
    command += _later("evaluate", record, base)
    command += _projected(record) if record.get("direction") and _own_direction(run) else []
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
