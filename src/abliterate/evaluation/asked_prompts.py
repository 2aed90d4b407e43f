"""The prompts of an evaluation as the model is asked them, and up to where its answers begin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import Any

from abliterate.evaluation.compare import ask_prompts
from abliterate.evaluation.inputs import EvaluationInputs
from abliterate.evaluation.kept_figures import Memo
from abliterate.evaluation.prompt_kinds import KINDS
from abliterate.inference.thoughts import Asked
from abliterate.prompts.chat_template import encode
from abliterate.run_folder import Session, prompt_keys
from abliterate.run_stage import input_hash


def row_key(
    session: Session, inputs: EvaluationInputs, name: str, what: str, more: Mapping[str, Any]
) -> str:
    """The hash of all that a figure of a row depends on.

    Args:
        session: the model that is intervened on.
        inputs: what is asked.
        name: of the row.
        what: the figure.
        more: what else decides about it.
    """
    edited, direction = inputs.edited, inputs.direction
    subject: Any = {
        "intervention": name,
        "direction": None if name == "baseline" else direction and direction.key,
    }
    if name in edited:
        subject = {"checkpoint": edited[name].identity()}
    if name in inputs.servers:
        subject["server"] = inputs.servers[name].summary()
    return input_hash(session, {"subject": subject, "what": what, "more": more})


@dataclass(frozen=True)
class AskedPrompts:
    """The prompts as token ids.

    Attributes:
        session: the unmodified model, which has the thoughts.
        inputs: what is asked.
        memo: what is known of it already.
    """

    session: Session
    inputs: EvaluationInputs
    memo: Memo

    @cached_property
    def ids(self) -> dict[str, list[list[int]]]:
        """By kind, what is answered."""
        tokenizer, chat = self.session.tokenizer, self.session.chat
        return {
            kind: encode(tokenizer, [prompt.text for prompt in chosen], chat)
            for kind, chosen in self.inputs.prompts.items()
        }

    @cached_property
    def _asked(self) -> dict[str, Asked]:
        """The prompts with the thoughts that the unmodified model has about them."""
        base, chat, prompts = self.session.loaded, self.session.chat, self.inputs.prompts
        batch_size = self.session.settings.model.batch_size
        return {kind: ask_prompts(base, prompts[kind], chat, batch_size, kind) for kind in KINDS}

    @cached_property
    def scored_ids(self) -> dict[str, list[list[int]]]:
        """As ``ids``, up to where the answer begins: what first tokens are scored on."""
        if not self.starts_elsewhere:
            return self.ids
        return {kind: asked.finished(kind) for kind, asked in self._asked.items()}

    @property
    def starts_elsewhere(self) -> bool:
        """Whether answers start from other tokens than those that first tokens are scored on."""
        return self.session.thinking.mode == "skip"

    @cached_property
    def ended(self) -> dict[str, list[bool]] | None:
        """Which prompts' thoughts have ended; None where none are had."""
        if not (self.starts_elsewhere and self.inputs.here):
            return None

        def find() -> dict[str, list[bool]]:
            return {kind: asked.ended for kind, asked in self._asked.items()}

        key = row_key(self.session, self.inputs, "baseline", "ended", self.key)
        ended: dict[str, list[bool]] = self.memo.get(key, find, self._are_flags)
        return ended

    @property
    def scored(self) -> dict[str, int] | None:
        """Of how many prompts first tokens were scored, where a thought came before; else None."""
        return None if self.ended is None else {k: sum(flags) for k, flags in self.ended.items()}

    @property
    def scored_prompts(self) -> dict[str, list[str]]:
        """The keys of the prompts whose first tokens were scored, in the order of the figures."""
        ended, prompts = self.ended, prompt_keys({k: self.inputs.prompts[k] for k in KINDS})
        if ended is None:
            return prompts if self.inputs.here else {}
        return {kind: list(compress(keys, ended[kind])) for kind, keys in prompts.items()}

    def _are_flags(self, figure: Any) -> bool:
        return (
            isinstance(figure, dict)
            and set(figure) == set(KINDS)
            and all(
                isinstance(figure[kind], list)
                and len(figure[kind]) == len(self.inputs.prompts[kind])
                and set(map(type, figure[kind])) <= {bool}
                for kind in KINDS
            )
        )

    @property
    def key(self) -> dict[str, Any]:
        """What refusal tokens, and all that counts them, depend on."""
        of_metrics = {kind: self.inputs.prompts[kind] for kind in KINDS}
        prompts = prompt_keys(of_metrics, keep_text=True)
        return {"prompts": prompts, "tokens": self.inputs.named_tokens}
