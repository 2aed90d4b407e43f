"""A text classifier as a local judge: the share of answers that get one of its labels.

Any checkpoint that transformers loads for sequence classification serves: one that was trained to
tell refusals from answers, or harmful answers from others. What its label means is the
checkpoint's own affair, so its verdicts stand apart from the refusal phrases and from ``safe``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from abliterate.checkpoints.checkpoint import Checkpoint, find_checkpoint
from abliterate.console import log, progress_bar
from abliterate.errors import CheckpointError, UsageError
from abliterate.evaluation.completion import Completion, Labelled
from abliterate.evaluation.completions import CompletionFile
from abliterate.settings import Settings
from abliterate.storage.artifacts import hash_json

# Rows of one length in a batch, where nobody says how many.
_ROWS = 32
# Labels that are shown in an error.
_SHOWN = 12
# Words that say what a label of interest means, and those that turn them round.
_TELLING = frozenset(
    (
        *("refusal", "refusals", "refuse", "refused", "refuses", "rejection", "reject", "rejected"),
        *("decline", "declined", "unsafe", "harmful", "toxic", "toxicity"),
    )
)
_NEGATED = frozenset(("no", "not", "non", "none", "never"))
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


@dataclass(frozen=True)
class Classifier:
    """A checkpoint, and the label of it that counts.

    Attributes:
        spec: as ``--classifier`` gave it.
        checkpoint: its files.
        labels: all that it has, by index.
        index: of the label that counts.
        problem: how its logits are read: ``single_label``, or ``multi_label`` (each for itself).
        paired: it reads prompt and answer as two texts, not the answer alone.
        device: as for a model.
        dtype: as for a model.
        batch_size: answers per batch, or ``auto``.
        trust_remote_code: run the checkpoint's own code.
    """

    spec: str
    checkpoint: Checkpoint
    labels: tuple[str, ...]
    index: int
    problem: str
    paired: bool
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | str = "auto"
    trust_remote_code: bool = False

    @property
    def label(self) -> str:
        return self.labels[self.index]

    def summary(self) -> dict[str, Any]:
        """What records say of it; verdicts of classifiers with the same summary are the same."""
        return {
            "model": self.checkpoint.name,
            "identity": self._identity,
            "label": self.label,
            "index": self.index,
            "labels": list(self.labels),
            "problem": self.problem,
            "input": "pair" if self.paired else "answer",
        }

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return {key: value for key, value in self.checkpoint.identity().items() if key != "id"}

    @cached_property
    def key(self) -> str:
        """The hash of what a verdict depends on; its files are read for it, once."""
        return hash_json(self.summary())

    def classify(
        self, items: Sequence[tuple[str, str]], report: Callable[[int, Labelled], None]
    ) -> None:
        """Label ``(prompt, answer)`` pairs; ``report`` gets each one's index and verdict.

        Raises:
            CheckpointError: it cannot be loaded.
        """
        if not items:
            return
        from abliterate.inference.token_batches import parse_batch_size
        from abliterate.models.loading import load_tokenizer, load_weights

        tokenizer = load_tokenizer(self.checkpoint, self.trust_remote_code)
        model = load_weights(
            self.checkpoint, self.device, self.dtype, self.trust_remote_code, classifies=True
        )
        limit = _longest_input(model, tokenizer)
        log.info(
            "classifier %s: label %s, from %s, up to %d tokens",
            self.checkpoint.name,
            self.label,
            "prompt and answer" if self.paired else "the answer alone",
            limit,
        )
        inputs = [_encode(tokenizer, item, self.paired, limit) for item in items]
        rows_held = model.get_input_embeddings().num_embeddings
        if max(token for one, _ in inputs for token in one["input_ids"]) >= rows_held:
            raise CheckpointError(
                f"--classifier {self.spec}: its tokenizer has more tokens than the model's "
                f"embedding has rows ({rows_held}): they do not belong together"
            )
        rows = parse_batch_size(self.batch_size) or _ROWS
        # Several rows need a token that pads, whatever their lengths, where the last one decides.
        if getattr(model.config, "pad_token_id", None) is None:
            rows = 1
        for batch in _batches([len(one["input_ids"]) for one, _ in inputs], rows):
            self._run(model, batch, inputs, report)

    def _run(
        self,
        model: Any,
        batch: Sequence[int],
        inputs: Sequence[tuple[Mapping[str, list[int]], bool]],
        report: Callable[[int, Labelled], None],
    ) -> None:
        """Label a batch of rows of one length, or its halves where memory runs out."""
        import torch

        from abliterate.inference.token_batches import attempt

        found: list[list[float]] = []

        def forward() -> None:
            tensors = {
                name: torch.tensor([inputs[row][0][name] for row in batch], device=model.device)
                for name in inputs[batch[0]][0]
            }
            with torch.inference_mode():
                logits = model(**tensors).logits.float().cpu()
            if not logits.isfinite().all():
                raise CheckpointError(
                    f"--classifier {self.spec} gives no finite numbers: try --dtype float32"
                )
            single = self.problem == "single_label"
            found.extend((logits.softmax(-1) if single else logits.sigmoid()).tolist())

        if not attempt(forward):
            if len(batch) == 1:
                raise UsageError(
                    f"--classifier {self.spec}: one answer does not fit into memory: use --device"
                )
            half = len(batch) // 2
            for part in (batch[:half], batch[half:]):
                self._run(model, part, inputs, report)
            return
        for row, shares in zip(batch, found, strict=True):
            share = shares[self.index]
            hit = share == max(shares) if self.problem == "single_label" else share > 0.5
            report(row, Labelled(hit, round(share, 4), inputs[row][1], self.key))


def _encode(
    tokenizer: Any, item: tuple[str, str], paired: bool, limit: int
) -> tuple[dict[str, list[int]], bool]:
    """The model's inputs, and whether they had to be cut.

    What the texts spell is text: no ``[SEP]`` of an answer ends it.
    """
    texts = item if paired else item[1:]
    plain = {"split_special_tokens": True, "verbose": False}
    found = tokenizer(*texts, **plain)
    cut = len(found["input_ids"]) > limit
    if cut:
        found = tokenizer(*texts, **plain, truncation="longest_first", max_length=limit)
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: list(found[name]) for name in names if name in found}, cut


def _longest_input(model: Any, tokenizer: Any) -> int:
    """The most tokens that model and tokenizer take."""
    from torch.nn import Embedding

    longest = int(min(tokenizer.model_max_length, 1 << 20))
    places = getattr(model.config, "max_position_embeddings", None)
    if isinstance(places, int) and places > 0:
        # RoBERTa and its kin count positions from behind the padding's.
        offsets = [
            module.padding_idx + 1
            for module in model.modules()
            if isinstance(module, Embedding)
            and module.num_embeddings == places
            and module.padding_idx is not None
        ]
        longest = min(longest, places - max(offsets, default=0))
    return max(longest, 1)


def _batches(lengths: Sequence[int], rows: int) -> Iterator[list[int]]:
    """Rows of one length each, so that no padding changes a verdict; the shortest first."""
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    for _, group in groupby(order, key=lambda row: lengths[row]):
        same = list(group)
        for start in range(0, len(same), rows):
            yield same[start : start + rows]


def classify_files(classifier: Classifier, files: Sequence[CompletionFile]) -> None:
    """Label every answer that this classifier has not labelled yet; each is written as it comes."""
    todo = [(file, c) for file in files for c in file.completions if _wanted(c)]
    if not todo:
        return

    def keep(row: int, verdict: Labelled) -> None:
        file, completion = todo[row]
        file.put(replace(completion, labelled=verdict))

    with ExitStack() as stack:
        for file in {id(file): file for file, _ in todo}.values():
            stack.enter_context(file.writing())
        _classify(classifier, [completion for _, completion in todo], keep)


def classified(
    classifier: Classifier, completions: Sequence[Completion], known: Sequence[Mapping[str, Any]]
) -> list[Completion]:
    """The completions with their labels; ``known`` lines of an earlier run are not asked again."""
    held = {
        (line.get("prompt"), line.get("response")): verdict
        for line in known
        if (verdict := Labelled.of(line.get("classifier"))) and verdict.by == classifier.key
    }
    found = [replace(c, labelled=held.get((c.prompt, c.response))) for c in completions]
    todo = [row for row, completion in enumerate(found) if _wanted(completion)]

    def keep(place: int, verdict: Labelled) -> None:
        found[todo[place]] = replace(found[todo[place]], labelled=verdict)

    _classify(classifier, [found[row] for row in todo], keep)
    return found


def _wanted(completion: Completion) -> bool:
    """Whether there is an answer without a label: a thought that has not ended is none."""
    return completion.labelled is None and completion.refused is not None


def _classify(
    classifier: Classifier, todo: Sequence[Completion], keep: Callable[[int, Labelled], None]
) -> None:
    cut = 0
    with progress_bar("classifier", len(todo)) as bar:

        def report(row: int, verdict: Labelled) -> None:
            nonlocal cut
            keep(row, verdict)
            cut += verdict.truncated
            bar.update(1)

        classifier.classify([(c.prompt, c.answer) for c in todo], report)
    if cut:
        log.warning(
            "classifier: %d of %d answers are longer than it reads, and were cut", cut, len(todo)
        )


def find_classifier(settings: Settings) -> Classifier | None:
    """The classifier that the settings name, its label found; or None.

    Raises:
        UsageError: the label is none of its labels, or none is named and none is plain; or pairs
            are asked for, and its tokenizer makes none.
        CheckpointError: there is no such checkpoint, or it is no classifier.
    """
    spec, model = settings.evaluate.classifier, settings.model
    if spec is None:
        if settings.evaluate.classifier_input != "auto":
            raise UsageError("--classifier-input needs --classifier")
        return None
    name, asked = _cut_label(spec)
    checkpoint = find_checkpoint(name)
    from abliterate.models.loading import load_config

    config = load_config(checkpoint, model.trust_remote_code)
    _check_task(checkpoint, config)
    names = getattr(config, "id2label", None) or {}
    labels = tuple(str(names.get(n, f"LABEL_{n}")) for n in range(config.num_labels))
    several = config.problem_type == "multi_label_classification" or len(labels) == 1
    return Classifier(
        spec,
        checkpoint,
        labels,
        _find_label(labels, asked, name),
        "multi_label" if several else "single_label",
        _takes_pairs(checkpoint, settings.evaluate.classifier_input, model.trust_remote_code),
        model.device,
        model.dtype,
        model.batch_size,
        model.trust_remote_code,
    )


def _cut_label(spec: str) -> tuple[str, str | None]:
    """``MODEL[:LABEL]``; a folder whose name has a colon stays whole, and so may a label."""
    if Path(spec).expanduser().exists():
        return spec, None
    colons = [match.start() for match in re.finditer(":", spec)]
    there = [at for at in colons if Path(spec[:at]).expanduser().is_dir()]
    at = max(there, default=min(colons, default=-1))
    if at < 0:
        return spec, None
    if not spec[at + 1 :].strip():
        raise UsageError(f"--classifier {spec}: no label follows the colon")
    return spec[:at], spec[at + 1 :].strip()


def _check_task(checkpoint: Checkpoint, config: Any) -> None:
    """Refuse what is no classifier: its head would be random numbers."""
    made_for = [str(one) for one in getattr(config, "architectures", None) or ()]
    if made_for and not any("SequenceClassification" in one for one in made_for):
        raise CheckpointError(
            f"--classifier {checkpoint.name}: {made_for[0]} is no text classifier: give a "
            "checkpoint for sequence classification"
        )
    if config.problem_type == "regression":
        raise CheckpointError(
            f"--classifier {checkpoint.name} gives a number (problem_type regression), no labels: "
            "give a classifier"
        )


def _takes_pairs(checkpoint: Checkpoint, asked: str, trust_remote_code: bool) -> bool:
    """Whether prompt and answer go in as a pair: two texts that its tokenizer tells apart."""
    from abliterate.models.loading import load_tokenizer

    count = load_tokenizer(checkpoint, trust_remote_code).num_special_tokens_to_add
    makes_pairs = bool(count(pair=True) > count(pair=False))
    if asked == "pair" and not makes_pairs:
        raise UsageError(
            f"--classifier-input pair: the tokenizer of {checkpoint.name} sets nothing "
            "between two texts: use answer"
        )
    return makes_pairs and asked != "answer"


def _find_label(labels: Sequence[str], asked: str | None, name: str) -> int:
    shown = ", ".join(f"'{label}'" for label in labels[:_SHOWN])
    shown += f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else ""
    if asked is not None:
        for same in (str, str.casefold):
            found = [n for n, label in enumerate(labels) if same(label) == same(asked)]
            if len(found) == 1:
                return found[0]
        if asked.isascii() and asked.isdecimal() and len(asked) < 10 and int(asked) < len(labels):
            return int(asked)
        raise UsageError(f"--classifier {name} has no label '{asked}' (it has: {shown})")
    telling = [n for n, label in enumerate(labels) if _tells(label)]
    if len(telling) == 1:
        return telling[0]
    raise UsageError(
        f"--classifier {name} has the labels {shown}: name the one that counts, as "
        f"--classifier {name}:{labels[-1]}"
    )


def _tells(label: str) -> bool:
    """Whether a label's name says refusal or unsafe, and not its opposite."""
    words = {word.lower() for word in _WORD.findall(label)}
    return bool(words & _TELLING) and not words & _NEGATED
