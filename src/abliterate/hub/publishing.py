"""A folder, put on the hub as a repository of its own.

Nothing is sent before all that can be known beforehand is: a token, the right to write, and that a
repository of that name holds nothing else. What was sent once is not sent again: the client asks
the hub which large files it has.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from abliterate.console import log
from abliterate.errors import FetchError, UsageError
from abliterate.hub.names import split_id
from abliterate.hub.patience import patiently
from abliterate.hub.reasons import explain, status_of

T = TypeVar("T")

#: What the hub puts into a new repository by itself.
_OF_THE_HUB = {".gitattributes"}
_OPTION = "--push-to-hub"


def check_destination(repo: str, public: bool, record: str) -> None:
    """Refuse a repository that could not be written in the end, before anything is made.

    Args:
        repo: ``org/name``.
        public: it may be public.
        record: the file that every folder pushed there holds; with it, it is one of ours.

    Raises:
        FetchError: the hub does not answer.
        UsageError: there is no token, it may not write there, or the repository is another's.
    """
    from huggingface_hub import HfApi, constants, get_token

    named = split_id(repo)
    if named is None or named[1] is not None:
        raise UsageError(f"{_OPTION} {repo}: a repository is written ORG/NAME")
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"{_OPTION} {repo}: HF_HUB_OFFLINE is set: set it to 0")
    if get_token() is None:
        raise UsageError(
            f"{_OPTION} {repo}: there is no token: log in with `hf auth login`, or set HF_TOKEN to "
            "one that may write"
        )
    owner = repo.partition("/")[0]
    account = _asked(lambda: HfApi().whoami(), repo)
    names = {account.get("name"), *(one.get("name") for one in account.get("orgs") or [])}
    if owner not in names:
        raise UsageError(
            f"{_OPTION} {repo}: the account of your token, {account.get('name')}, is neither "
            f"{owner} nor a member of it: name a repository of yours"
        )
    access = (account.get("auth") or {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise UsageError(
            f"{_OPTION} {repo}: your token may only read: make one that may write, at "
            f"{constants.ENDPOINT}/settings/tokens"
        )
    held = _files_there(repo, public)
    if held and record not in held:
        raise _other_content(repo, held)


def push_folder(folder: Path, repo: str, public: bool, message: str) -> str:
    """Put the files of a folder into a repository, in one commit; returns the repository's address.

    Args:
        folder: whose files go there.
        repo: ``org/name``; it is made where there is none.
        public: it is made for everyone to see, else for its owner alone.
        message: of the commit.

    Raises:
        FetchError: the hub does not take it.
        UsageError: the repository holds other files, or is public where it should not be.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    api, own = HfApi(), {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    others = _files_there(repo, public) - own
    if others:
        raise _other_content(repo, others)
    disable_progress_bars()  # their text is file names, which a stranger may have chosen
    address = _asked(lambda: api.create_repo(repo, private=not public, exist_ok=True), repo)
    log.info("%s: sending %d files to %s", folder, len(own), repo)
    _asked(
        lambda: api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message),
        repo,
        f"{folder} is whole: `hf upload {repo} {folder} .` sends what is still missing",
    )
    return str(address)


def _files_there(repo: str, public: bool) -> set[str]:
    """What a repository holds; nothing where there is none.

    Raises:
        UsageError: it is public, and should not be.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    def ask() -> Any:
        with suppress(RepositoryNotFoundError):
            return HfApi().repo_info(repo)
        return None

    info = _asked(ask, repo)
    if info is None:
        return set()
    if info.private is False and not public:
        raise UsageError(
            f"{_OPTION} {repo}: the repository is public already: pass --public, or name another"
        )
    return {file.rfilename for file in info.siblings or []} - _OF_THE_HUB


def _other_content(repo: str, names: Collection[str]) -> UsageError:
    some = textwrap.shorten(", ".join(sorted(names)), 80, placeholder=" ...")
    return UsageError(
        f"{_OPTION} {repo}: the repository holds other files ({some}): name another, or remove "
        "them there"
    )


def _asked(call: Callable[[], T], repo: str, mend: str = "") -> T:
    """What ``call`` gives, asked patiently.

    Raises:
        FetchError: the hub does not give it.
        UsageError: the token may not.
    """
    try:
        return patiently(call, f"model '{repo}'")
    except Exception as error:  # the client's many error types have no narrower common base
        status = (status_of(error) or (0, {}))[0]
        if status == 401:
            raise UsageError(
                f"{_OPTION} {repo}: the hub refuses your token: renew it in HF_TOKEN or with "
                "`hf auth login`"
            ) from None
        if status == 403:
            raise UsageError(
                f"{_OPTION} {repo}: your token may not write there (403): make one that may, or "
                "name another repository"
            ) from None
        reason = str(explain(error, repo, None, "model"))
        raise FetchError(f"{_OPTION}: {reason}{'; ' if mend else ''}{mend}") from None
