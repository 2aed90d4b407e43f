"""What an evaluation is asked, read and checked before hours are spent on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from abliterate.console import log
from abliterate.direction import Direction
from abliterate.direction_set import DirectionSet
from abliterate.errors import InputError, UsageError
from abliterate.evaluation.changes import check_intervention
from abliterate.evaluation.classifier import Classifier, find_classifier
from abliterate.evaluation.intervention_names import CHECKPOINT, INTERVENTIONS, check_name
from abliterate.evaluation.judges import Judge, find_judge, find_second_judge
from abliterate.evaluation.prompt_kinds import BORDERLINE
from abliterate.evaluation.servers import Server, find_servers
from abliterate.extraction.other_layers import other_layers
from abliterate.inference.direction_fit import check_fit
from abliterate.metrics.intervals import share_methods
from abliterate.metrics.refusal_phrases import RefusalPhrases, parse_phrases
from abliterate.models.loading import Checkpoint, load_config
from abliterate.models.model_classes import text_config
from abliterate.prompts.corpora import Corpus, parse_corpora, read_corpus
from abliterate.prompts.sampling import load_prompts
from abliterate.prompts.sources import Prompt, is_contrast
from abliterate.run_folder import DIRECTIONS, EXTRACT, Session, prompt_keys
from abliterate.run_records import read_extract, read_used, used_prompts, used_refusal_tokens
from abliterate.storage.artifacts import hash_file, hash_json, is_plain_name


@dataclass(frozen=True)
class EvaluationInputs:
    """What is compared, and on what.

    Attributes:
        direction: what is ablated or added.
        edited: further checkpoints, by the name of their row.
        rows: names of interventions and checkpoints, in order.
        prompts: the test prompts, by kind.
        named_tokens: the refusal tokens that settings or run folder name; none are detected.
        corpora: by name; None is the model's own baseline completions.
        tasks_dir: folder of further lm-eval tasks.
        tasks_hash: of its files.
        judge: who judges completions.
        phrases: what counts as a refusal.
        classifier: what labels answers.
        servers: who answers instead of a model here, by the name of the row.
        used: keys of the prompts that the run has used, by kind; None without a run folder.
        other_layers: candidates of other layers that the direction is compared with.
        sets: where a kind of prompts has several sources, the keys of each one's prompts.
        second_judge: who judges completions beside the judge.
    """

    direction: Direction | DirectionSet | None
    edited: Mapping[str, Checkpoint]
    rows: Sequence[str]
    prompts: Mapping[str, tuple[Prompt, ...]]
    named_tokens: Sequence[str]
    corpora: Mapping[str, Corpus | None]
    tasks_dir: Path | None
    tasks_hash: str | None
    judge: Judge | None
    phrases: RefusalPhrases
    classifier: Classifier | None = None
    servers: Mapping[str, Server] = field(default_factory=dict)
    used: Mapping[str, Sequence[str]] | None = None
    other_layers: Mapping[int, Tensor] = field(default_factory=dict)
    sets: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    second_judge: Judge | None = None

    @property
    def here(self) -> list[str]:
        """The rows that a model here answers, and that are scored by its logits."""
        return [name for name in self.rows if name not in self.servers]

    @property
    def others_key(self) -> str | None:
        """The hash of the candidates of other layers, if there are any."""
        others = {str(layer): vector.tolist() for layer, vector in self.other_layers.items()}
        return hash_json(others) if others else None

    @property
    def judge_key(self) -> str | None:
        """The hash of what a verdict depends on."""
        return None if self.judge is None else hash_json(self.judge.summary())

    @property
    def second_judge_key(self) -> str | None:
        """The same, of the second judge."""
        return None if self.second_judge is None else hash_json(self.second_judge.summary())

    def summary(self, session: Session) -> dict[str, Any]:
        """What the record depends on beside the model."""
        return {
            "settings": session.settings.evaluate.model_dump(),
            "prompts": prompt_keys(self.prompts, keep_text=True),
            "direction": self.direction and self.direction.key,
            "rows": self.rows,
            "edited": {  # by what they hold, wherever they lie
                name: {key: value for key, value in other.identity().items() if key != "id"}
                for name, other in self.edited.items()
            },
            "refusal_tokens": self.named_tokens,
            "judge": self.judge and self.judge.summary(),
            "classifier": self.classifier and self.classifier.summary(),
            "corpora": [corpus.summary() for corpus in self.corpora.values() if corpus],
            "tasks_dir": self.tasks_hash,
            "intervals": share_methods(),
            "other_layers": self.others_key,
            **({"second_judge": two.summary()} if (two := self.second_judge) else {}),
            **self.served(),
        }

    def served(self) -> dict[str, Any]:
        """What records say of the servers, if there are any."""
        if not self.servers:
            return {}
        return {"servers": {name: server.summary() for name, server in self.servers.items()}}


def read_inputs(
    session: Session,
    direction: Direction | DirectionSet | None,
    rows: Sequence[str],
    edited: Mapping[str, Checkpoint],
    run: Path | None,
) -> EvaluationInputs:
    """All that an evaluation depends on, without loading a model.

    Args:
        session: the model that is intervened on.
        direction: what to ablate or add.
        rows: from :func:`order_rows`.
        edited: further checkpoints, by the name of their row.
        run: the run folder whose prompts are never used again and whose refusal tokens count.

    Raises:
        UsageError: judge, corpus or task is named wrongly.
        InputError: prompts or a corpus cannot be used, or a checkpoint is no edit of the model.
    """
    settings, seed = session.settings.evaluate, session.settings.model.seed
    _check_vocabulary(session, edited)
    check_fit(session.checkpoint, direction, session.settings.model.trust_remote_code)
    # All that can be wrong with the options shows before anything is fetched.
    servers = find_servers(session.settings, rows, edited)
    raters = check_options(session, all(row in servers for row in rows))
    phrases = parse_phrases(settings.refusal_phrases, settings.refusal_phrase)
    corpora = {
        name: None
        if name == "own"
        else read_corpus(name, source, settings.corpus_texts, seed, session.commits)
        for name, source in parse_corpora(settings.corpus).items()
    }
    tasks_dir = None if settings.tasks_dir is None else Path(settings.tasks_dir)
    main = session.placement.ranks.run_on_main
    records = main(lambda: [] if run is None else read_used(run))
    prompts, sets = _test_prompts(session, records)
    return EvaluationInputs(
        direction=direction,
        edited=edited,
        rows=rows,
        prompts=prompts,
        named_tokens=session.settings.extract.refusal_tokens or used_refusal_tokens(records),
        corpora=corpora,
        tasks_dir=tasks_dir,
        tasks_hash=_folder_hash(tasks_dir),
        judge=raters.judge,
        second_judge=raters.second_judge,
        phrases=phrases,
        classifier=raters.classifier,
        servers=servers,
        used=None if run is None else used_prompts(records),
        sets=sets,
        other_layers=main(lambda: _other_layers(run, direction, settings.controls)),
    )


def _other_layers(
    run: Path | None, direction: Direction | DirectionSet | None, count: int
) -> dict[int, Tensor]:
    """Candidates that one direction is compared with; a set has one in each layer itself."""
    if (
        run is None
        or not isinstance(direction, Direction)
        or not count
        or not (run / EXTRACT).exists()
    ):
        return {}
    return other_layers(run / DIRECTIONS, read_extract(run), direction, count)


def _test_prompts(
    session: Session, records: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, tuple[Prompt, ...]], dict[str, dict[str, list[str]]]]:
    """Prompts that no stage of the run has used, and each source's where there are several."""
    settings = session.settings.evaluate
    used = used_prompts(records)
    prompts, sets = session.draw_test(settings.n_test, used)
    if settings.borderline is not None:
        keys = {key for used_of_kind in used.values() for key in used_of_kind}
        prompts[BORDERLINE] = borderline_prompts(session, settings.borderline, keys)
    return {kind: tuple(chosen) for kind, chosen in prompts.items()}, sets


