"""Several runs side by side: what each chose and measured, how alike their directions are, and in
which settings they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from abliterate.console import command
from abliterate.direction import FILE_NAME
from abliterate.direction_loading import load_direction
from abliterate.errors import InputError, UsageError
from abliterate.report.collect import Document, Run, read_run, stay_inside
from abliterate.report.facts import DASH, STALE, answers, number, percent, tokens_of
from abliterate.report.provenance import computed_line
from abliterate.report.rendering import part
from abliterate.report.style import finite
from abliterate.run_staleness import hash_prompts
from abliterate.settings import Settings, flags_of, granted, sections_of
from abliterate.storage.artifacts import hash_json

# Of each claim: whose prompts, under which intervention.
CLAIMS = (("harmful", "ablate"), ("harmless", "add"))
_STAGES = (
    ("extract", "extract", ("model", "chat", "extract")),
    ("select", "selection", ("select",)),
    ("evaluate", "evaluation", ("evaluate",)),
)
_DIGITS = 16  # of a hash, in a table


@dataclass(frozen=True)
class ComparedRun:
    """A run under the name that it has in a comparison.

    Attributes:
        name: the end of its folder's path that no other run of the comparison has.
        run: its records, with a selection among them.
    """

    name: str
    run: Run

    @property
    def selection(self) -> Document:
        assert self.run.selection is not None
        return self.run.selection


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """Read the runs to compare, in the order in which they are named.

    Raises:
        InputError: one is no run folder, is damaged, or has selected nothing yet.
        UsageError: one is named twice.
    """
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        if run.selection is None:
            again = command("select", run.folder)
            raise InputError(
                f"{run.folder} has no selection.json, and runs are compared by what they selected: "
                f"run `{again}` first, or leave it out"
            )
    return [ComparedRun(*each) for each in zip(_names(folders), runs, strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """Of each folder as much of its path's end as tells it from the others."""
    whole = [folder.resolve() for folder in folders]
    for at, path in enumerate(whole):
        if path in whole[:at]:
            raise UsageError(f"{folders[at]} is named twice: a run is not compared with itself")
    found = []
    for path in whole:
        ends = (
            path.parts[-length:]
            for length in range(1, len(path.parts) + 1)
            if sum(other.parts[-length:] == path.parts[-length:] for other in whole) == 1
        )
        found.append("/".join(next(ends, path.parts)))
    return found


