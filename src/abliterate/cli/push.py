"""``--push-to-hub`` of orthogonalize and run: an edited checkpoint, verified, then published."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from abliterate.console import log, print_error, print_line
from abliterate.errors import UsageError

if TYPE_CHECKING:
    from abliterate.run_folder import Session

PushToHub = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="Publish the edited checkpoint there once it is verified; private unless --public.",
        show_default=False,
    ),
]
Public = Annotated[
    bool, typer.Option("--public", help="Of --push-to-hub: for everyone to see, not private.")
]


def check_push(repo: str | None, public: bool, session: Session) -> None:
    """Refuse what could not be pushed in the end, before anything is made.

    Raises:
        FetchError: the hub does not answer.
        UsageError: options contradict each other, or the repository cannot be written.
    """
    if repo is None:
        if public:
            raise UsageError("--public goes with --push-to-hub ORG/NAME: add it, or leave it out")
        return
    settings = session.settings.orthogonalize
    for name in ("as_lora", "low_disk"):
        if getattr(settings, name):
            raise UsageError(
                f"--push-to-hub publishes what verify has compared with its source, which "
                f"--{name.replace('_', '-')} leaves out: push the folder with `hf upload`"
            )
    if not session.placement.ranks.is_unsplit:
        raise UsageError("--push-to-hub is for one process: push with `hf upload` afterwards")
    from abliterate.editing.file_names import RECORD
    from abliterate.hub.publishing import check_destination

    check_destination(repo, public, RECORD)


def push(repo: str, public: bool, session: Session, direction: Any, out: Path, show: bool) -> int:
    """Verify ``out`` against its source and publish it.

    Args:
        repo: ``org/name``.
        public: whether everyone may see it.
        session: of the edit.
        direction: that was removed.
        out: the edited checkpoint.
        show: print the address.

    Returns:
        The exit code: 6 where verify refuses, and then nothing was sent.

    Raises:
        FetchError: the hub does not take it.
        UsageError: the repository cannot be written.
    """
    from abliterate.checkpoints.checkpoint import Checkpoint
    from abliterate.hub.publishing import push_folder
    from abliterate.verification import verify

    trust = session.settings.model.trust_remote_code
    verdict = verify(Checkpoint(str(out), out), direction, session.checkpoint, trust)
    if not verdict.passed:
        print_error(
            f"{out} does not pass verify against its source, so nothing was pushed: `abliterate "
            "verify` says why"
        )
        return 6
    address = push_folder(out, repo, public, "Orthogonalized with abliterate")
    log.info("pushed to %s", address)
    if show:
        print_line(f"pushed to {address}{'' if public else ' (private)'}")
    return 0
