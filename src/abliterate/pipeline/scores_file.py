"""The scores by prompt that a selection leaves for the next one in the same run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abliterate.console import log
from abliterate.extraction.means import Extraction
from abliterate.inference.in_memory import engine_of
from abliterate.prompts.sources import Prompt
from abliterate.run_stage import OpenStage, input_hash
from abliterate.selection.prompt_scores import (
    KeptScores,
    PromptScores,
    load_scores,
    save_scores,
)


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
            save_scores(self._path, table, self._inputs, self._kl_on, self.offload())

    def offload(self) -> Any:
        """How the model was streamed, now or when the scores were made."""
        if "loaded" in self._session.__dict__:
            return engine_of(self._session.loaded).summary()
        return self.found.offload
