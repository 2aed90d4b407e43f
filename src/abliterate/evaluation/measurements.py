"""What an evaluation measures, row by row, and what of it is known already.

Whatever costs time is kept as it is made, under a hash of what it depends on: completions and
verdicts line by line, the other figures in ``completions/measured.json``. An interrupted evaluation
goes on from there, and one with a further judge, corpus or task computes that alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from abliterate.evaluation.compare import (
    BORDERLINE,
    KINDS,
    Metrics,
    Outcome,
    ask_prompts,
    change_of,
    complete,
    metrics_of,
)
from abliterate.evaluation.completions import Completion, CompletionFile, token_counter
from abliterate.evaluation.first_tokens import FirstTokenLogits
from abliterate.evaluation.inputs import EvaluationInputs
from abliterate.evaluation.lm_eval_tasks import Tasks, run_tasks
from abliterate.evaluation.losses import measure_loss
from abliterate.evaluation.served_answers import Dialect, complete_served
from abliterate.evaluation.served_prompts import ends_configured
from abliterate.evaluation.servers import Server
from abliterate.extraction.means import (
    DETECT_PROMPTS,
    named_refusal_tokens,
    refusal_tokens_shown,
)
from abliterate.inference.engine import Change
from abliterate.inference.generation import ends_of_turn
from abliterate.inference.in_memory import engine_of
from abliterate.inference.thinks_first import or_thinks_first
from abliterate.inference.thoughts import AnswerLimits
from abliterate.models.loading import LoadedModel, load_config
from abliterate.prompts.chat_template import encode
from abliterate.prompts.corpora import Corpus, Example
from abliterate.run_folder import COMPLETIONS, Session, prompt_keys, token_records
from abliterate.run_stage import input_hash
from abliterate.storage.artifacts import write_json
from abliterate.storage.guarded_files import make_folder
from abliterate.storage.json_text import parse_json
from abliterate.storage.ownership import is_mapping_of

MEASURED = "measured.json"


@dataclass
class Measurements:
    """What has been measured of each row; models are loaded on demand.

    Attributes:
        session: the model that is intervened on.
        inputs: what is asked.
        tasks: lm-eval's, if any.
        out: the folder whose ``completions/`` keeps what is made, or None.
        files: completions, by row and kind of prompts.
        losses: by row and corpus, as records hold them.
        figures: lm-eval's, by row and task.
        metrics: from the logits, by row.
    """

    session: Session
    inputs: EvaluationInputs
    tasks: Tasks | None
    out: Path | None
    files: dict[tuple[str, str], CompletionFile] = field(default_factory=dict)
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, Metrics] = field(default_factory=dict)
    _loaded: dict[str, LoadedModel] = field(default_factory=dict)
    _dialects: dict[str, Dialect] = field(default_factory=dict)

    def run(self, name: str) -> None:
        """Complete, measure and benchmark one row."""
        if name not in self.inputs.edited and name not in self.inputs.servers:
            _ = self.refusal_tokens  # where none is found, that is told before answers are made
        for kind in self.inputs.prompts if self.generates(name) else ():
            self.complete(name, kind)
        if name in self.inputs.servers:  # all else is measured from logits
            self.losses[name], self.figures[name] = {}, {}
            return
        key = self._prompts_key | {"intervals": "bootstrap"}
        metrics = self.memo.get(
            self._key(name, "metrics", key), lambda: asdict(self._measure(name)), _are_metrics
        )
        self.metrics[name] = Metrics(**metrics)
        _ = self.scored
        self.losses[name] = {corpus: self._loss(name, corpus) for corpus in self.corpora}
        self.figures[name] = {}
        if (tasks := self.tasks) is not None:
            key = {"tasks": tasks.summary(), "folder": self.inputs.tasks_hash}
            self.figures[name] = self.memo.get(
                self._key(name, "tasks", key), lambda: self._run_tasks(name, tasks), _are_tasks
            )

    def complete(self, name: str, kind: str) -> CompletionFile:
        """The completions of one row on one kind of prompts."""
        if (name, kind) in self.files:
            return self.files[name, kind]
        settings = self.session.settings.evaluate
        prompts = self.inputs.prompts[kind]
        path, ranks = None, self.session.placement.ranks
        if self.out is not None and ranks.is_main:
            path = self.out / COMPLETIONS / f"{name}-{kind}.jsonl"
        key = {"prompts": [p.text for p in prompts], "max_new_tokens": settings.max_new_tokens}
        file = CompletionFile(
            path,
            prompts,
            self._key(name, "completions", key),
            self.inputs.judge_key,
            self.inputs.phrases,
            token_counter(lambda: self.session.tokenizer),
            None if self.inputs.classifier is None else self.inputs.classifier.key,
        )
        file.adopt(ranks.broadcast(file.completions))
        if len(file.completions) < len(prompts) and (server := self.inputs.servers.get(name)):
            self._ask_server(server, file, (name, kind))
        elif len(file.completions) < len(prompts):
            subject, change = self._subject(name)
            complete(
                subject,
                self.ids[kind],
                file,
                change=change,
                max_new_tokens=settings.max_new_tokens,
                batch_size=self._batch_size,
                label=(name, kind),
                chat=self.session.chat,
                begun=self.session.thinking.begun,
            )
        self.files[name, kind] = file
        return file

    def _ask_server(self, server: Server, file: CompletionFile, label: tuple[str, str]) -> None:
        """Have a server answer what the model here would be asked; no model is loaded."""
        session, chat = self.session, self.session.chat
        settings, ids = session.settings, self.ids[label[1]]
        trust, tokenizer = settings.model.trust_remote_code, session.tokenizer
        subject = self.inputs.edited.get(label[0], session.checkpoint)
        config = load_config(subject, trust)
        limits = AnswerLimits.without_model(
            tokenizer, config, chat, ids, settings.evaluate.max_new_tokens, session.thinking.begun
        )
        stops = ends_of_turn(tokenizer, ends_configured(subject, config), chat)
        dialect = self._dialects.setdefault(label[0], Dialect())
        seed = settings.model.seed
        complete_served(server, ids, file, limits, stops, seed, label, dialect, chat)

    def generates(self, name: str) -> bool:
        """Whether answers of a row are made."""
        return name in self.inputs.servers or self.session.opener.generates

    def outcome(self, name: str) -> Outcome:
        """All that is known of one row; verdicts only if a judge was asked this time."""
        harmful, harmless = (self._made(name, kind) for kind in KINDS)
        borderline = self._made(name, BORDERLINE) if BORDERLINE in self.inputs.prompts else None
        return Outcome(
            harmful,
            harmless,
            self.metrics.get(name),
            self.losses[name],
            self.figures[name],
            borderline,
        )

    def _made(self, name: str, kind: str) -> tuple[Completion, ...] | None:
        if not self.generates(name):
            return None
        completions = self.files[name, kind].completions
        if self.inputs.judge is None:
            completions = _unjudged(completions)
        if self.inputs.classifier is None:
            completions = tuple(replace(c, labelled=None) for c in completions)
        return completions

    @property
    def readings(self) -> dict[str, dict[str, int]] | None:
        """What the passes that read all weights took, by rows; None where a pass does not."""
        if not self.inputs.here or not self.session.opener.reads_weights_every_pass:
            return None
        return self.logits.readings

    @cached_property
    def memo(self) -> _Memo:
        ranks = self.session.placement.ranks
        kept = self.out is not None and ranks.is_main
        memo = _Memo(self.out / COMPLETIONS / MEASURED if self.out and kept else None)
        memo.known = ranks.broadcast(memo.known)
        return memo

    @cached_property
    def ids(self) -> dict[str, list[list[int]]]:
        tokenizer, chat = self.session.tokenizer, self.session.chat
        return {
            kind: encode(tokenizer, [prompt.text for prompt in chosen], chat)
            for kind, chosen in self.inputs.prompts.items()
        }

    @cached_property
    def scored_ids(self) -> dict[str, list[list[int]]]:
        """As ``ids``, up to where the answer begins: what first tokens are scored on."""
        base, chat, prompts = self.session.loaded, self.session.chat, self.inputs.prompts
        if self.session.thinking.mode != "skip":
            return self.ids
        return {
            kind: ask_prompts(base, prompts[kind], chat, self._batch_size, kind) for kind in KINDS
        }

    @property
    def scored(self) -> dict[str, int] | None:
        """Of how many prompts first tokens were scored, where a thought came before; else None."""
        if self.session.thinking.mode != "skip" or not self.inputs.here:
            return None
        key = self._key("baseline", "scored", self._prompts_key)

        def find() -> dict[str, int]:
            return {kind: len(rows) for kind, rows in self.scored_ids.items()}

        counts: dict[str, int] = self.memo.get(key, find, _are_counts)
        return counts

    @cached_property
    def corpora(self) -> dict[str, Corpus | None]:
        """The corpora that were asked for; the model's own answers once they are there."""
        return dict(self.inputs.corpora)

    @cached_property
    def baseline(self) -> Tensor:
        """Last-token logits of the unmodified model on harmless prompts."""
        return self.logits.of("baseline", ["harmless"])["harmless"]

    @cached_property
    def refusal_tokens(self) -> list[dict[str, Any]]:
        """The first tokens that count as refusing; none where no row is scored by them."""
        if not self.inputs.here:
            return []

        def find() -> list[dict[str, Any]]:
            base, names = self.session.loaded, self.inputs.named_tokens
            if names:
                tokens = named_refusal_tokens(base, names)
            else:
                first_prompts = self.logits.of("baseline", KINDS, DETECT_PROMPTS)
                harmful, harmless = (first_prompts[kind] for kind in KINDS)
                asked = self.scored_ids
                with or_thinks_first(base, self.session.chat, asked["harmful"]):
                    tokens = refusal_tokens_shown(harmful, harmless, base.tokenizer, asked)
            return token_records(base.tokenizer, tokens)

        key = self._key("baseline", "refusal", self._prompts_key)
        tokens: list[dict[str, Any]] = self.memo.get(key, find, _are_tokens)
        return tokens

    @cached_property
    def logits(self) -> FirstTokenLogits:
        """Last-token logits of the rows."""
        inputs = self.inputs

        def load(name: str) -> LoadedModel:
            return self._subject(name)[0] if name in inputs.edited else self.session.loaded

        rows = [name for name in inputs.rows if name not in inputs.edited]
        return FirstTokenLogits(load, rows, inputs.direction, self.scored_ids, self._batch_size)

    @property
    def _batch_size(self) -> int | str:
        return self.session.settings.model.batch_size

    def _measure(self, name: str) -> Metrics:
        tokens = [token["id"] for token in self.refusal_tokens]
        seed = self.session.settings.model.seed
        baseline = self.baseline  # before another model takes the base's place
        seen = self.logits.of(name)
        checkpoint = self.inputs.edited.get(name, self.session.checkpoint)
        return metrics_of(
            seen["harmful"], seen["harmless"], baseline, tokens, checkpoint.name, seed
        )

    def _loss(self, name: str, corpus: str) -> dict[str, Any]:
        settings = self.session.settings.evaluate
        texts = self.corpora[corpus]
        if texts is None:  # the model's own baseline completions, harmless prompts
            answers = self.complete("baseline", "harmless").completions
            examples = tuple(Example(c.response, c.prompt) for c in answers if c.response)
            texts = self.corpora[corpus] = Corpus(corpus, "baseline completions", examples)
        chosen = texts

        def find() -> dict[str, Any]:
            subject, change = self._subject(name)
            return measure_loss(
                subject,
                chosen,
                change=change,
                chat=self.session.chat,
                max_tokens=settings.corpus_tokens,
                batch_size=self._batch_size,
                description=f"evaluate: {name}, loss on {corpus}",
            ).summary()

        key = {"corpus": chosen.summary(), "tokens": settings.corpus_tokens}
        loss: dict[str, Any] = self.memo.get(self._key(name, "loss", key), find, _is_loss)
        return loss

    def _run_tasks(self, name: str, tasks: Tasks) -> dict[str, Any]:
        subject, change = self._subject(name)
        seed = self.session.settings.model.seed
        return dict(run_tasks(subject, tasks, self._batch_size, seed, change))

    @property
    def _prompts_key(self) -> dict[str, Any]:
        """What refusal tokens, and all that counts them, depend on."""
        of_metrics = {kind: self.inputs.prompts[kind] for kind in KINDS}
        prompts = prompt_keys(of_metrics, keep_text=True)
        return {"prompts": prompts, "tokens": self.inputs.named_tokens}

    def _key(self, name: str, what: str, more: Mapping[str, Any]) -> str:
        """The hash of all that a figure of a row depends on."""
        edited, direction = self.inputs.edited, self.inputs.direction
        subject: Any = {
            "intervention": name,
            "direction": None if name == "baseline" else direction and direction.sha256,
        }
        if name in edited:
            subject = {"checkpoint": edited[name].identity()}
        if name in self.inputs.servers:
            subject["server"] = self.inputs.servers[name].summary()
        return input_hash(self.session, {"subject": subject, "what": what, "more": more})

    def _subject(self, name: str) -> tuple[LoadedModel, Change]:
        """The model of a row and its intervention; one checkpoint at a time beside the base."""
        edited = self.inputs.edited
        if name not in edited:
            return self.session.loaded, change_of(name, self.inputs.direction)
        if name not in self._loaded:
            _ = self.ids, self.baseline  # the base's share, before it goes
            self.release()
            self._loaded[name] = self.session.load(edited[name])
        return self._loaded[name], None

    def release(self) -> None:
        """Let go of all models."""
        for loaded in self._loaded.values():
            engine_of(loaded).close()
        self._loaded.clear()
        self.session.release()


