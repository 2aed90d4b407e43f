"""Why the hub does not give what it was asked for, in one line with the mend.

The client's errors have many types, span lines, and some of their texts hold signed addresses:
what a user reads is written here, from the type, the status and the answer's own code.
"""

from __future__ import annotations

import errno
import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from abliterate.errors import one_line

_ADDRESS = re.compile(r"(https?://[^\s'\"<>?]+)\?[^\s'\"<>]*")


#: Statuses of faults that pass by themselves.
PASSING = (408, 425, 429, 500, 502, 503, 504)


class HubError(Exception):
    """The hub does not give it; says why in one line.

    Attributes:
        missing: it answered, and what was asked for is not there: no cached copy stands for it.
        passing: it may well give it another time.
    """

    def __init__(self, message: str, missing: bool = False, passing: bool = False) -> None:
        super().__init__(message)
        self.missing, self.passing = missing, passing


@contextmanager
def asking(repo: str, revision: str | None = None, kind: str = "model") -> Iterator[None]:
    """Turn every error of the client's within into a :class:`HubError`.

    Args:
        repo: ``org/name``, or a file of it.
        revision: the one asked for.
        kind: ``model`` or ``dataset``.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # the client's many error types have no narrower common base
        raise explain(error, repo, revision, kind) from None


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came of, the nearest first; hidden ones too."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def status_of(error: BaseException) -> tuple[int, Any] | None:
    """The status and the headers with which the hub answered, if it answered."""
    for one in chain(error):
        response = getattr(one, "response", None)
        if (status := getattr(response, "status_code", None)) is not None:
            return int(status), response.headers  # type: ignore[union-attr]
    return None


def transport_fault(error: BaseException) -> BaseException | None:
    """The fault of the connection (refused, cut, too slow), if that is what it came of."""
    for one in chain(error):
        # The client speaks through httpx, or from 2.0 on through its successor httpx2.
        kinds = {(kind.__name__, kind.__module__[:5]) for kind in type(one).__mro__}
        if ("TransportError", "httpx") in kinds:
            return one
    return None


def is_incomplete(error: BaseException) -> bool:
    """Whether a file came with fewer bytes than it has."""
    return any("Consistency check failed" in str(one) for one in chain(error))


def short(error: BaseException) -> str:
    """What an error says on one line: no queries of addresses (they may sign), no cut in a word."""
    text = _ADDRESS.sub(r"\1", one_line(error)) or type(error).__name__
    return textwrap.shorten(text, 200, placeholder=" ...")


def explain(error: Exception, repo: str, revision: str | None, kind: str) -> HubError:
    """The reason for which ``repo`` could not be had."""
    from huggingface_hub import constants, errors

    kinds = tuple(chain(error))

    def is_a(*names: str) -> bool:
        return any(isinstance(one, getattr(errors, name)) for one in kinds for name in names)

    what = f"{kind} '{repo}'"
    owner = "/".join(repo.split("/")[:2])
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{owner}"
    if (local := _disk_fault(kinds)) is not None:
        return HubError(f"{what} cannot be kept: {local}")
    answer = status_of(error)
    if is_a("GatedRepoError"):
        if _has_token():
            return HubError(
                f"{what} is gated, and the account of your token has no access: accept its terms "
                f"or ask for access at {page}"
            )
        return HubError(
            f"{what} is gated: accept its terms at {page}, then log in with `hf auth login` or set "
            "HF_TOKEN"
        )
    if is_a("RevisionNotFoundError"):
        return HubError(
            f"{what} has no revision '{revision or 'main'}': its branches, tags and commits are at "
            f"{page}/tree/main",
            missing=True,
        )
    if answer is not None and answer[0] == 401 and _is_bad_token(answer[1], kinds):
        return HubError(
            "the hub refuses your token, which is invalid or has expired: renew it in HF_TOKEN or "
            "with `hf auth login`"
        )
    if is_a("RepositoryNotFoundError") or (answer is not None and answer[0] == 401):
        # Without a token the hub says no more of a private one than of one that there is not.
        mend = (
            "or is private, and your token has no access: check the id"
            if _has_token()
            else "or is private: check the id, or set HF_TOKEN"
        )
        return HubError(f"{what} does not exist on the hub at {constants.ENDPOINT}, {mend}")
    if is_a("DisabledRepoError"):
        return HubError(f"{what} was disabled by the hub: see {page}")
    if is_a("RemoteEntryNotFoundError"):
        text = f"{what} is not there on the hub (404): see {page}/tree/{revision or 'main'}"
        return HubError(text, missing=True)
    if is_a("OfflineModeIsEnabled") or (constants.HF_HUB_OFFLINE and answer is None):
        at = f" at '{revision}'" if revision else ""
        return HubError(
            f"{what} is not whole in the cache{at} and HF_HUB_OFFLINE is set: set HF_HUB_OFFLINE=0 "
            "to fetch it"
        )
    if answer is not None:
        return HubError(_said(what, answer[0]), passing=answer[0] in PASSING)
    if (fault := transport_fault(error)) is not None:
        return HubError(
            f"{what} cannot be asked for: {_unreachable(fault, constants.ENDPOINT)}", passing=True
        )
    if is_incomplete(error):
        return HubError(f"{what}: a file came incomplete", passing=True)
    if is_a("FileMetadataError"):
        return HubError(f"{what}: {constants.ENDPOINT} does not answer as a hub: check HF_ENDPOINT")
    return HubError(f"{what} cannot be read from the hub: {short(error)}")


def _said(what: str, status: int) -> str:
    if status == 403:
        return f"{what}: the hub denies access (403): your token lacks the permission to read it"
    if status == 429:
        return f"{what}: the hub answers 429, too many requests: wait a while, or set HF_TOKEN"
    if status >= 500:
        return f"{what}: the hub answers {status}: it has trouble of its own, try again later"
    return f"{what}: the hub answers {status}"


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _is_bad_token(headers: Any, kinds: tuple[BaseException, ...]) -> bool:
    said = f"{headers.get('X-Error-Message', '')} {' '.join(map(str, kinds))}".lower()
    return "invalid credentials" in said or "invalid user token" in said


def _unreachable(fault: BaseException, endpoint: str) -> str:
    """The address that does not answer: a proxy's or the hub's."""
    why = short(fault)
    scheme = urlsplit(endpoint).scheme
    proxy = getproxies().get(scheme) or getproxies().get("all")
    if proxy and any(kind.__name__ == "ProxyError" for kind in type(fault).__mro__):
        return f"the proxy {_place(proxy)} does not let through to {endpoint} ({why})"
    if proxy and not _bypassed(endpoint):
        return (
            f"{endpoint} does not answer through the proxy {_place(proxy)} ({why}): check "
            f"{scheme}_proxy, HF_ENDPOINT and the network"
        )
    return f"{endpoint} does not answer ({why}): check the network and HF_ENDPOINT"


def _bypassed(endpoint: str) -> bool:
    from urllib.request import proxy_bypass

    return bool(proxy_bypass(urlsplit(endpoint).hostname or ""))


def _place(address: str) -> str:
    """An address without its user and password."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}".removeprefix("://")


def _disk_fault(kinds: tuple[BaseException, ...]) -> str | None:
    """What the disk of the cache refused, if that is what happened."""
    from huggingface_hub import constants

    for one in kinds:
        number = getattr(one, "errno", None)
        if not isinstance(one, OSError) or number is None:
            continue
        where = one.filename or constants.HF_HUB_CACHE
        if number in (errno.ENOSPC, errno.EDQUOT):
            return (
                f"the disk of {where} is full: free some of it, or set HF_HOME to a larger one "
                "(finished files are kept)"
            )
        if number in (errno.EACCES, errno.EPERM, errno.EROFS):
            return (
                f"{where} cannot be written ({os.strerror(number)}): set HF_HOME to a folder that "
                "can"
            )
    return None
