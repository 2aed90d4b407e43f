"""The scores by prompt that a selection leaves for the next one in the same run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abliterate.console import log
from abliterate.extraction.extraction import Extraction
from abliterate.inference.in_memory import engine_of
from abliterate.prompts.sources import Prompt
from abliterate.run_stage import OpenStage, input_hash
from abliterate.selection.prompt_scores import (
    KeptScores,
    PromptScores,
    load_scores,
    save_scores,
)

# What the file says of how its scores were computed.
COMPUTED = ("dtype", "device", "attention")


class ScoresFile:
    """``RUN/scores.safetensors``.

    Args:
        stage: the selection under way.
        path: the file.
        extraction: the candidates.
        prompts: the validation prompts, by kind.
        scored_on: what scores depend on beside the model, its settings and where KL is measured.

    Attributes:
        table: what is known; filled in by the search.
    """

    def __init__(
        self,
        stage: OpenStage,
        path: Path,
        extraction: Extraction,
        prompts: Mapping[str, Sequence[Prompt]],
        scored_on: Mapping[str, Any],
    ) -> None:
        self._session, self._is_main, self._path = stage.session, stage.ranks.is_main, path
        self._inputs = input_hash(stage.session, scored_on)
        self._kl_on = stage.session.settings.select.kl_on
        sizes = len(prompts["harmful"]), len(prompts["harmless"])
        empty = PromptScores.empty(extraction.directions, *sizes)
        self.found: KeptScores = stage.ranks.run_on_main(
            lambda: load_scores(path, empty, self._inputs, self._kl_on)
        )
        self.table = self.found.scores or empty

    def say_what_is_kept(self) -> None:
        """One line on what is computed again, and one on what is not."""
        if self.found.problem is not None:
            again = ": all is computed again" if self.found.scores is None else ""
            log.info("%s %s%s", self._path, self.found.problem, again)
        if self.found.scores is not None and self.table.n_touched:
            log.info("going on from the %d candidates of %s", self.table.n_touched, self._path)

    def save(self, table: PromptScores) -> None:
        if self._is_main:
            save_scores(
                self._path, table, self._inputs, self._kl_on, self.offload(), self._computed()
            )

    def _computed(self) -> dict[str, str]:
        """How the model computes: whoever does not open it records that of the scores."""
        held = self._session.how_computed()
        return {name: held[name] for name in COMPUTED if isinstance(held.get(name), str)}

    def take_computed(self) -> None:
        """All scores are kept ones: the session has computed as they were computed."""
        kept = {name: text for name, text in self.found.computed.items() if name in COMPUTED}
        self._session.computed.update(kept)
        if "dtype" in kept:
            self._session.compare_dtype(kept["dtype"])

    def compare_dtype(self) -> None:
        """Say so where kept scores were computed in another dtype than the ones to come."""
        before, now = self.found.computed.get("dtype"), self._session.how_computed().get("dtype")
        if None not in (before, now) and before != now and self.table.n_touched:
            log.warning(
                "the scores that %s holds were computed in %s, the others will be in %s: remove "
                "the file to have all computed alike",
                self._path,
                before,
                now,
            )

    def offload(self) -> Any:
        """How the model was streamed, now or when the scores were made."""
        if "loaded" in self._session.__dict__:
            return engine_of(self._session.loaded).summary()
        return self.found.offload
