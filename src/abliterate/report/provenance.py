"""Where the report's numbers come from: model, hashes, seeds, versions, prompts."""

from __future__ import annotations

from abliterate.report.collect import Document, Run
from abliterate.report.facts import STALE, apart, number


def computed_line(record: Document | None) -> str:
    """How a stage computed: dtype, device, attention, batches, threads; empty for an older one."""
    held = (record or {}).get("computed_with") or {}
    if "dtype" not in held:
        return ""
    batches = (record or {}).get("batches") or {}
    most = "".join(f", up to {count} {name.replace('_', ' ')}" for name, count in batches.items())
    words = [str(held[name]) for name in ("dtype", "device", "attention") if held.get(name)]
    small = held.get("quantization") or {}
    words += [f"{small['method']} {small.get('bits')} bit"] if small.get("method") else []
    asked = f"--batch-size {held.get('batch_size')}{most}"
    return f"{', '.join(words)}, {asked}, {held.get('threads')} threads"


def _other_dtype(record: Document | None, extract: Document | None) -> str:
    """A note where a stage ran in another dtype than extract did."""
    now = ((record or {}).get("computed_with") or {}).get("dtype")
    before = (extract or {}).get("dtype", now)
    return "" if now == before else f" (extract ran in {before})"


def provenance(run: Run) -> list[tuple[str, str]]:
    """Where the numbers come from: model, hashes, seeds, versions, prompts."""
    rows: list[tuple[str, str]] = [("model", run.model)]
    first = run.extract or run.selection or run.evaluation
    if first:
        identity = first["model"]
        rows += [("revision", str(identity["revision"]))] if identity.get("revision") else []
        rows += [
            (f"file {name}", str(digest)) for name, digest in identity.get("files", {}).items()
        ]
    parts = (run.current(part) for part in ("evaluation", "inspect", "edit"))
    direction = next((part for part in parts if part), {}).get("direction")
    if direction:
        rows.append(("direction", str(direction["sha256"])))
    if run.extract:
        rows += [
            ("dtype, device", f"{run.extract['dtype']}, {run.extract['device']}"),
            ("refusal tokens", " ".join(repr(t["token"]) for t in run.extract["refusal_tokens"])),
        ]
        rows += [
            (f"{kind} training prompts", f"{count['used']} used of {count['given']}{apart(count)}")
            for kind, count in run.extract["counts"].items()
        ]
    for name, record in (("extract", run.extract), ("evaluate", run.evaluation)):
        if record and (done := record.get("thinking")):
            rows.append((f"thinking, {name}", f"{done['mode']}: {done['why']}"))
    stages = (
        ("extract", run.extract),
        ("select", run.selection),
        ("evaluate", run.evaluation),
        ("inspect", run.inspect),
        ("trace", run.trace),
    )
    for name, record in stages:
        part = {"select": "selection", "evaluate": "evaluation"}.get(name, name)
        if record:
            spent = f"{number(record['seconds'], '.1f')} s"
            whole = part in run.stale and not run.stale[part].rows
            mark = f" ({STALE})" if whole else ""
            rows.append((name + mark, f"seed {record['seed']}, {spent}, inputs {record['inputs']}"))
    rows += [
        (f"computed, {name}", line + _other_dtype(record, run.extract))
        for name, record in stages
        if (line := computed_line(record))
    ]
    if first:
        made = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
        rows.append(("versions", made))
    return rows
