#!/usr/bin/env python
"""Regenerates docs/architectures.md: every decoder-only architecture through the command line.

    python scripts/architectures.py [--check] [--wrappers | --lists]

Builds a tiny random model of each type, edits it with ``abliterate orthogonalize``, reloads it and
measures what the residual stream still has along the direction. Takes a minute or two. ``--check``
prints the page and leaves the file alone. ``--wrappers`` measures the vision-language wrappers
alone, ``--lists`` makes the lists below the tables anew, for which no model is built; both leave
the rest of the page as it is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/support"))

from architectures.page import edited_row, excluded_lines, is_exact, refused_row, row  # noqa: E402
from architectures.roundtrip import Outcome, round_trip  # noqa: E402
from architectures.zoo import (  # noqa: E402
    VISION_LANGUAGE,
    decoder_only_types,
    shallow_model,
    shallow_vision_language_model,
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

{wrappers}
{lists}"""

WRAPPERS = """\
## Vision-language wrappers

The text decoder in the checkpoint of these types (`AutoModelForImageTextToText`), on text, by the
same test. What the vision tower puts into the stream at image tokens is left as it is.

| type | writers | tensors on disk | direction | leak before | leak after |
|---|---:|---:|---|---:|---:|
{rows}
"""

LISTS = """\
## Not in the table

Types under `AutoModelForCausalLM` that are no decoder-only text models, or that are another type
under another name:

{excluded}
"""

_WRAPPERS, _LISTS = "## Vision-language wrappers", "## Not in the table"


def outcome_of(model_type: str, make: Callable[[str], PreTrainedModel]) -> Outcome | str:
    """What became of a type; or why nothing could be found out about it."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return round_trip(lambda: make(model_type), Path(folder))
        except Exception as error:  # a type of a newer release may fail anywhere
            return f"untested: {type(error).__name__}: {' '.join(str(error).split())[:120]}"


def lists() -> str:
    """What is known of types outside the tables."""
    return LISTS.format(excluded=excluded_lines())


def wrappers() -> str:
    """The vision-language wrappers, measured."""
    rows = []
    for name in tqdm(VISION_LANGUAGE):
        outcome = outcome_of(name, shallow_vision_language_model)
        untested = isinstance(outcome, str)
        rows.append(f"| {name} | | | {outcome} | | |" if untested else row(name, outcome))
    return WRAPPERS.format(rows="\n".join(rows))


def with_lists(page: str) -> str:
    """The page with its lists anew."""
    return page.partition(_LISTS)[0] + lists()


def with_wrappers(page: str) -> str:
    """The page with the table of wrappers anew."""
    before, _, rest = page.partition(_WRAPPERS)
    return f"{before}{wrappers()}\n{_LISTS}{rest.partition(_LISTS)[2]}"


def render(outcomes: dict[str, Outcome | str]) -> str:
    rows, refusals, gains, exact = [], [], 0, 0
    for name, outcome in sorted(outcomes.items()):
        if isinstance(outcome, str):
            rows.append(f"| {name} | | | {outcome} | | |")
        elif outcome.edited is None:
            refusals.append(refused_row(name, outcome))
        else:
            exact += is_exact(outcome)
            gains += is_exact(outcome) and outcome.gains
            rows.append(edited_row(name, outcome))
    return HEADER.format(
        version=transformers.__version__,
        exact=exact,
        total=len(outcomes),
        gains=gains,
        refused=len(refusals),
        rows="\n".join(rows),
        refusals="\n".join(refusals),
        wrappers=wrappers(),
        lists=lists(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="print, do not write")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--wrappers", action="store_true", help="the vision-language wrappers alone")
    part.add_argument("--lists", action="store_true", help="the lists alone; no model is built")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    if arguments.lists:
        text = with_lists(page)
    elif arguments.wrappers:
        text = with_wrappers(page)
    else:
        text = render(
            {name: outcome_of(name, shallow_model) for name in tqdm(decoder_only_types())}
        )
    if arguments.check:
        print(text)
    else:
        (ROOT / "docs" / "architectures.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
