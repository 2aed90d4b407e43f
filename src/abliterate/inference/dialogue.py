"""A conversation with a model whose residual stream is steered, from one answer to the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet
from abliterate.errors import InputError, UsageError
from abliterate.inference.answer_stream import AnswerStream, Heard, no_words
from abliterate.inference.answer_text import AnswerReader
from abliterate.inference.decoding import decoding_config, plain_decoding
from abliterate.inference.forward import padding_token
from abliterate.inference.generation import stop_tokens
from abliterate.inference.interventions import ablate, ablation_units, add, unit_direction
from abliterate.metrics.answers import Parts
from abliterate.models.embedding_rows import require_token
from abliterate.models.loading import LoadedModel
from abliterate.models.model_classes import text_config
from abliterate.prompts.chat_template import ChatFormat, check_format, render_turns, tokenize
from abliterate.writers import decoder_blocks, find_writers, stream_width


@dataclass(frozen=True)
class Steering:
    """What is done to the residual stream during an answer.

    Attributes:
        kind: nothing, the direction's ablation, or its addition at the source layer.
        coeff: multiple of the direction that is added.
    """

    kind: Literal["off", "ablate", "add"] = "off"
    coeff: float = 1.0

    def __str__(self) -> str:
        return f"add {self.coeff:g}" if self.kind == "add" else self.kind


def check_steering(steering: Steering, direction: Direction | DirectionSet | None) -> None:
    """Refuse what cannot be done along a direction, whatever the model.

    Raises:
        UsageError: there is none, or it cannot be added.
    """
    if steering.kind == "off":
        return
    if direction is None:
        raise UsageError("there is no direction to steer along: pass --direction")
    if steering.kind == "ablate":
        return
    if isinstance(direction, DirectionSet):
        raise UsageError(
            "a direction set is ablated, not added: no one layer's direction is the one to add; "
            "give one direction"
        )
    if direction.layer is None:
        raise UsageError(
            "the direction does not record its layer, which adding it needs: use one that "
            "`abliterate select` wrote"
        )


@dataclass(frozen=True)
class Decoding:
    """How answers are generated.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 for greedy decoding.
        seed: of the sampling; the n-th answer of a conversation is the same each time.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"--temperature must be 0 or more, not {self.temperature}")


@dataclass
class Conversation:
    """The turns so far, and the model that answers.

    Attributes:
        loaded: model and tokenizer.
        direction: what to steer along, or None.
        chat: how turns become a prompt.
        decoding: how answers are generated.
        turns: user and assistant in turn, as chat templates take them.
    """

    loaded: LoadedModel
    direction: Direction | DirectionSet | None
    chat: ChatFormat = field(default_factory=ChatFormat)
    decoding: Decoding = field(default_factory=Decoding)
    turns: list[dict[str, str]] = field(default_factory=list)

    def answer(self, text: str, steering: Steering, heard: Heard = no_words) -> str:
        """What :meth:`reply` answers, without its thought; empty where that has not ended."""
        return self.reply(text, steering, heard).answer or ""

    def reply(
        self, text: str, steering: Steering, heard: Heard = no_words, thought: Heard = no_words
    ) -> Parts:
        """The model's reply to the user's next turn.

        What it answers becomes part of the conversation, what it thinks does not. Ctrl-C ends the
        reply, and what was answered by then stays: the exception goes on.

        Args:
            text: what the user says.
            steering: during this reply.
            heard: called with each piece of the answer.
            thought: called with each piece of the thought before it.

        Raises:
            CheckpointError: the chat template fails, or the embedding has no row for a token.
            InputError: the conversation is longer than the model's context.
            UsageError: there is nothing to steer along.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        prompt = self._prompt(turns)
        # TextStreamer prints; what it would print is heard instead.
        reader = AnswerReader.of(self.loaded.tokenizer, self.chat)
        stream = AnswerStream(reader, heard, thought)
        torch.manual_seed(self.decoding.seed + len(self.turns))
        try:
            generation = self._generation(prompt.shape[1])
            model = self.loaded.model
            with torch.inference_mode(), self.steered(steering), plain_decoding(model):
                model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=generation,
                    streamer=stream,
                )
        except KeyboardInterrupt:
            stream.end()
            raise
        finally:
            parts = stream.parts
            if stream.text or stream.ended:
                said = {"role": "assistant", "content": parts.answer or ""}
                self.turns = [*turns, said]
        return parts

    @contextmanager
    def steered(self, steering: Steering) -> Iterator[None]:
        """Within the context the model's residual stream is steered."""
        model, direction = self.loaded.model, self.direction
        context: Any = nullcontext()
        if steering.kind != "off":
            check_steering(steering, direction)
            if isinstance(direction, Direction):
                if steering.kind == "add" and direction.layer is not None:
                    context = add(model, direction.vector, direction.layer, steering.coeff)
                else:
                    context = ablate(model, direction.vector)
            elif direction is not None:
                context = ablate(model, direction)
        with context:
            yield

    def check(self) -> None:
        """Refuse what would go wrong before anything is said.

        Raises:
            CheckpointError: the chat template fails, or loses turns of a conversation.
            InputError: its size or layer is another model's.
            UnsupportedArchitectureError: the model's writers are not known.
            UsageError: an option has no effect on what the template writes.
        """
        check_format(self.loaded.tokenizer, self.chat, several=True)
        if self.direction is None:
            return
        model = self.loaded.model
        if isinstance(self.direction, DirectionSet):
            ablation_units(model, self.direction)
            return
        unit_direction(self.direction.vector, stream_width(model, find_writers(model)))
        layer, count = self.direction.layer, len(decoder_blocks(model))
        if layer is not None and not 0 <= layer < count:
            raise InputError(f"the direction is of layer {layer}: the model has 0 to {count - 1}")

    def _prompt(self, turns: list[dict[str, str]]) -> torch.Tensor:
        rendered = render_turns(self.loaded.tokenizer, turns, self.chat)
        (ids,) = tokenize(self.loaded.tokenizer, [rendered], self.chat)
        if ids:
            require_token(self.loaded.model, max(ids), "the conversation")
        device = self.loaded.model.get_input_embeddings().weight.device
        return torch.tensor([ids], device=device)

    def _generation(self, length: int) -> GenerationConfig:
        room = self.decoding.max_new_tokens
        if self.chat.thinking == "skip":
            room += self.chat.max_thinking_tokens
        context = getattr(text_config(self.loaded.model), "max_position_embeddings", None)
        if isinstance(context, int):
            room = min(room, context - length)
        if room < 1:
            raise InputError(
                f"the conversation takes {length} tokens and the model's context is {context}: "
                "/reset begins a new one"
            )
        stops = stop_tokens(self.loaded, self.chat)
        padding = padding_token(self.loaded.model, *stops)
        return decoding_config(stops, room, self.decoding.temperature, pad_token_id=padding)