def compare(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """The comparison as plain values, which ``--json`` gives and the page shows.

    Stale parts are None here, and named.

    Args:
        runs: at least two.

    Returns:
        ``runs``: of each its name, folder, model, seed, d_model, direction, what ``select`` and
        ``evaluate`` measured (scores in log-odds, KL in nats, changes in percentage points) and
        what is stale; ``cosines``: of the directions of each two runs, None where one has none or
        d_model differs; ``differences``: the settings that are not the same in all runs.

    Raises:
        InputError: a record or a direction is not what it should be.
    """
    vectors = [_direction(each) for each in runs]
    return {
        "runs": [
            part(f"a record of {each.run.folder}", partial(_summary, each, vector))
            for each, vector in zip(runs, vectors, strict=True)
        ],
        "cosines": [[_cosine(one, other) for other in vectors] for one in vectors],
        "differences": _differences(runs),
    }


def _direction(each: ComparedRun) -> Any | None:
    """The direction that the run holds; None if it has chosen none, or of something else."""
    selection = each.run.current("selection")
    if selection is None or selection.get("winner") is None:
        return None
    stay_inside(each.run.folder / FILE_NAME, each.run.folder)
    return load_direction(each.run.folder, winner=True)


def _cosine(one: Any | None, other: Any | None) -> float | None:
    if one is None or other is None or len(one.vector) != len(other.vector):
        return None
    return 1.0 if one is other else float(one.cosine(other))


def _summary(each: ComparedRun, direction: Any | None) -> dict[str, Any]:
    run, selection = each.run, each.selection
    model = (run.extract or selection)["model"]
    width = None if direction is None else len(direction.vector)
    return {
        "name": each.name,
        "folder": str(run.folder),
        "model": run.model,
        "revision": model.get("revision"),
        "model_files": hash_json(model["files"]) if model.get("files") else None,
        "seed": selection["seed"],
        "n_layers": selection["n_layers"],
        "d_model": (run.extract or {}).get("d_model", width),
        "direction": _place(run, selection, direction),
        "select": _selected(selection) if run.current("selection") else None,
        "evaluate": _evaluated(run),
        "stale": [
            {"part": name, "why": found.why, "rows": list(found.rows)}
            for name, found in run.stale.items()
        ],
    }


def _place(run: Run, selection: Document, direction: Any | None) -> dict[str, Any] | None:
    if direction is None:
        return None
    winner = selection["winner"]
    return {
        "layer": int(winner["layer"]),
        "position": int(winner["position"]),
        "token": tokens_of(run).get(winner["position"]),
        "norm": float(direction.vector.norm()),
        "own_in_layers": sum(map(bool, selection.get("per_layer") or ())),
    }


def _selected(selection: Document) -> dict[str, Any] | None:
    """The winner's scores on the validation prompts beside the unmodified model's."""
    winner, base = selection["winner"], selection["baselines"]
    if winner is None:
        return None
    chosen = next(
        c for c in selection["candidates"] if all(c[key] == winner[key] for key in winner)
    )
    return {
        "n": {kind: count["used"] for kind, count in selection["counts"].items()},
        "bypass": {"before": base["harmful_refusal_score"], "after": chosen["bypass_score"]},
        "induce": {"before": base["harmless_refusal_score"], "after": chosen["induce_score"]},
        "kl": chosen["kl_divergence"],
    }


def _evaluated(run: Run) -> dict[str, Any] | None:
    """Refusals on the test prompts before and after, and the KL divergence of the ablation."""
    evaluation = run.current("evaluation")
    if evaluation is None:
        return None
    results = {n: r for n, r in evaluation["interventions"].items() if n not in run.stale_rows}
    found: dict[str, Any] = {}
    for kind, name in CLAIMS:
        change = ((evaluation.get("deltas") or {}).get(name) or {}).get(kind) or {}
        now, before = (_refusals((results.get(row) or {}).get(kind)) for row in (name, "baseline"))
        span = change.get("refusal_score_ci")
        both = now is not None and before is not None
        found[kind] = {
            "intervention": name,
            "before": before,
            "after": now,
            "change_pp": 100 * (now["rate"] - before["rate"]) if now and before else None,
            "change_ci_pp": [100 * float(end) for end in span] if span and both else None,
        }
    ablated = results.get("ablate") or {}
    found["kl"] = {
        "mean": finite(ablated.get("kl_divergence")),
        "ci": ablated.get("kl_divergence_ci"),
        "n": (evaluation.get("n_prompts") or {}).get("harmless"),
    }
    return found


def _refusals(measured: Document | None) -> dict[str, Any] | None:
    """Refusals of answers, thoughts without an end apart; None where nothing was answered."""
    if measured is None or finite(measured.get("refusal_rate")) is None:
        return None
    return {
        "refused": measured["refused"],
        "n": measured["n"] - (measured.get("no_verdict") or 0),
        "unfinished": measured.get("no_verdict") or 0,
        "rate": float(measured["refusal_rate"]),
        "ci": measured.get("refusal_score_ci"),
        "text": f"{measured['refused']} of {answers(measured)}",
    }


def _differences(runs: Sequence[ComparedRun]) -> list[dict[str, Any]]:
    """The facts that are not the same in all runs; what a run does not have is None.

    A stage's settings are compared among the runs that have it.
    """
    held = [part(f"a record of {each.run.folder}", partial(_settings, each.run)) for each in runs]
    names = dict.fromkeys(name for settings in held for name in settings)
    found = []
    for name in names:
        values = [settings.get(name) for settings in held]
        stage, inside, _ = name.partition(": ")
        compared = [
            value
            for value, settings in zip(values, held, strict=True)
            if not inside or stage in settings
        ]
        if any(value != compared[0] for value in compared):
            found.append({"setting": name, "values": values})
    return found


def _settings(run: Run) -> dict[str, str]:
    """What decides a run's numbers, by a name that says stage and option."""
    identity = (run.extract or run.selection or {}).get("model") or {}
    found = {"model": run.model}
    if revision := identity.get("revision"):
        found["revision"] = str(revision)
    if files := identity.get("files"):
        found["model files, hash"] = hash_json(files).removeprefix("sha256:")[:_DIGITS]
    for stage, name, tables in _STAGES:
        record = getattr(run, name)
        if record is None:
            continue
        mark = f" ({STALE})" if name in run.stale and not run.stale[name].rows else ""
        found[f"{stage}{mark}"] = "has run"
        found |= {
            f"{stage}{mark}: {key}": value for key, value in _told(record, tables, stage).items()
        }
    return found


def _told(record: Document, tables: Sequence[str], stage: str) -> dict[str, str]:
    told = dict(_options(record, tables))
    told["refusal tokens"] = " ".join(repr(t["token"]) for t in record.get("refusal_tokens") or ())
    prompts = record.get("prompts")
    for kind, keys in (prompts if isinstance(prompts, Mapping) else {}).items():
        digest = hash_prompts({kind: keys})[kind].removeprefix("sha256:")
        told[f"{kind} prompts used"] = f"{len(keys)}, hash {digest[:_DIGITS]}"
    for kind, count in (record.get("n_prompts") or {}).items():
        told[f"{kind} test prompts"] = str(count)
    if line := computed_line(record):
        told["computed"] = line
    told["versions"] = ", ".join(f"{name} {one}" for name, one in record["versions"].items())
    return told


def _options(record: Document, tables: Sequence[str]) -> list[tuple[str, str]]:
    """The recorded settings by their options; of what the reader must grant not the value."""
    sections, found = sections_of(Settings), []
    for table in tables:
        held = (record.get("settings") or {}).get(table) or {}
        for key in sections[table].model_fields:
            if key not in held:
                continue
            value = held[key]
            hidden = granted(sections[table], key) is not None
            text = ("given" if value else "not given") if hidden else _shown(value)
            found.append((flags_of(sections[table], key).partition("/")[0], text))
    return found


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or DASH
    return DASH if value in (None, {}) else str(value)


_ROWS = (
    "model", "direction", "its position", "harmful prompts refused, unmodified",
    "harmful prompts refused, ablated", "change (pp)", "harmless prompts refused, unmodified",
    "harmless prompts refused, added", "change (pp)", "KL, ablated, harmless prompts (nats)",
    "bypass, validation (log-odds)", "induce, validation (log-odds)", "KL, validation (nats)",
    "seed",
)  # fmt: skip


def summary_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """The table at the top: a row for each number, a column for each run."""
    columns = [
        [str(run["model"]), *_where(run), *_outcomes(run), *_scores(run), str(run["seed"])]
        for run in document["runs"]
    ]
    return [list(row) for row in zip(_ROWS, *columns, strict=True)]


def label(at: int) -> str:
    """What a run is called in tables and figures, where its name has no room."""
    return f"run {at + 1}"


def is_stale(run: Mapping[str, Any], name: str) -> bool:
    """Whether a part of a run is stale as a whole."""
    return any(found["part"] == name and not found["rows"] for found in run["stale"])


def _where(run: Mapping[str, Any]) -> list[str]:
    held = run["direction"]
    if held is None:
        return [STALE if is_stale(run, "selection") else "none passes the filters", DASH]
    own = held["own_in_layers"]
    more = f"; ablated: one of its own in {own} layers" if own else ""
    token = "" if held["token"] is None else f" {held['token']!r}"
    return [f"layer {held['layer']} of {run['n_layers']}{more}", f"{held['position']}{token}"]


def _outcomes(run: Mapping[str, Any]) -> list[str]:
    held = run["evaluate"]
    if held is None:
        return [STALE if is_stale(run, "evaluation") else DASH] * 7
    cells = []
    for kind, _ in CLAIMS:
        found = held[kind]
        cells += [_refused(found["before"]), _refused(found["after"])]
        cells.append(_interval(found["change_pp"], found["change_ci_pp"], "+.1f"))
    return [*cells, _interval(held["kl"]["mean"], held["kl"]["ci"], ".4f")]


def _refused(found: Mapping[str, Any] | None) -> str:
    return DASH if found is None else f"{found['text']}: {percent(found['rate'], found['ci'])}"


def _interval(value: float | None, span: Sequence[float] | None, form: str) -> str:
    text = number(value, form)
    return text if not span else f"{text} [{number(span[0], form)}, {number(span[1], form)}]"


def _scores(run: Mapping[str, Any]) -> list[str]:
    held = run["select"]
    if held is None:
        return [STALE if is_stale(run, "selection") else DASH] * 3
    moved = [
        f"{number(held[key]['before'], '+.2f')} → {number(held[key]['after'], '+.2f')}"
        for key in ("bypass", "induce")
    ]
    return [*moved, number(held["kl"])]
