"""What a run folder holds for its report: the records of whatever stages are present."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abliterate.console import command
from abliterate.editing.file_names import RECORD
from abliterate.errors import InputError
from abliterate.evaluation.completion import told_in
from abliterate.run_folder import (
    COMPLETIONS,
    EVALUATION,
    EXTRACT,
    FRAGILITY,
    INSPECT,
    MODEL,
    SELECTION,
    TRACE,
)
from abliterate.run_staleness import Stale, find_stale
from abliterate.storage.artifacts import is_plain_name, read_record
from abliterate.storage.json_text import parse_json

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Completions:
    """Answers side by side.

    Attributes:
        interventions: the columns.
        rows: ``{"prompt", "category", "kind", "answers": [one per column or None]}``, harmful
            prompts first; an answer is ``{"response", "refused", "safe", "told"}``,
            the last its thought and answer, or None.
    """

    interventions: tuple[str, ...]
    rows: tuple[Document, ...]


@dataclass(frozen=True)
class Run:
    """The records of a run folder, each None where its stage has not run.

    Attributes:
        folder: the run folder.
        edit_folder: where the edited checkpoint's record was found.
        fragility: the record of fragility.
        stale: the parts that are of something else than the folder holds now.
    """

    folder: Path
    extract: Document | None = None
    selection: Document | None = None
    inspect: Document | None = None
    trace: Document | None = None
    evaluation: Document | None = None
    edit: Document | None = None
    edit_folder: Path | None = None
    fragility: Document | None = None
    stale: Mapping[str, Stale] = field(default_factory=dict)

    def current(self, part: str) -> Document | None:
        """The record of a part; None where it is stale or missing."""
        found: Document | None = getattr(self, part)
        held = self.stale.get(part)
        return found if held is None or held.rows else None

    @property
    def stale_rows(self) -> tuple[str, ...]:
        """The rows of the evaluation that alone are stale."""
        held = self.stale.get("evaluation")
        return () if held is None else held.rows

    @property
    def model(self) -> str:
        """The model's name as the first record has it."""
        for record in (self.extract, self.selection, self.evaluation):
            if record is not None:
                return str(record["model"]["id"])
        return str(self.edit["source"]["id"]) if self.edit else "unknown"


def read_run(folder: Path, edited: Path | None = None) -> Run:
    """Read the records of a run folder.

    Args:
        folder: the run folder.
        edited: the edited checkpoint, if it lies elsewhere than in ``folder/model``.

    Raises:
        InputError: there is no such folder, no stage has run in it, or a record is damaged.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder} is no run folder: run `{command('extract', 'MODEL', '-o', folder)}`"
        )
    for name in (EXTRACT, SELECTION, INSPECT, TRACE, EVALUATION, FRAGILITY):
        stay_inside(folder / name, folder)
    extracted = _record(folder / EXTRACT, "extract MODEL -o RUN")
    selection = _record(folder / SELECTION, "select RUN")
    inspected = _record(folder / INSPECT, "inspect RUN")
    traced = _record(folder / TRACE, "trace RUN")
    evaluation = _record(folder / EVALUATION, "evaluate MODEL --direction RUN")
    _check_names(folder / EVALUATION, evaluation)
    place = edited or folder / MODEL
    edit = _record(place / RECORD, "orthogonalize")
    if edited is not None and edit is None:
        raise InputError(f"{place / RECORD} does not exist: --edited takes an edited checkpoint")
    if not any((extracted, selection, inspected, traced, evaluation, edit)):
        raise InputError(
            f"{folder} holds no stage's record: run "
            f"`{command('extract', 'MODEL', '-o', folder)}` first"
        )
    found = (extracted, selection, inspected, traced, evaluation, edit)
    fragility = _record(folder / FRAGILITY, "fragility RUN")
    return Run(folder, *found, place if edit else None, fragility, find_stale(folder, edited))


def _check_names(path: Path, evaluation: Document | None) -> None:
    """Refuse interventions whose names, which are parts of file names, are paths."""
    named = (evaluation or {}).get("interventions")
    for name in named if isinstance(named, dict) else ():
        if not is_plain_name(name):
            raise InputError(
                f"{path} names an intervention {name!r}, which is no plain name: do not trust this "
                "folder, or run evaluate again"
            )


def _record(path: Path, made_by: str) -> Document | None:
    return read_record(path, made_by) if path.is_file() else None


def kinds_of(evaluation: Document) -> tuple[str, ...]:
    """The kinds of prompts that an evaluation asked, borderline ones if it was told to."""
    results = evaluation["interventions"].values()
    asked = all("borderline" in result for result in results)
    return ("harmful", "harmless", "borderline") if asked else ("harmful", "harmless")


def read_completions(run: Run) -> Completions | None:
    """The completions that the evaluation's record names; None if there are none.

    Raises:
        InputError: a file of them cannot be read.
    """
    if run.evaluation is None:
        return None
    named = run.evaluation.get("outputs", {})
    columns = tuple(run.evaluation["interventions"])
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for kind in kinds_of(run.evaluation):
        for at, name in enumerate(columns):
            path = run.folder / COMPLETIONS / f"{name}-{kind}.jsonl"
            if path.name not in named or not path.is_file():
                continue
            stay_inside(path, run.folder)
            for line in _lines(path):
                row = rows.setdefault(
                    (kind, line["prompt"]),
                    {
                        "prompt": line["prompt"],
                        "category": line.get("category"),
                        "kind": kind,
                        "answers": [None] * len(columns),
                    },
                )
                row["answers"][at] = {
                    "response": line["response"],
                    "refused": None if line["refused"] is None else bool(line["refused"]),
                    "safe": line.get("safe"),
                    "told": told_in(line),
                    "broken": line.get("broken"),
                    "refused_at": line.get("refused_at"),
                    "second_safe": _hit(line.get("second_judge"), "safe"),
                    "labelled": _hit(line.get("classifier")),
                }
    return Completions(columns, tuple(rows.values())) if rows else None


def _hit(labelled: Any, key: str = "hit") -> bool | None:
    """Whether a classifier gave its label, or a second judge says ``safe``; None without one."""
    hit = labelled.get(key) if isinstance(labelled, dict) else None
    return hit if isinstance(hit, bool) else None


def stay_inside(path: Path, folder: Path) -> None:
    """Refuse a link that would bring a file from outside a run folder into the page."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{path} is a link out of the run folder: put the file itself there")


def _lines(path: Path) -> list[Document]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        parsed = [parse_json(line) for line in lines if line]
        if all(isinstance(line, dict) and _is_completion(line) for line in parsed):
            return parsed
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}): run evaluate again") from None
    raise InputError(f"{path} holds a line that is no completion: run evaluate again")


def _is_completion(line: Document) -> bool:
    texts = all(isinstance(line.get(key), str) for key in ("prompt", "response"))
    category, safe = line.get("category"), line.get("safe")
    broken, place = line.get("broken"), line.get("refused_at")
    named = all(text is None or isinstance(text, str) for text in (category, broken))
    counted = place is None or type(place) is int
    return (
        texts
        and named
        and counted
        and "refused" in line
        and (safe is None or isinstance(safe, bool))
    )