def borderline_prompts(session: Session, source: str, used: Collection[str] = ()) -> list[Prompt]:
    """Harmless prompts that look harmful, without the harmful ones that a source sets beside.

    Args:
        session: how many, and the seed.
        source: where they come from.
        used: keys of prompts that stages of the run have used.

    Raises:
        InputError: the source is unusable or has too few prompts left.
    """
    left_out = 0

    def leave_out(prompt: Prompt) -> bool:
        nonlocal left_out
        left_out += is_contrast(prompt)
        return is_contrast(prompt)

    harmful = session.settings.evaluate.harmful or (session.settings.extract.harmful,)
    for one in harmful:
        session.warn_of_kinds({"harmful": one, BORDERLINE: source})
    n, seed = session.settings.evaluate.n_test, session.settings.model.seed
    chosen = load_prompts(
        source, "test", n, seed, used, "--n-test", leave_out, commits=session.commits
    )
    if left_out:
        log.info("--borderline %s: %d harmful prompts of it are left out", source, left_out)
    return chosen


@dataclass(frozen=True)
class Raters:
    """Who rates answers beside the refusal phrases."""

    judge: Judge | None
    second_judge: Judge | None
    classifier: Classifier | None


def check_options(session: Session, elsewhere: bool = False) -> Raters:
    """Find what is wrong with the settings of an evaluation before any model is loaded.

    Args:
        session: model and settings.
        elsewhere: servers answer all rows, so that the model is not opened here.

    Returns:
        The judges and the classifier that they name.

    Raises:
        UsageError: they contradict each other, or the model, or name what there is not.
        CheckpointError: there is no such judge or classifier.
    """
    settings = session.settings.evaluate
    given = {
        "--judge": settings.judge,
        "--classifier": settings.classifier,
        "--tasks": settings.tasks,
    }
    if session.placement.ranks.size > 1 and settings.server:
        raise UsageError(
            "--server does not run on several ranks: run evaluate with it in one process "
            "(--concurrency sets how many requests it makes at once)"
        )
    if session.placement.ranks.size > 1 and any(given.values()):
        raise UsageError(
            f"{next(name for name, value in given.items() if value)} does not run on several "
            "ranks: leave it out, then run evaluate with it in one process, which finds the "
            "completions done"
        )
    from_logits = {"--corpus": settings.corpus, "--tasks": settings.tasks}
    if settings.server and any(from_logits.values()):
        option = next(name for name, value in from_logits.items() if value)
        raise UsageError(
            f"{option} is measured from logits, which a --server does not give: leave one of the "
            "two out"
        )
    whole = {
        "--judge": settings.judge,
        "--judge-url": settings.judge_url,
        "--second-judge": settings.second_judge,
        "--second-judge-url": settings.second_judge_url,
        "--classifier": settings.classifier,
        "--server": settings.server,
    }
    if settings.stop_at_verdict and any(whole.values()):
        raise UsageError(
            f"--stop-at-verdict cuts answers at their refusal, and "
            f"{next(name for name, value in whole.items() if value)} takes whole ones: leave one "
            "of the two out"
        )
    if not elsewhere:
        _check_engine(session)
    parse_corpora(settings.corpus)
    parse_phrases(settings.refusal_phrases, settings.refusal_phrase)
    further = settings.tasks_dir is not None or settings.task_limit is not None
    if settings.tasks is None and further:
        raise UsageError("--tasks-dir and --task-limit need --tasks")
    judge = find_judge(session.settings)
    second = find_second_judge(session.settings, judge)
    return Raters(judge, second, find_classifier(session.settings))


