"""evaluate: what interventions do to refusal and to harmless answers (paper, sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from abliterate.chat import ChatFormat, encode
from abliterate.direction import Direction
from abliterate.errors import UsageError
from abliterate.forward import all_last_logits
from abliterate.generation import greedy_answers
from abliterate.interventions import ablate, add
from abliterate.models import Loaded
from abliterate.refusal import is_refusal, kl_divergence, refusal_score
from abliterate.sources import Prompt

INTERVENTIONS = ("baseline", "ablate", "add", "subtract")


@dataclass(frozen=True)
class Completion:
    """One answer and whether it holds a refusal substring."""

    prompt: str
    category: str | None
    response: str
    refused: bool


@dataclass(frozen=True)
class Outcome:
    """What one intervention did.

    Attributes:
        harmful: completions of the harmful test prompts.
        harmless: completions of the harmless ones.
        harmful_score: mean refusal score of the harmful prompts.
        harmless_score: mean refusal score of the harmless prompts.
        kl: mean last-token KL(baseline || intervention) on harmless prompts.
    """

    harmful: tuple[Completion, ...]
    harmless: tuple[Completion, ...]
    harmful_score: float
    harmless_score: float
    kl: float

    def summary(self) -> dict[str, Any]:
        """The figures, without texts."""
        return {
            "harmful": _rates(self.harmful) | {"refusal_score": self.harmful_score},
            "harmless": _rates(self.harmless) | {"refusal_score": self.harmless_score},
            "kl_divergence": self.kl,
        }


def _rates(completions: Sequence[Completion]) -> dict[str, Any]:
    refused = sum(completion.refused for completion in completions)
    return {"n": len(completions), "refused": refused, "refusal_rate": refused / len(completions)}


def intervention(
    loaded: Loaded, name: str, direction: Direction | None
) -> Callable[[], AbstractContextManager[None]]:
    """A factory of the context manager for ``baseline``, ``ablate``, ``add`` or ``subtract``.

    Raises:
        UsageError: the name is unknown, or it needs a direction or a source layer it lacks.
    """
    if name not in INTERVENTIONS:
        raise UsageError(f"--intervention must be one of {', '.join(INTERVENTIONS)}, not '{name}'")
    if name == "baseline":
        return nullcontext
    if direction is None:
        raise UsageError(f"--intervention {name} needs --direction")
    if name == "ablate":
        return lambda: ablate(loaded.model, direction.vector)
    layer = direction.layer
    if layer is None:
        raise UsageError(f"--intervention {name} needs a direction file that records its layer")
    coeff = 1.0 if name == "add" else -1.0
    return lambda: add(loaded.model, direction.vector, layer, coeff)


def evaluate(
    loaded: Loaded,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    refusal_tokens: Sequence[int],
    direction: Direction | None = None,
    interventions: Sequence[str] = ("baseline", "ablate", "add"),
    edited: Mapping[str, Loaded] | None = None,
    chat: ChatFormat | None = None,
    max_new_tokens: int = 512,
    batch_size: int | str = "auto",
) -> dict[str, Outcome]:
    """Greedy completions and scores of test prompts under each intervention.

    Args:
        loaded: the model that is intervened on.
        harmful: harmful test prompts.
        harmless: harmless test prompts.
        refusal_tokens: ids of the first tokens that count as refusing.
        direction: what ``ablate``, ``add`` and ``subtract`` use.
        interventions: which to run, in this order.
        edited: further models to compare, by name (an orthogonalized checkpoint); they see the
            same token ids.
        chat: system message and template variables.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts per forward pass, or ``auto``.

    Returns:
        Outcomes by intervention or name of the edited model.
    """
    chat = chat or ChatFormat()
    runs = [(name, loaded, intervention(loaded, name, direction)) for name in interventions]
    runs += [(name, other, nullcontext) for name, other in (edited or {}).items()]
    ids = {
        kind: encode(loaded.tokenizer, [p.text for p in prompts], chat)
        for kind, prompts in (("harmful", harmful), ("harmless", harmless))
    }
    baseline = all_last_logits(loaded.model, ids["harmless"], batch_size)
    outcomes = {}
    for name, subject, context in runs:
        completions = []
        for kind, prompts in (("harmful", harmful), ("harmless", harmless)):
            with context():
                texts = complete(
                    subject, ids[kind], max_new_tokens, batch_size, f"evaluate: {name}, {kind}"
                )
            completions.append(
                tuple(
                    Completion(p.text, p.category, text, is_refusal(text))
                    for p, text in zip(prompts, texts, strict=True)
                )
            )
        scores: list[Tensor] = [
            all_last_logits(subject.model, ids[kind], batch_size, context())
            for kind in ("harmful", "harmless")
        ]
        outcomes[name] = Outcome(
            completions[0],
            completions[1],
            float(refusal_score(scores[0], refusal_tokens).mean()),
            float(refusal_score(scores[1], refusal_tokens).mean()),
            float(kl_divergence(baseline, scores[1]).mean()),
        )
    return outcomes


def complete(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int | str = "auto",
    description: str = "complete",
) -> list[str]:
    """Greedy completions, each up to its end of turn.

    Args:
        loaded: model and tokenizer.
        prompts: token ids.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts per batch, or ``auto``.
        description: shown beside the progress bar.
    """
    answers = greedy_answers(loaded, prompts, max_new_tokens, batch_size, description)
    return [loaded.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
