"""How far the completions of a file are: what is left, what a bar or the log shows of it."""

from __future__ import annotations

import time

from abliterate.console import bars_hidden, log
from abliterate.evaluation.completion import scored
from abliterate.evaluation.completions import CompletionFile
from abliterate.metrics.answers import Parts

# Seconds between two lines of progress where no bar is shown.
_EVERY = 60.0


class CompletionProgress:
    """Puts answers into a file as they come, and counts them.

    Attributes:
        description: what is completed.
        done: rows that have their completions from an earlier run.
        left: the others.
    """

    def __init__(self, file: CompletionFile, label: tuple[str, str]) -> None:
        """
        Args:
            file: what gets the completions.
            label: intervention and kind.
        """
        self._file, self._prompts = file, list(file.prompts.values())
        rows = range(len(self._prompts))
        self.description = f"evaluate: {label[0]}, {label[1]}"
        self.done = [row for row in rows if file.done(self._prompts[row].text)]
        self.left = [row for row in rows if not file.done(self._prompts[row].text)]
        self._refused = sum(bool(completion.refused) for completion in file.completions)
        self._unfinished = sum(completion.refused is None for completion in file.completions)
        self._count, self._spoke = len(self.done), time.monotonic()
        if self.done and self.left:
            log.info(
                "%s: %d of %d completions are there already",
                self.description,
                len(self.done),
                len(self._prompts),
            )

    def put(self, row: int, text: str, parts: Parts) -> str:
        """Keep one answer; returns what a bar says."""
        file = self._file
        completion = scored(self._prompts[row], text, file.phrases, parts, file.count_tokens)
        file.put(completion)
        self._refused += bool(completion.refused)
        self._unfinished += completion.refused is None
        self._count += 1
        note = self._refused_of(self._count)
        if bars_hidden() and time.monotonic() - self._spoke > _EVERY:
            self._spoke = time.monotonic()
            log.info("%s: %s (%d prompts)", self.description, note, len(self._prompts))
        return note

    def _refused_of(self, count: int) -> str:
        apart = f", {self._unfinished} unfinished" if self._unfinished else ""
        return f"{self._refused} of {count - self._unfinished} refused{apart}"

    def finish(self) -> None:
        """Say how many refused, and of how many the thought has not ended."""
        log.info("%s: %s", self.description, self._refused_of(len(self._prompts)))
