"""The client of an endpoint (a judge's, or a server of answers), which may be slow, talkative, or
somebody else by now.

One attempt has one deadline, from the look-up of the host to the last byte; a reply has a largest
size; prompts, answers and the key go to the host that the user named and to no other.
"""

from __future__ import annotations

import base64
import os
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import anyio
import httpx2
import openai

from abliterate.errors import UsageError
from abliterate.settings import public_url

#: Bytes of a reply; a verdict takes a few hundred, a long answer some ten thousand.
MAX_REPLY = 1 << 20
_MAX_REDIRECTS = 5


class RefusedReplyError(openai.OpenAIError):  # type: ignore[misc]
    """A reply that is not read to its end; asking the same again would bring the same.

    Attributes:
        gone: so would asking anything else.
    """

    def __init__(self, reason: str, gone: bool = False) -> None:
        super().__init__(reason)
        self.gone = gone


class BoundedClient(openai.DefaultAsyncHttpxClient):  # type: ignore[misc]
    """An HTTP client whose requests end.

    Args:
        seconds: for one request, redirects and the whole reply included.
    """

    def __init__(self, seconds: float, **options: Any) -> None:
        super().__init__(timeout=seconds, **options)
        self._seconds = seconds

    async def send(self, request: Any, **options: Any) -> Any:
        """As the base class does.

        Raises:
            httpx2.ReadTimeout: the time is over.
            RefusedReplyError: the reply is too large, compressed, or sends us elsewhere.
        """
        try:
            with anyio.fail_after(self._seconds):
                return await self._follow(request, options)
        except TimeoutError:
            raise httpx2.ReadTimeout("the time is over", request=request) from None

    async def _follow(self, request: Any, options: dict[str, Any]) -> Any:
        options |= {"stream": True, "follow_redirects": False}
        for _ in range(1 + _MAX_REDIRECTS):
            response = await super().send(request, **options)
            try:
                if (following := response.next_request) is None:
                    return await _read(response)
                if following.url.origin != request.url.origin:
                    place = public_url(str(following.url))
                    raise RefusedReplyError(
                        f"it redirects to {place}, which is not asked", gone=True
                    )
                request = following
            finally:
                await response.aclose()
        raise RefusedReplyError(f"it redirects more than {_MAX_REDIRECTS} times", gone=True)


async def _read(response: Any) -> Any:
    """The response with its body, as it came over the line."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise RefusedReplyError("its reply is compressed, which was not asked for")
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > MAX_REPLY:
            raise RefusedReplyError(f"its reply is larger than {MAX_REPLY >> 20} MiB")
    return httpx2.Response(
        response.status_code,
        headers=response.headers,
        content=bytes(body),
        request=response.request,
        extensions=response.extensions,
    )


def check_url(url: str, option: str = "--judge-url") -> None:
    """Refuse what is no address of an endpoint.

    Args:
        url: the address.
        option: what gave it.

    Raises:
        UsageError: it is none.
    """
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{option} must start with http:// or https://, not '{public_url(url)}'")
    try:
        parts = urlsplit(url)
        _ = parts.port
        if not parts.hostname:
            raise ValueError
        httpx2.URL(public_url(url))
    except (ValueError, httpx2.InvalidURL):
        raise UsageError(f"{option} {public_url(url)} is no address: check it") from None


def open_client(
    url: str, seconds: float, retries: int, key: str = "OPENAI_API_KEY"
) -> openai.AsyncOpenAI:
    """A client for the endpoint at ``url``, whose user and password it sends as Basic
    authentication, and whose query with every request; the key is in the variable ``key``, or else
    in ``OPENAI_API_KEY``."""
    parts = urlsplit(url)
    login = None
    if parts.username or parts.password:
        login = httpx2.BasicAuth(unquote(parts.username or ""), unquote(parts.password or ""))
    return openai.AsyncOpenAI(
        base_url=public_url(url),
        api_key=os.environ.get(key) or os.environ.get("OPENAI_API_KEY") or "none",
        timeout=seconds,
        max_retries=retries,
        default_query=dict(parse_qsl(parts.query, keep_blank_values=True)),
        default_headers={"Accept-Encoding": "identity"},
        http_client=BoundedClient(seconds, auth=login),
    )


def secrets_in(url: str) -> set[str]:
    """What in ``url`` must never show, in the forms in which a server may echo it."""
    parts = urlsplit(url)
    found = {value for _, value in parse_qsl(parts.query)}
    if parts.username or parts.password:
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        login = f"{user}:{password}"
        found |= {login, base64.b64encode(login.encode()).decode(), password or user}
        found.add(parts.netloc.rpartition("@")[0])
    return {form for text in found for form in (text, quote(text, safe="")) if text}
