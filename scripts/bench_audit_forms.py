#!/usr/bin/env python3
"""Every form of edit, with its base and without: what does `abliterate audit` say of it?

Small structured models of several architectures are written, edited in every way of
scripts/audit_forms.py and audited by the function that the command line calls; then changed in ways
that are no edits. Prints the tables of docs/audit.md in Markdown: verdicts, the share of the
matrices changed that are named, the largest error of a scale, the smallest cosine of a direction.
Biases are counted apart, in --out; so are those whose scale is told.

    python scripts/bench_audit_forms.py                       # all: some minutes of one core
    python scripts/bench_audit_forms.py --architectures llama --forms three "by layer"
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from audit_edits import (
    ARCHITECTURES,
    DEPTH,
    Matrix,
    decay_with_common_output,
    make_checkpoint,
    rescale_channels,
    truncate,
)
from audit_forms import BENIGN, FORMS, Form
from torch import Tensor

from abliterate.auditing.edit_form import EditForm
from abliterate.auditing.report import Audit, audit
from abliterate.models.loading import find_checkpoint

Row = dict[str, Any]
#: What is no edit either, and needs to know the writers: makes ``out`` and gives its base.
Made = Callable[[Path, Path, Sequence[Matrix]], Path]


def judge(folder: Path, base: Path | None) -> Audit:
    return audit(find_checkpoint(str(folder)), None if base is None else find_checkpoint(str(base)))


def judge_edit(kind: str, name: str, base: Path, writers: Sequence[Matrix], out: Path) -> Row:
    """Edit a checkpoint, audit it with its base and without, and hold that against the truth."""
    form = FORMS[name]
    changed = {one.name: one for one in form.apply(base, out, writers)}
    found, blind = judge(out, base), judge(out, None)
    assert found.comparison is not None
    named = {t.name: t for t in found.comparison.projected}
    held = {n for n in named.keys() & changed.keys() if not n.endswith(".bias")}
    biases = {n for n in named.keys() & changed.keys() if n.endswith(".bias")}

    def error(names: set[str]) -> float | None:
        pairs = [(named[n].scale, form.scale_at(changed[n])) for n in names]
        return max((abs(one - other) for one, other in pairs if one is not None), default=None)

    shown = found.comparison.form
    cosines = [] if shown is None else least_cosines(shown, form, list(changed.values()))
    return {
        "architecture": kind, "change": name, "with": found.verdict, "without": blind.verdict,
        "named": len(held), "of": sum(not n.endswith(".bias") for n in changed),
        "wrongly": sorted(named.keys() - changed.keys()), "error": error(held),
        "biases": len(biases), "biases_of": sum(n.endswith(".bias") for n in changed),
        "biases_error": error(biases),
        "biases_told": sum(named[n].scale is not None for n in biases),
        "cosine": min(cosines, default=None), "kinds": [] if shown is None else list(shown.kinds),
        "evidence": blind.evidence, "p_value": min(blind.blind.p_value, blind.readers.p_value),
    }  # fmt: skip


def least_cosines(shown: EditForm, form: Form, changed: Sequence[Matrix]) -> list[float]:
    """Of each layer that was edited: the worst cosine of its directions with those found there.

    The first of several is compared with the space of all, as ``directions`` holds one a layer.
    """
    found = []
    for one in changed:
        basis, true = shown.basis_at(one.layer), directions_of(form, one)
        if basis is None:
            found.append(0.0)
        else:
            found.append(float(torch.linalg.svdvals(true.T @ torch.linalg.qr(basis)[0])[-1]))
    return found


def directions_of(form: Form, one: Matrix) -> Tensor:
    directions = form.directions(one)
    assert directions is not None
    return directions.reshape(len(directions), -1)


def common_output(base: Path, out: Path, writers: Sequence[Matrix]) -> Path:
    """All writers share a dominant direction, and are scaled down."""
    copy = out.parent / "plain"
    for path in (copy, out, out.parent / "strong", out.parent / "decayed"):
        shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(base, copy)
    strong = decay_with_common_output(copy, writers, 0.98)
    (out.parent / "decayed").rename(out)
    return strong


def rescaled(base: Path, out: Path, writers: Sequence[Matrix]) -> Path:
    shutil.copytree(base, out)
    rescale_channels(out, writers)
    return base


def halved(base: Path, out: Path, writers: Sequence[Matrix]) -> Path:
    shutil.copytree(base, out)
    truncate(out, writers, 0.5)
    return base


def plain(change: Callable[[Path], None]) -> Made:
    def make(base: Path, out: Path, _: Sequence[Matrix]) -> Path:
        shutil.copytree(base, out)
        change(out)
        return base

    return make


MADE: dict[str, Made] = {
    "none": plain(lambda _: None),
    **{name: plain(change) for name, change in BENIGN.items()},
    "decay, a direction dominates": common_output,
    "channels rescaled": rescaled,
    "half of each writer's rank": halved,
}


def judge_benign(kind: str, name: str, base: Path, writers: Sequence[Matrix], out: Path) -> Row:
    source = MADE[name](base, out, writers)
    found, blind = judge(out, source), judge(out, None)
    assert found.comparison is not None
    return {
        "architecture": kind, "change": name, "with": found.verdict, "without": blind.verdict,
        "named": len(found.comparison.projected),
        "p_value": min(blind.blind.p_value, blind.readers.p_value),
    }  # fmt: skip


def table(rows: Sequence[Row]) -> list[str]:
    """Edits in Markdown, a line for each form over all architectures."""
    lines = ["| edit | with its base | named | scale off by | cosine, least | without a base |"]
    lines.append("|---|---|---|---|---|---|")
    for name, members in grouped(rows).items():
        share = sum(r["named"] for r in members) / sum(r["of"] for r in members)
        errors = [r["error"] for r in members if r["error"] is not None]
        cosines = [r["cosine"] for r in members if r["cosine"] is not None]
        error = f"{max(errors):.3f}" if errors else "-"
        cosine = f"{min(cosines):.4f}" if cosines else "-"
        lines.append(
            f"| {name} | {verdicts(members, 'with')} | {share:.0%} | {error} | {cosine} "
            f"| {verdicts(members, 'without')} |"
        )
    return lines


def benign_table(rows: Sequence[Row]) -> list[str]:
    lines = ["| no edit | with its base | matrices named | without a base |", "|---|---|---|---|"]
    for name, members in grouped(rows).items():
        named = sum(r["named"] for r in members)
        lines.append(
            f"| {name} | {verdicts(members, 'with')} | {named} | {verdicts(members, 'without')} |"
        )
    return lines


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["change"], []).append(row)
    return found


def verdicts(rows: Sequence[Row], key: str) -> str:
    counts = Counter(row[key] for row in rows)
    return ", ".join(f"{counts[v]} {v}" for v in ("edited", "undecided", "clean") if counts[v])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architectures", nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--benign", nargs="*", default=list(MADE), choices=list(MADE))
    parser.add_argument("--out", type=Path, help="all figures as JSON")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begun, edits, benign = time.process_time(), [], []
    with tempfile.TemporaryDirectory() as work:
        for kind in given.architectures:
            base = Path(work) / kind
            writers = make_checkpoint(kind, base)
            for names, one, rows in (
                (given.forms, judge_edit, edits),
                (given.benign, judge_benign, benign),
            ):
                for name in names:
                    out = Path(work) / "out"
                    shutil.rmtree(out, ignore_errors=True)
                    rows.append(one(kind, name, base, writers, out))
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if given.out:
        given.out.write_text(json.dumps({"edits": edits, "benign": benign}, indent=1))
    print(f"{', '.join(given.architectures)}; {DEPTH} blocks\n")
    if edits:
        print("\n".join(table(edits)))
    if benign:
        print("\n" + "\n".join(benign_table(benign)))
    print(f"\n{(time.process_time() - begun) / 60:.1f} minutes of one core's time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
