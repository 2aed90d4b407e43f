"""audit --prompts: what a model does, beside what its files show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abliterate.console import print_line, print_table
from abliterate.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from abliterate.auditing.activation_evidence import Gathered
    from abliterate.direction import Direction
    from abliterate.models.loading import Checkpoint
    from abliterate.prompts.sources import Prompt
    from abliterate.settings.model_sections import ChatSettings

Harmful = Annotated[
    str | None,
    typer.Option(
        "--harmful",
        help="With --prompts: set name, file or hub dataset. Default: the bundled test prompts.",
        show_default=False,
    ),
]
Harmless = Annotated[
    str | None,
    typer.Option(
        "--harmless",
        help="With --prompts: set name, file or hub dataset. Default: the bundled test prompts.",
        show_default=False,
    ),
]
Count = Annotated[
    int | None,
    typer.Option(
        "--n-prompts", help="With --prompts: how many per kind. Default: 32.", show_default=False
    ),
]
Tokens = Annotated[
    list[str] | None,
    typer.Option(
        "--refusal-token",
        help="With --prompts: token string, id or preset; repeatable. Default: those that the "
        "base shows, or the checkpoint.",
        show_default=False,
    ),
]
_USUAL = 32


@dataclass(frozen=True)
class Asked:
    """The prompts to run, by kind, where they are from, and the refusal tokens that are named."""

    prompts: dict[str, list[Prompt]]
    sources: dict[str, str]
    names: tuple[str, ...]

    def gather(
        self, target: Checkpoint, base: Checkpoint | None, device: str, chat: ChatSettings
    ) -> Gathered:
        """Run the models; see :func:`abliterate.auditing.activation_evidence.gather`."""
        from abliterate.auditing.activation_evidence import gather
        from abliterate.models.loading import pick_device
        from abliterate.prompts.chat_template import ChatFormat

        texts = {kind: [prompt.text for prompt in some] for kind, some in self.prompts.items()}
        return gather(
            target, base, texts, self.names, str(pick_device(device)), ChatFormat.of(chat)
        )

    def document(
        self, seen: Gathered, given: Direction | None, found: Tensor | None
    ) -> dict[str, Any]:
        """What was seen, along the given direction or the one that the weights show."""
        return {
            "prompts": {kind: len(some) for kind, some in self.prompts.items()},
            "sources": self.sources,
            **seen.document(None if given is None else given.vector, found),
        }


def chosen(
    prompts: bool,
    harmful: str | None,
    harmless: str | None,
    count: int | None,
    names: Sequence[str],
) -> Asked | None:
    """The prompts that the options ask for, drawn; None without ``--prompts``.

    Raises:
        InputError: a source cannot be used, or has too few prompts.
        UsageError: an option goes with ``--prompts`` and that is not given.
    """
    if not prompts:
        options = (
            ("--harmful", harmful),
            ("--harmless", harmless),
            ("--n-prompts", count),
            ("--refusal-token", names or None),
        )
        for option, value in options:
            if value is not None:
                raise UsageError(f"{option} goes with --prompts: give both, or neither")
        return None
    from abliterate.prompts.sampling import load_prompts

    sources = {"harmful": harmful or "harmful", "harmless": harmless or "harmless"}
    drawn = {
        kind: load_prompts(source, "test", _USUAL if count is None else count, option="--n-prompts")
        for kind, source in sources.items()
    }
    return Asked(drawn, sources, tuple(names))


def show(found: dict[str, Any]) -> None:
    """Gap and share of the checkpoint and its base, and what they are held against."""
    columns = ["checkpoint"] + ["base"] * (found["base"] is not None)

    def cells(value: Any) -> list[str]:
        return [value(found[column]) for column in columns]

    def score(key: str) -> Any:
        return lambda one: "-" if one["refusal_scores"] is None else (
            f"{one['refusal_scores'][key]:z.2f}"
        )  # fmt: skip

    def share(one: dict[str, Any]) -> str:
        return "-" if one["energy"] is None else f"{one['energy']['share']:z.2g}"

    def control(one: dict[str, Any]) -> str:
        if one["energy"] is None:
            return "-"
        held = one["energy"]["random_directions"]
        return f"{held['least']:z.2g} to {held['largest']:z.2g}"

    rows = [
        ["refusal score, harmful", *cells(score("harmful"))],
        ["refusal score, harmless", *cells(score("harmless"))],
        ["gap", *cells(score("gap"))],
        ["share of the difference along the direction", *cells(share)],
        ["the same along random directions", *cells(control)],
    ]
    heads = ["what it does (no part of the verdict)", *columns]
    print_table("prompts", heads, rows, left=1)
    for note in found["notes"]:
        print_line(f"note: {note}")
