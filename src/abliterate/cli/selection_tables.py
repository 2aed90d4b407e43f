"""What select says beside its scores: how sure the choice is, what is left where none passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from abliterate.console import print_line, print_table
from abliterate.errors import SelectionError
from abliterate.selection.candidate_filters import METRICS
from abliterate.selection.certainty import often_first, sentences

_NAMES = {"kl": "KL", "induce": "induce", "layer": "layer"}


def show_certainty(record: Mapping[str, Any], shown: int = 8) -> None:
    """How the choice falls on resamples of the prompts; nothing if the record is an older one."""
    held = record.get("bootstrap")
    if not held:
        return
    rows = [
        [
            str(c["position"]),
            str(c["layer"]),
            f"{c['wins']:z.1%}",
            f"{c['passes']:z.1%}",
            *(f"{c[metric][0]:z.3g} to {c[metric][1]:z.3g}" for metric in METRICS),
        ]
        for c in often_first(held)[:shown]
    ]
    print_table(
        f"{held['resamples']} resamples of the validation prompts",
        [
            "position",
            "layer",
            "wins",
            "passes",
            "bypass, 95% (log-odds)",
            "induce, 95% (log-odds)",
            "KL, 95% (nats)",
        ],
        rows,
        left=0,
    )
    for sentence in sentences(record):
        print_line(sentence)


@contextmanager
def showing_front() -> Iterator[None]:
    """Where no candidate passes, show on stderr those that no other beats, before the error."""
    try:
        yield
    except SelectionError as error:
        if error.front:
            _front(error.front)
        raise


def _front(front: Sequence[Mapping[str, Any]], shown: int = 16) -> None:
    rows = [
        [
            str(c["position"]),
            str(c["layer"]),
            f"{c['bypass_score']:z.3f}",
            f"{c['induce_score']:z.3f}",
            f"{c['kl_divergence']:z.4f}",
            ", ".join(f"{_NAMES[miss['filter']]} by {miss['by']:z.3g}" for miss in c["fails"]),
            " ".join(miss["option"] for miss in c["fails"]),
        ]
        for c in front[:shown]
    ]
    more = f", the first {shown}" if len(front) > shown else ""
    print_table(
        "No candidate passes. No other beats these in bypass, induce and KL at once"
        f" ({len(front)}{more})",
        [
            "position",
            "layer",
            "bypass (log-odds)",
            "induce (log-odds)",
            "KL (nats)",
            "fails",
            "admitted by",
        ],
        rows,
        left=0,
        beside_results=True,
    )
