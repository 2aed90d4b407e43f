"""Greedy answers of a server: the prompts that the model here would get, token by token.

They go to the completions endpoint unless ``--server-api chat`` asks for that of chats: what the
server's own template, its default system message or its reasoning parser would do to a conversation
is then no part of the answer, and response prefix and ``--thinking`` mean what they mean here. A
prompt is sent as token ids; a server that takes texts alone gets one that its tokenizer turns into
the same ids. Servers that offer chats alone are sent messages, which are theirs to render.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from abliterate.console import log, progress_bar, redact
from abliterate.errors import CheckpointError
from abliterate.evaluation.completions import CompletionFile
from abliterate.evaluation.endpoints import SHOWN, said, short
from abliterate.evaluation.progress import CompletionProgress
from abliterate.evaluation.served_prompts import Conversations, prompt_text
from abliterate.evaluation.servers import Server
from abliterate.inference.thoughts import AnswerLimits
from abliterate.metrics.answers import Parts
from abliterate.prompts.chat_template import ChatFormat

_GO_ON = "what is answered is kept, and the same command goes on from there"


@dataclass(frozen=True)
class ServedAnswer:
    """What a server said to one prompt.

    Attributes:
        text: the answer, or all that was written.
        thought: what it names as a thought beside the text.
        ended: by itself, not by a bound of length.
        cut: that bound was the server's own.
        read: how many tokens the prompt had for the server; None if it does not say.
    """

    text: str
    thought: str | None = None
    ended: bool = True
    cut: bool = False
    read: int | None = None


@dataclass
class Dialect:
    """What a server takes beside model, prompt, temperature and length; its first replies tell.

    Attributes:
        refused: names of fields that it does not take.
        as_text: prompts are texts; else token ids.
    """

    refused: set[str] = field(default_factory=set)
    as_text: bool = False


def complete_served(
    server: Server,
    ids: Sequence[Sequence[int]],
    file: CompletionFile,
    limits: AnswerLimits,
    stops: Sequence[int],
    seed: int = 0,
    label: tuple[str, str] = ("", ""),
    dialect: Dialect | None = None,
    chat: ChatFormat | None = None,
) -> None:
    """Have the prompts of ``file`` answered that have no completion yet.

    The first one is asked alone, the others at once. One that fails ends it when those on their
    way have come back.

    Args:
        server: who answers.
        ids: token ids of the file's prompts.
        file: what gets each completion as soon as it comes.
        limits: how long answers may be, and how they are read.
        stops: tokens that end an answer.
        seed: sent along; greedy decoding needs none.
        label: row and kind, for the progress bar and the log.
        dialect: what an earlier call has learnt of the server; learns from this one.
        chat: how messages are rendered, for a server of chats.

    Raises:
        CheckpointError: the server cannot be reached, does not know the model, wants a key, or
            gives no completion.
    """
    from concurrent.futures import as_completed

    from anyio.from_thread import start_blocking_portal

    progress = CompletionProgress(file, label)
    told = Conversations.of(limits, chat or ChatFormat()) if server.chat else None
    texts = list(file.prompts)
    left = progress.left
    cut = misread = 0

    def keep(row: int, answer: ServedAnswer) -> None:
        nonlocal cut, misread
        cut += answer.cut
        misread += answer.read not in (None, len(ids[row]))
        note = progress.put(row, *_read(answer, limits))
        bar.set_postfix_str(note, refresh=False)
        bar.update(1)

    if left:
        # As with a judge: one event loop in a thread of its own, whoever calls.
        with (
            file.writing(),
            progress_bar(progress.description, len(ids)) as bar,
            start_blocking_portal() as portal,
        ):
            bar.update(len(ids) - len(left))
            inquiry = portal.call(_Inquiry, server, limits, stops, seed, dialect, told)
            first, *others = left
            if (answer := portal.call(inquiry.ask, ids[first], texts[first])) is not None:
                keep(first, answer)
            waiting = {
                portal.start_task_soon(inquiry.ask, ids[row], texts[row]): row for row in others
            }
            for future in as_completed(waiting):
                if isinstance(future.exception(), CheckpointError):
                    continue  # told below, when the others have come back
                if (answer := future.result()) is not None:
                    keep(waiting[future], answer)
            portal.call(inquiry.client.close)
            if inquiry.failure is not None:
                raise inquiry.failure
    if cut:
        log.warning(
            "%s: %d answers were cut by a bound of the server's own, before --max-new-tokens: "
            "raise the context length that it serves the model with",
            progress.description,
            cut,
        )
    if misread:
        log.warning(
            "%s: the server has read %d prompts as another number of tokens than they have here: "
            "its tokenizer or template is another one, or it adds tokens, and its answers are to "
            "other prompts",
            progress.description,
            misread,
        )
    progress.finish()


def _read(answer: ServedAnswer, limits: AnswerLimits) -> tuple[str, Parts]:
    if answer.thought is None:
        return limits.read_text(answer.text)
    text = limits.reader.clean(answer.text)
    # A thought that was cut has no answer behind it; an empty answer is one all the same.
    parts = Parts(answer.thought.strip(), text if text or answer.ended else None)
    return "\n\n".join(filter(None, (parts.thought, text))), parts


class _Inquiry:
    """The requests of one file, made inside its event loop.

    Attributes:
        server: whom to ask.
        client: its client.
        failure: why no more are made.
    """

    def __init__(
        self,
        server: Server,
        limits: AnswerLimits,
        stops: Sequence[int],
        seed: int,
        dialect: Dialect | None,
        conversations: Conversations | None,
    ) -> None:
        from anyio import Semaphore

        from abliterate.evaluation.endpoint_client import open_client

        self.server, self.limits, self.stops = server, limits, stops
        self.client: Any = open_client(server.url, server.timeout, server.retries)
        self.failure: CheckpointError | None = None
        self.dialect = Dialect() if dialect is None else dialect
        self._seed, self._conversations = seed, conversations
        self._turn = Semaphore(server.concurrency)

    def _options(self) -> dict[str, Any]:
        """The further fields of a request, without those that the server does not take."""
        tokenizer, reader = self.limits.reader.tokenizer, self.limits.reader
        options: dict[str, Any] = {
            # What would change the arg max, switched off: of OpenAI, and of vLLM and SGLang.
            "frequency_penalty": 0,
            "repetition_penalty": 1,
            "seed": self._seed,
            "stop_token_ids": list(self.stops),
        }
        if reader.has_marks:
            options["skip_special_tokens"] = False
        if "stop_token_ids" in self.dialect.refused:  # OpenAI's own takes four texts
            texts = [str(tokenizer.convert_ids_to_tokens(token)) for token in self.stops]
            options["stop"] = texts[:4]
        return {key: value for key, value in options.items() if key not in self.dialect.refused}

    async def ask(self, ids: Sequence[int], text: str) -> ServedAnswer | None:
        """The answer to one prompt; None where an earlier failure is that of all.

        Raises:
            CheckpointError: there is none.
        """
        async with self._turn:
            if self.failure is not None:
                return None
            try:
                return await self._ask(ids, text)
            except CheckpointError as error:
                self.failure = self.failure or error
                raise

    async def _ask(self, ids: Sequence[int], text: str) -> ServedAnswer:
        import openai

        from abliterate.evaluation.endpoint_client import RefusedReplyError

        server, place = self.server, f"--server {self.server.place}"
        try:
            reply = await self._create(ids, text)
        except CheckpointError:
            raise
        except RefusedReplyError as error:
            raise CheckpointError(f"{place}: unusable answer ({error}); {_GO_ON}") from None
        except openai.APITimeoutError:
            raise CheckpointError(
                f"{place} gave no answer within {server.timeout:g} s: raise --server-timeout or "
                f"lower --concurrency; {_GO_ON}"
            ) from None
        except openai.APIConnectionError as error:
            reason = short(error.__cause__ or error)
            raise CheckpointError(
                f"{place} cannot be reached ({reason}): check the address, and that the server "
                f"runs; {_GO_ON}"
            ) from None
        except openai.APIStatusError as error:
            raise CheckpointError(await self._status_line(error)) from None
        except Exception as error:  # a body that is no completion fails in many ways
            raise CheckpointError(f"{place}: unusable answer ({short(error)})") from None
        return self._answer(reply)

    async def _create(self, ids: Sequence[int], text: str) -> Any:
        """A reply; without what the server says that it does not take."""
        import openai

        dialect = self.dialect
        while True:
            sent, as_text = self._options(), dialect.as_text
            chats = self._conversations
            asked: dict[str, Any] = {
                "model": self.server.model,
                "max_tokens": self.limits.longest,
                "temperature": 0,
            }
            try:
                if chats is not None:
                    body = sent | (
                        {"chat_template_kwargs": dict(v)} if (v := chats.variables) else {}
                    )
                    return await self.client.chat.completions.create(
                        messages=chats.messages(text), extra_body=body, **asked
                    )
                prompt = self._text(ids) if as_text else list(ids)
                return await self.client.completions.create(prompt=prompt, extra_body=sent, **asked)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                why = said(error)
                refused = [name for name in sent if re.search(rf"\b{name}\b", why)]
                for name in refused:
                    self._drop(name)
                known = as_text or chats is not None
                if not refused and (known or "prompt" not in why or "str" not in why):
                    raise
                if not refused:
                    dialect.as_text = True

    def _text(self, ids: Sequence[int]) -> str:
        found = prompt_text(self.limits.reader.tokenizer, ids)
        if found is None:
            raise CheckpointError(
                f"--server {self.server.place} takes prompts as text alone, and no text gives "
                "its tokenizer the tokens of this model's prompts: serve the model with vLLM, "
                "SGLang or llama.cpp, which take token ids"
            )
        return found

    def _drop(self, name: str) -> None:
        """Do without a field from now on."""
        if name in self.dialect.refused:  # another request has found it out
            return
        self.dialect.refused.add(name)
        log.info("--server %s does not take %s", self.server.place, name)
        if name == "skip_special_tokens":
            log.warning(
                "--server %s leaves special tokens out, by which this model's thoughts are told "
                "from its answers: look at its answers before you trust their figures",
                self.server.place,
            )

    async def _status_line(self, error: Any) -> str:
        place, status = f"--server {self.server.place}", error.status_code
        told = f"HTTP {status}: {short(error)}"
        if status in (401, 403):
            return f"{place} wants a key, or another one ({told}): set OPENAI_API_KEY"
        if status == 404:
            served = await self._served()
            if served is None or self.server.model in served:
                mend = "" if self.server.chat else ", or --server-api chat"
                return (
                    f"{place} has no completions ({told}): give the address up to and with /v1, of "
                    f"a server with the endpoint {self._endpoint}{mend}"
                )
            names = f"it serves {', '.join(served)}" if served else "it lists no models"
            return (
                f"{place} has no model '{self.server.model}' ({told}): give its name as "
                f"--served-model; {names}"
            )
        if status in (400, 422):
            return (
                f"{place} refuses the request ({told}): check --served-model and --max-new-tokens"
            )
        return f"{place} fails ({told}); {_GO_ON}"

    async def _served(self) -> list[str] | None:
        """The names of the server's models; None if it does not say."""
        try:
            listed = await self.client.models.list()
            return [redact(str(model.id))[:SHOWN] for model in listed.data][:5]
        except Exception:  # whatever goes wrong: this is but a hint
            return None

    @property
    def _kind(self) -> str:
        return "chat completion" if self.server.chat else "text completion"

    @property
    def _endpoint(self) -> str:
        return "/v1/chat/completions" if self.server.chat else "/v1/completions"

    def _answer(self, reply: Any) -> ServedAnswer:
        try:
            choice = reply.choices[0]
            said_in = choice.message if self.server.chat else choice
            text = said_in.content if self.server.chat else said_in.text
            thought = _thought_of(said_in)
        except (AttributeError, TypeError, IndexError):
            text = thought = None
        if thought is not None and text is None:  # it has not come to an answer
            text = ""
        if not isinstance(text, str):
            mend = "" if self.server.chat else "; --server-api chat asks servers of chats alone"
            raise CheckpointError(
                f"--server {self.server.place}: unusable answer (no {self._kind}): give a server "
                f"with the endpoint {self._endpoint}{mend}"
            )
        ended = getattr(choice, "finish_reason", None) != "length"
        used = getattr(reply, "usage", None)
        read, count = (
            found if isinstance(found := getattr(used, name, None), int) else None
            for name in ("prompt_tokens", "completion_tokens")
        )
        cut = not ended and count is not None and count < self.limits.longest
        return ServedAnswer(_whole(text), thought, ended, cut, read)


def _thought_of(choice: Any) -> str | None:
    """A thought that a server has told from the answer itself."""
    for name in ("reasoning_content", "reasoning"):
        thought = getattr(choice, name, None)
        if isinstance(thought, str) and thought:
            return _whole(thought)
    return None


def _whole(text: str) -> str:
    """A text as UTF-8 can hold it, without secrets that the server repeats."""
    return redact(text).encode(errors="backslashreplace").decode()
