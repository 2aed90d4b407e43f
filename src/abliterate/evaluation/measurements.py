"""What an evaluation measures, row by row, and what of it is known already.

Whatever costs time is kept as it is made, under a hash of what it depends on: completions and
verdicts line by line, the other figures in ``completions/measured.json``. An interrupted evaluation
goes on from there, and one with a further judge, corpus or task computes that alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from abliterate.direction import Direction
from abliterate.evaluation.asked_prompts import AskedPrompts, row_key
from abliterate.evaluation.changes import change_of
from abliterate.evaluation.compare import (
    complete,
    metrics_of,
)
from abliterate.evaluation.completion import Completion, token_counter
from abliterate.evaluation.completions import CompletionFile
from abliterate.evaluation.controls import CONTROLLED, are_controls, count_of
from abliterate.evaluation.controls import measure as measure_controls
from abliterate.evaluation.first_tokens import Answering, FirstTokenLogits
from abliterate.evaluation.inputs import EvaluationInputs
from abliterate.evaluation.kept_figures import (
    MEASURED,
    Memo,
    are_tasks,
    are_tokens,
    are_values,
    as_float,
    is_loss,
    values_of,
)
from abliterate.evaluation.lm_eval_tasks import Tasks, run_tasks
from abliterate.evaluation.losses import Loss, measure_loss
from abliterate.evaluation.outcomes import Metrics, Outcome
from abliterate.evaluation.prompt_kinds import BORDERLINE, KINDS
from abliterate.evaluation.served_answers import Dialect, complete_served
from abliterate.evaluation.served_prompts import ends_configured
from abliterate.evaluation.servers import Server
from abliterate.extraction.refusal_token_search import (
    DETECT_PROMPTS,
    named_refusal_tokens,
    refusal_tokens_shown,
)
from abliterate.inference.control_directions import activations_at
from abliterate.inference.engine import Change, OnFirstLogits
from abliterate.inference.generation import ends_of_turn
from abliterate.inference.in_memory import engine_of
from abliterate.inference.thinks_first import or_thinks_first
from abliterate.inference.thoughts import AnswerLimits
from abliterate.models.loading import LoadedModel, load_config
from abliterate.prompts.corpora import Corpus, Example
from abliterate.run_folder import COMPLETIONS, Session, token_records


@dataclass
class Measurements:
    """What has been measured of each row; models are loaded on demand.

    Attributes:
        session: the model that is intervened on.
        inputs: what is asked.
        tasks: lm-eval's, if any.
        out: the folder whose ``completions/`` keeps what is made, or None.
        files: completions, by row and kind of prompts.
        losses: by row and corpus.
        figures: lm-eval's, by row and task.
        metrics: from the logits, by row.
        controls: what directions that mean nothing do, by row.
    """

    session: Session
    inputs: EvaluationInputs
    tasks: Tasks | None
    out: Path | None
    files: dict[tuple[str, str], CompletionFile] = field(default_factory=dict)
    losses: dict[str, dict[str, Loss]] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, Metrics] = field(default_factory=dict)
    controls: dict[str, Any] = field(default_factory=dict)
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
        values = self.memo.get(
            self._metrics_key(name), lambda: values_of(self._measure(name)), are_values
        )
        held = {figure: tuple(map(as_float, column)) for figure, column in values.items()}
        self.metrics[name] = Metrics(**held, seed=self.session.settings.model.seed)
        _ = self.asked.ended
        if name in CONTROLLED and self.n_controls:
            self.controls[name] = self._controls(name)
        self.losses[name] = {corpus: self._loss(name, corpus) for corpus in self.corpora}
        self.figures[name] = {}
        if (tasks := self.tasks) is not None:
            key = {"tasks": tasks.summary(), "folder": self.inputs.tasks_hash}
            self.figures[name] = self.memo.get(
                self._key(name, "tasks", key), lambda: self._run_tasks(name, tasks), are_tasks
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
        if settings.stop_at_verdict:  # which answers are cut hangs on what a refusal is
            key["stop_at_verdict"] = self.inputs.phrases.summary()
        file = CompletionFile(
            path,
            prompts,
            self._key(name, "completions", key),
            self.inputs.judge_key,
            self.inputs.phrases,
            token_counter(lambda: self.session.tokenizer),
            None if self.inputs.classifier is None else self.inputs.classifier.key,
            self.inputs.second_judge_key,
        )
        file.adopt(ranks.broadcast(file.completions))
        if len(file.completions) < len(prompts) and (server := self.inputs.servers.get(name)):
            self._ask_server(server, file, (name, kind))
        elif len(file.completions) < len(prompts):
            subject, change = self._subject(name)
            complete(
                subject,
                self.asked.ids[kind],
                file,
                change=change,
                max_new_tokens=settings.max_new_tokens,
                batch_size=self._batch_size,
                label=(name, kind),
                chat=self.session.chat,
                begun=self.session.thinking.begun,
                stop_at_verdict=settings.stop_at_verdict,
                on_first=self._taking(name, kind),
            )
        self.files[name, kind] = file
        return file

    def _taking(self, name: str, kind: str) -> OnFirstLogits | None:
        """What takes the logits that a row's answers start from, if a figure is made of them."""
        if self.asked.starts_elsewhere or self.memo.has(self._metrics_key(name), are_values):
            return None
        return self.logits.taking(name, kind)

    def _ask_server(self, server: Server, file: CompletionFile, label: tuple[str, str]) -> None:
        """Have a server answer what the model here would be asked; no model is loaded."""
        session, chat = self.session, self.session.chat
        settings, ids = session.settings, self.asked.ids[label[1]]
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
            self.session.settings.model.seed,
            self.inputs.sets,
            self.asked.scored_prompts,
        )

    def _made(self, name: str, kind: str) -> tuple[Completion, ...] | None:
        if not self.generates(name):
            return None
        completions = self.files[name, kind].completions
        if self.inputs.judge is None:
            completions = _unjudged(completions)
        if self.inputs.second_judge is None:
            completions = tuple(replace(c, second=None) for c in completions)
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
    def memo(self) -> Memo:
        ranks = self.session.placement.ranks
        kept = self.out is not None and ranks.is_main
        memo = Memo(self.out / COMPLETIONS / MEASURED if self.out and kept else None)
        memo.known = ranks.broadcast(memo.known)
        return memo

    @cached_property
    def asked(self) -> AskedPrompts:
        """The prompts as token ids."""
        return AskedPrompts(self.session, self.inputs, self.memo)

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
                asked = self.asked.scored_ids
                with or_thinks_first(base, self.session.chat, asked["harmful"]):
                    tokens = refusal_tokens_shown(harmful, harmless, base.tokenizer, asked)
            return token_records(base.tokenizer, tokens)

        key = self._key("baseline", "refusal", self.asked.key)
        tokens: list[dict[str, Any]] = self.memo.get(key, find, are_tokens)
        return tokens

    @cached_property
    def logits(self) -> FirstTokenLogits:
        """Last-token logits of the rows."""
        inputs = self.inputs

        def load(name: str) -> LoadedModel:
            return self._subject(name)[0] if name in inputs.edited else self.session.loaded

        rows = [name for name in inputs.rows if name not in inputs.edited]
        session, settings = self.session, self.session.settings.evaluate
        answering = None
        if session.opener.generates and not self.asked.starts_elsewhere:
            begun = session.thinking.begun
            answering = Answering(session.chat, settings.max_new_tokens, begun)
        return FirstTokenLogits(
            load, rows, inputs.direction, self.asked.scored_ids, self._batch_size, answering
        )

    @property
    def _batch_size(self) -> int | str:
        return self.session.settings.model.batch_size

    def _measure(self, name: str) -> Metrics:
        tokens = [token["id"] for token in self.refusal_tokens]
        seed = self.session.settings.model.seed
        baseline = self.baseline  # before another model takes the base's place
        seen = self.logits.of(name)
        self.logits.forget(name)
        checkpoint = self.inputs.edited.get(name, self.session.checkpoint)
        return metrics_of(
            seen["harmful"], seen["harmless"], baseline, tokens, checkpoint.name, seed
        )

    @cached_property
    def n_controls(self) -> int:
        """How many controls of each random family rows are compared with."""
        return count_of(self.session, self.inputs.direction)

    @cached_property
    def _control_activations(self) -> tuple[Tensor, int, int]:
        direction = self.inputs.direction
        assert isinstance(direction, Direction)
        base, harmless = self.session.loaded, self.asked.scored_ids["harmless"]
        return activations_at(base, harmless, direction.layer, direction.position, self._batch_size)

    def _controls(self, name: str) -> dict[str, Any]:
        inputs, direction, count = self.inputs, self.inputs.direction, self.n_controls
        assert isinstance(direction, Direction)
        seed = self.session.settings.model.seed

        def find() -> dict[str, Any]:
            activations, layer, position = self._control_activations
            found = measure_controls(
                self.session.loaded,
                name,
                direction,
                inputs.other_layers,
                activations,
                count,
                seed,
                self.asked.scored_ids,
                self.baseline,
                [token["id"] for token in self.refusal_tokens],
                self.metrics[name],
                self._batch_size,
            )
            of = {"n_prompts": len(activations), "layer": layer, "position": position}
            return {"controls": found, "activations": of}

        key = self.asked.key | {"count": count, "seed": seed, "others": inputs.others_key}
        held: dict[str, Any] = self.memo.get(self._key(name, "controls", key), find, are_controls)
        return held

    def _loss(self, name: str, corpus: str) -> Loss:
        settings = self.session.settings.evaluate
        texts = self.corpora[corpus]
        if texts is None:  # the model's own baseline completions, harmless prompts
            answers = self.complete("baseline", "harmless").completions
            examples = tuple(Example(c.response, c.prompt) for c in answers if c.response)
            texts = self.corpora[corpus] = Corpus(corpus, "baseline completions", examples)
        chosen = texts

        def find() -> dict[str, Any]:
            subject, change = self._subject(name)
            measured = measure_loss(
                subject,
                chosen,
                change=change,
                chat=self.session.chat,
                max_tokens=settings.corpus_tokens,
                batch_size=self._batch_size,
                description=f"evaluate: {name}, loss on {corpus}",
            )
            return {"sums": list(measured.sums), "counts": list(measured.counts)}

        key = {"corpus": chosen.summary(), "tokens": settings.corpus_tokens}
        held = self.memo.get(self._key(name, "losses", key), find, is_loss)
        return Loss(tuple(map(as_float, held["sums"])), tuple(held["counts"]))

    def _run_tasks(self, name: str, tasks: Tasks) -> dict[str, Any]:
        subject, change = self._subject(name)
        seed = self.session.settings.model.seed
        return dict(run_tasks(subject, tasks, self._batch_size, seed, change))

    def _metrics_key(self, name: str) -> str:
        return self._key(name, "metrics", self.asked.key | {"figures": "by prompt"})

    def _key(self, name: str, what: str, more: Mapping[str, Any]) -> str:
        return row_key(self.session, self.inputs, name, what, more)

    def _subject(self, name: str) -> tuple[LoadedModel, Change]:
        """The model of a row and its intervention; one checkpoint at a time beside the base."""
        edited = self.inputs.edited
        if name not in edited:
            return self.session.loaded, change_of(name, self.inputs.direction)
        if name not in self._loaded:
            _ = self.asked.ids, self.baseline  # the base's share, before it goes
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
