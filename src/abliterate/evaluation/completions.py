"""Completions: one line of JSON each, streamed to a file that an interrupted run goes on with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from abliterate.console import log
from abliterate.evaluation.completion import (
    Completion,
    CountTokens,
    Labelled,
    SecondVerdict,
    scored,
    told_in,
)
from abliterate.metrics.answer_flaws import count_pieces
from abliterate.metrics.refusal_phrases import ALL, RefusalPhrases
from abliterate.prompts.sources import Prompt
from abliterate.storage.artifacts import write_atomically, write_json
from abliterate.storage.guarded_files import make_folder, naming, open_to_extend
from abliterate.storage.json_text import parse_json
from abliterate.storage.ownership import is_lines, is_mapping_of

MANIFEST = "manifest.json"


class CompletionFile:
    """The completions of one intervention on one kind of prompts, in memory and on disk.

    Lines are appended as answers end, in whatever order; a later line of the same prompt wins.
    :meth:`finish` puts them in the order of the prompts.
    """

    def __init__(
        self,
        path: Path | None,
        prompts: Sequence[Prompt],
        key: str,
        judge_key: str | None = None,
        phrases: RefusalPhrases = ALL,
        count_tokens: CountTokens = count_pieces,
        classifier_key: str | None = None,
        second_key: str | None = None,
    ) -> None:
        """Take over what an earlier run left, if it was made with the same ``key``.

        Args:
            path: the file, or None to keep completions in memory only.
            prompts: what is to be completed; each text once.
            key: hash of all that the answers depend on.
            judge_key: hash of the judge; verdicts of another one are dropped.
            phrases: what counts as a refusal.
            count_tokens: of a text, to say where a refusal begins.
            classifier_key: hash of the classifier; what another one said is dropped.
            second_key: hash of the second judge; verdicts of another one are dropped.
        """
        self._classifier_key, self._second_key = classifier_key, second_key
        self.path, self.phrases, self.count_tokens = path, phrases, count_tokens
        self.prompts = {prompt.text: prompt for prompt in prompts}
        self._kept: dict[str, Completion] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        make_folder(path.parent)
        manifest = _read_manifest(path.parent)
        made = manifest.get(path.name)
        made = made if isinstance(made, dict) else {}
        same = made.get("completions") == key
        verdicts = judge_key is None or made.get("judge") == judge_key
        if same:
            for line in read_lines(path):
                self._take(line, verdicts)
        # A judge that is not asked now keeps its verdicts.
        judged_by = judge_key or (made.get("judge") if same else None)
        manifest[path.name] = {"completions": key, "judge": judged_by}
        if not (same and verdicts) or self._has_other_seconds(path):
            keep_verdicts(path)
        if not same:
            path.unlink(missing_ok=True)
        write_json(path.parent / MANIFEST, manifest)
        if path.exists() and path.read_bytes() != self._content():
            self._write()  # torn or double lines, the order of finishing

    def _take(self, line: Mapping[str, Any], verdicts: bool) -> None:
        text, response = line.get("prompt"), line.get("response")
        prompt = self.prompts.get(text) if isinstance(text, str) else None
        if prompt is None or not isinstance(response, str):
            return
        held = scored(prompt, response, self.phrases, told_in(line), self.count_tokens)
        safe, judge = line.get("safe"), line.get("judge")
        if verdicts and isinstance(safe, bool):
            held = replace(held, safe=safe, judge=judge if isinstance(judge, str) else None)
        labelled = Labelled.of(line.get("classifier"))
        if labelled is not None and self._classifier_key in (None, labelled.by):
            held = replace(held, labelled=labelled)
        second = SecondVerdict.of(line.get("second_judge"))
        if second is not None and self._second_key in (None, second.by):
            held = replace(held, second=second)
        self._kept[prompt.text] = held

    def _has_other_seconds(self, path: Path) -> bool:
        """Whether the file holds verdicts of another second judge than the one asked now."""
        if self._second_key is None:
            return False
        seconds = (SecondVerdict.of(line.get("second_judge")) for line in read_lines(path))
        return any(one is not None and one.by != self._second_key for one in seconds)

    def adopt(self, completions: Sequence[Completion]) -> None:
        """Take over what another rank has read from the file."""
        self._kept = {completion.prompt: completion for completion in completions}

    def done(self, text: str) -> bool:
        """Whether the prompt ``text`` has its completion."""
        return text in self._kept

    @property
    def completions(self) -> tuple[Completion, ...]:
        """What there is so far, in the order of the prompts."""
        return tuple(self._kept[text] for text in self.prompts if text in self._kept)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within the context, :meth:`put` also appends to the file, whose lines are whole."""
        if self.path is None:
            yield
            return
        with open_to_extend(self.path) as self._file:
            try:
                yield
            finally:
                self._file = None
        self._write()

    def put(self, completion: Completion) -> None:
        """Keep a completion, in place of an earlier one of the same prompt."""
        self._kept[completion.prompt] = completion
        if self._file is not None:
            assert self.path is not None
            with naming(self.path):
                self._file.write(_line(completion).encode())
                self._file.flush()

    def _write(self) -> None:
        assert self.path is not None
        write_atomically(self.path, self._content())

    def _content(self) -> bytes:
        return "".join(map(_line, self.completions)).encode()


def _line(completion: Completion) -> str:
    return json.dumps(completion.record(), ensure_ascii=False) + "\n"


is_completions = is_lines("prompt", "category", "response", "refused")
is_manifest = is_mapping_of(lambda name, made: isinstance(made, dict) and "completions" in made)


def keep_verdicts(path: Path) -> None:
    """Before a file of completions is replaced: if it holds a judge's verdicts, keep a copy of it.

    The copy lies beside it, under a name made of its content: ``NAME.<hash>.jsonl``.
    """
    if not path.is_file() or not any(map(_has_verdict, read_lines(path))):
        return
    content = path.read_bytes()
    kept = path.with_name(f"{path.stem}.{sha256(content).hexdigest()[:8]}{path.suffix}")
    write_atomically(kept, content)
    log.info("verdicts that %s no longer holds are kept in %s", path, kept)


def _has_verdict(line: Mapping[str, Any]) -> bool:
    return (
        isinstance(line.get("safe"), bool) or SecondVerdict.of(line.get("second_judge")) is not None
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        document = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, without lines that a kill has torn; none if it is missing."""
    try:
        raw = path.read_bytes()
    except OSError:
        return []
    lines = []
    for line in raw.split(b"\n"):
        try:
            document = parse_json(line)
        except ValueError:
            continue
        if isinstance(document, dict):
            lines.append(document)
    return lines