def _unjudged(completions: Sequence[Completion]) -> tuple[Completion, ...]:
    return tuple(replace(c, safe=None, judge=None, judge_error=None) for c in completions)


def _is_hash(key: str, figure: Any) -> bool:
    return len(key) == 64 and set(key) <= set("0123456789abcdef")


is_memo = is_mapping_of(_is_hash)


def _is_number(value: Any) -> bool:
    """As records have them: null for what is not finite."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and abs(value) <= sys.float_info.max)


def _are_metrics(figure: Any) -> bool:
    if not isinstance(figure, dict) or set(figure) != {one.name for one in fields(Metrics)}:
        return False
    return all(
        isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))
        if name.endswith("_ci")
        else _is_number(value)
        for name, value in figure.items()
    )


def _are_counts(figure: Any) -> bool:
    counts = isinstance(figure, dict) and set(figure) == set(KINDS)
    return counts and all(type(count) is int and count >= 0 for count in figure.values())


def _is_loss(figure: Any) -> bool:
    keys = {"loss", "perplexity", "n_tokens", "n_texts"}
    return (
        isinstance(figure, dict) and set(figure) == keys and all(map(_is_number, figure.values()))
    )


def _are_tasks(figure: Any) -> bool:
    return isinstance(figure, dict) and all(
        isinstance(one, dict) and all(map(_is_number, one.values())) for one in figure.values()
    )


def _are_tokens(figure: Any) -> bool:
    return (
        isinstance(figure, list)
        and bool(figure)
        and all(
            isinstance(one, dict)
            and set(one) == {"id", "token"}
            and type(one["id"]) is int
            and 0 <= one["id"] < 2**31
            and isinstance(one["token"], str)
            for one in figure
        )
    )


class _Memo:
    """Figures by the hash of what they depend on, kept in a file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        if path is not None:
            try:
                document = parse_json(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                document = None
            self.known = document if isinstance(document, dict) else {}

    def get(self, key: str, find: Callable[[], Any], good: Callable[[Any], bool]) -> Any:
        """The figure, found now if it is not known, or what is kept is not ``good``."""
        if key not in self.known or not good(self.known[key]):
            self.known[key] = find()
            if self.path is not None:
                make_folder(self.path.parent)
                write_json(self.path, self.known)
        return self.known[key]
