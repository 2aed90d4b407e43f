#!/usr/bin/env python
"""Regenerates docs/architectures.md: every decoder-only architecture through the command line.

    python scripts/architectures.py [--check] [--lists]

Builds a tiny random model of each type, edits it with ``abliterate orthogonalize``, reloads it and
measures what the residual stream still has along the direction. Takes a minute or two. ``--check``
prints the table and leaves the file alone. ``--lists`` makes the lists below the tables anew, for
which no model is built, and leaves the tables as they are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/support"))

from architectures.roundtrip import Outcome, round_trip  # noqa: E402
from architectures.zoo import (  # noqa: E402
    EXCLUDED,
    VISION_LANGUAGE,
    decoder_only_types,
    tiny_model,
)

HEADER = """\
# Architectures

Every decoder-only text model type that `AutoModelForCausalLM` of transformers {version} knows, as a
tiny random model (all parameters random, norm gains and biases too) taken through the command line:
`orthogonalize`, reload, measure. Made by `scripts/architectures.py`; the test suite
(`tests/writers/test_architectures.py`) asserts the same.

**{exact} of {total} types are exact**: the *leak*, the largest share `|h . r| / ||h||` of the
residual stream along the direction over every block boundary and token, falls from the first figure
to the second, which is float32 rounding; `abliterate verify --source` passes. *gain* marks the
{gains} whose writers are (also) orthogonalised against a direction of their own, because a norm's
gain or a convolution stands between them and the stream ([how](writers.md)).

| type | writers | tensors on disk | direction | leak before | leak after |
|---|---:|---:|---|---:|---:|
{rows}

## Refused

No constant edit of the weights is exact for these {refused} types; the error says why and what
would remain. `--allow-leak` is the only way past it. Under `ablate` (hooks at inference) they are
exact too: the last column is the leak measured under it.

| type | reason | leak that would remain | leak under `ablate` |
|---|---|---:|---:|
{refusals}

{lists}"""

LISTS = """\
## Vision-language wrappers

The text decoder in the checkpoint of these types (through `AutoModelForImageTextToText`) is exact
on text, by the same test. What the vision tower puts into the stream at image tokens is left as
it is:

{wrappers}

## Not in the table

Types under `AutoModelForCausalLM` that are no decoder-only text models, or that are another type
under another name:

{excluded}
"""


def outcome_of(model_type: str) -> Outcome | str:
    """What became of a type; or why nothing could be found out about it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return round_trip(lambda: tiny_model(model_type), Path(folder))
        except Exception as error:  # a type of a newer release may fail anywhere
            return f"untested: {type(error).__name__}: {' '.join(str(error).split())[:120]}"


def lists() -> str:
    """What is known of types outside the tables."""
    reasons: dict[str, list[str]] = {}
    for name, reason in EXCLUDED.items():
        reasons.setdefault(reason, []).append(name)
    return LISTS.format(
        wrappers="\n".join(f"- {name}" for name in VISION_LANGUAGE),
        excluded="\n".join(f"- {reason}: {', '.join(names)}" for reason, names in reasons.items()),
    )


def with_lists(text: str) -> str:
    """The page with its lists anew."""
    for heading in ("## Vision-language wrappers", "## Not in the table"):
        text = text.partition(heading)[0]
    return text + lists()


def render(outcomes: dict[str, Outcome | str]) -> str:
    rows, refusals, gains, exact = [], [], 0, 0
    for name, outcome in sorted(outcomes.items()):
        if isinstance(outcome, str):
            rows.append(f"| {name} | | | {outcome} | | |")
        elif outcome.edited is None:
            reason = outcome.refusal.partition("cannot be made exact: ")[2].partition("; ")[0]
            leak = outcome.refusal.rpartition("a leak of ")[2].partition(" ")[0]
            refusals.append(f"| {name} | {reason} | {leak} | {outcome.hooked:.1e} |")
        else:
            good = outcome.edited <= 1e-5 and outcome.verified
            exact += good
            gains += good and outcome.gains
            kind = ("gain" if outcome.gains else "r") if good else "NOT EXACT"
            rows.append(
                f"| {name} | {outcome.writers} | {outcome.tensors} | {kind} | "
                f"{outcome.before:.2f} | {outcome.edited:.1e} |"
            )
    return HEADER.format(
        version=transformers.__version__,
        exact=exact,
        total=len(outcomes),
        gains=gains,
        refused=len(refusals),
        rows="\n".join(rows),
        refusals="\n".join(refusals),
        lists=lists(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="print, do not write")
    parser.add_argument("--lists", action="store_true", help="the lists alone; no model is built")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.lists:
        text = with_lists((ROOT / "docs" / "architectures.md").read_text(encoding="utf-8"))
    else:
        text = render({name: outcome_of(name) for name in tqdm(decoder_only_types())})
    if arguments.check:
        print(text)
    else:
        (ROOT / "docs" / "architectures.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
