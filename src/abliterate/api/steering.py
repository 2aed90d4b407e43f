"""ablate and add on a model, as context managers or until removed; answers under them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, ContextDecorator, ExitStack
from dataclasses import dataclass, field
from numbers import Integral
from types import TracebackType
from typing import Any, Self

from transformers import PreTrainedModel

from abliterate.api.inputs import DirectionLike, PromptsLike, as_prompts, as_vector
from abliterate.api.language_model import ModelLike, as_model
from abliterate.direction import Direction
from abliterate.errors import UsageError
from abliterate.inference import interventions
from abliterate.inference.thoughts import AnswerLimits
from abliterate.prompts.chat_template import encode
from abliterate.prompts.sources import Prompt


@dataclass(eq=False)
class Handle:
    """Hooks that act until they are removed.

    Attributes:
        name: ``ablate`` or ``add``.
        attached: whether they still act.
    """

    name: str
    _stack: ExitStack = field(repr=False)
    attached: bool = True

    def remove(self) -> None:
        """Take the hooks away; once they are gone nothing happens."""
        self._stack.close()
        self.attached = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


@dataclass(eq=False)
class Intervention(ContextDecorator):
    """A change of a model's forward pass, in force within ``with`` or from ``attach()`` on.

    Attributes:
        name: ``ablate`` or ``add``.
    """

    name: str
    _enter: Callable[[], AbstractContextManager[Any]] = field(repr=False)
    _entered: list[ExitStack] = field(default_factory=list, init=False, repr=False)

    def attach(self) -> Handle:
        """Put the hooks on, until ``remove()`` of what is returned."""
        with ExitStack() as stack:
            stack.enter_context(self._enter())
            return Handle(self.name, stack.pop_all())

    def __enter__(self) -> None:
        handle = self.attach()
        self._entered.append(handle._stack)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered.pop().close()


def ablate(
    model: ModelLike | PreTrainedModel,
    direction: DirectionLike,
    scale: float = 1.0,
    *,
    layers: Collection[int] | int | None = None,
) -> Intervention:
    """Directional ablation: no component writes along the direction.

    ``c <- c - s (c . r) r`` for every component output ``c`` written to the residual stream, at
    every token.

    Args:
        model: a model in memory.
        direction: a direction or its vector ``[d_model]``, of any length but zero.
        scale: ``s``, 0 to 1: 1 removes all of the direction, 0.5 half of it.
        layers: the decoder blocks in which it is ablated, 0-based; None for all of them and for
            the embeddings.

    Returns:
        A context manager; ``.attach()`` puts the hooks on without a ``with``.

    Raises:
        InputError: the direction does not fit, or there is no such layer.
        UnsupportedArchitectureError: the model's writers are not known.
        UsageError: the scale is not between 0 and 1, or the model is streamed.

    Source:
        Section 2.4, equation 4.

    Examples:
        >>> with ab.ablate(lm, d, layers=range(4, 8)):
        ...     answers = ab.generate(lm, ["Hello"], max_new_tokens=8)
        >>> handle = ab.ablate(lm, d).attach()
        >>> handle.remove()
    """

    def enter() -> AbstractContextManager[Any]:
        chosen = [layers] if isinstance(layers, Integral) else layers
        if chosen is not None and not isinstance(chosen, Iterable):
            raise UsageError(f"the layers must be numbers, such as range(4, 8), not {chosen!r:.60}")
        return _on(
            model,
            "ablate",
            lambda hooked: interventions.ablate(hooked, as_vector(direction), scale, chosen),
        )

    return Intervention("ablate", enter)


def add(
    model: ModelLike | PreTrainedModel,
    direction: DirectionLike,
    layer: int | None = None,
    coeff: float = 1.0,
) -> Intervention:
    """Activation addition: ``h[l] <- h[l] + a r`` at the input of one block, at every token.

    Args:
        model: a model in memory.
        direction: a direction or its vector ``[d_model]``, added as it is (not normalised).
        layer: the block ``l``, 0-based; None for the one that the direction was taken from.
        coeff: ``a``: +1 induces refusal with a refusal direction, -1 suppresses it.

    Returns:
        A context manager; ``.attach()`` puts the hook on without a ``with``.

    Raises:
        InputError: the direction does not fit or there is no such layer.
        UsageError: the coefficient is not a finite number, or the model is streamed.

    Source:
        Section 2.4, equation 3.

    Examples:
        >>> with ab.add(lm, d, coeff=1.0):
        ...     answers = ab.generate(lm, ["Hello"], max_new_tokens=8)
    """

    def enter() -> AbstractContextManager[Any]:
        own = direction.layer if isinstance(direction, Direction) else None
        place: Any = own if layer is None else layer
        return _on(
            model,
            "add",
            lambda hooked: interventions.add(hooked, as_vector(direction), place, coeff),
        )

    return Intervention("add", enter)


def _on(
    model: Any, name: str, hooks: Callable[[PreTrainedModel], AbstractContextManager[Any]]
) -> AbstractContextManager[Any]:
    """Hooks on a model whose weights are in memory."""
    if isinstance(model, PreTrainedModel):
        return hooks(model)
    engine = as_model(model).engine
    with ExitStack() as stack:
        hooked = stack.enter_context(engine.in_memory(name))
        stack.enter_context(hooks(hooked))
        return stack.pop_all()


def generate(model: ModelLike, prompts: PromptsLike, max_new_tokens: int = 128) -> list[str]:
    """Greedy answers, one for each prompt, under whatever hooks the model has.

    Forward hooks of your own see more than the answers' passes: what a model allows (padding,
    reading prompts in groups) is tried on made-up tokens before its first answers. To collect
    activations use :func:`activations`.

    Args:
        model: a model in memory.
        prompts: texts or Prompt objects; a single text is one prompt.
        max_new_tokens: longest answer, in tokens.

    Returns:
        The answers' texts, a thought before them included, without special tokens.

    Raises:
        InputError: there are no prompts.
        UsageError: the model is streamed, or the length is below 1.

    Source:
        Section 3: greedy completions.

    Examples:
        >>> len(ab.generate(lm, ["Name a colour.", "Name a fruit."], max_new_tokens=8))
        2
    """
    lm = as_model(model)
    given = [prompts] if isinstance(prompts, str | Prompt) else prompts
    chosen = as_prompts(given, "given")
    lm.engine.require_answers()
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, Integral):
        raise UsageError(f"max_new_tokens must be a whole number, not {max_new_tokens!r:.60}")
    ids = encode(lm.tokenizer, [prompt.text for prompt in chosen], lm.chat)
    limits = AnswerLimits.of(lm.loaded, lm.chat, ids, int(max_new_tokens))
    answers = lm.engine.answers(ids, limits.longest, lm.batch_size, "generate", chat=lm.chat)
    return [limits.read(answer)[0] for answer in answers]