def _check_engine(session: Session) -> None:
    """Refuse what the model will not give, the way it will be opened."""
    settings = session.settings.evaluate
    given = {
        "--borderline": settings.borderline,
        "--stop-at-verdict": settings.stop_at_verdict,
        "--classifier": settings.classifier,
        "--judge": settings.judge,
        "--judge-url": settings.judge_url,
        "--corpus": settings.corpus,
        "--tasks": settings.tasks,
    }
    asked = next((option for option, value in given.items() if value), None)
    if asked:
        session.opener.require_in_memory(asked)


def order_rows(
    interventions: Sequence[str],
    edited: Mapping[str, Checkpoint],
    direction: Direction | DirectionSet | None,
) -> list[str]:
    """The names of the rows, each once, checked.

    Raises:
        UsageError: an unknown intervention, one that lacks its direction, or a name taken twice.
    """
    rows: list[str] = []
    for name in interventions:
        check_name(name, direction, edited)
    for name in interventions if CHECKPOINT in interventions else [*interventions, CHECKPOINT]:
        if name == CHECKPOINT:
            rows += edited
        else:
            check_intervention(name, direction)
            rows.append(name)
    for name in edited:
        if not is_plain_name(name):
            raise UsageError(f"--checkpoint {name!r}: the name becomes a file's, give a plain one")
        if name in (*INTERVENTIONS, CHECKPOINT):
            raise UsageError(f"--checkpoint {name}: that is an intervention's name, give another")
    return list(dict.fromkeys(rows))


def _check_vocabulary(session: Session, edited: Mapping[str, Checkpoint]) -> None:
    """Refuse a checkpoint that is no edit of the model: their distributions cannot be compared."""
    trust = session.settings.model.trust_remote_code

    def size(checkpoint: Checkpoint) -> int | None:
        return getattr(text_config(load_config(checkpoint, trust)), "vocab_size", None)

    for name, other in edited.items():
        edited_size, base_size = size(other), size(session.checkpoint)
        if edited_size != base_size:
            raise InputError(
                f"--checkpoint {name} has a vocabulary of {edited_size}, "
                f"{session.checkpoint.name} one of {base_size}: give a checkpoint made from that "
                "model"
            )


def _folder_hash(folder: Path | None) -> str | None:
    """The hash of the files of a folder of task definitions, data that lies with them included."""
    if folder is None or not folder.is_dir():
        return None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hash_json({str(path.relative_to(folder)): hash_file(path) for path in files})
