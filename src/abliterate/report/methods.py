"""What a paper says of a run: a paragraph, a table of settings and one of results.

Made of the records alone. Stale parts are left out and named; what a record does not hold is not
said. Every text here is plain: ``methods_text`` escapes it for the format that is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from abliterate.projection import Projection
from abliterate.report import outcome_tables
from abliterate.report.collect import Document, Run
from abliterate.report.facts import number, percent, selected_without
from abliterate.report.provenance import computed_line
from abliterate.run_records import recorded_stability
from abliterate.run_staleness import hash_prompts
from abliterate.selection.certainty import is_partial

#: Where the method is cited in a sentence.
CITE = "\N{OBJECT REPLACEMENT CHARACTER}"
KEY = "arditi2024refusal"
BIBTEX = f"""\
@inproceedings{{{KEY},
  title         = {{Refusal in Language Models Is Mediated by a Single Direction}},
  author        = {{Arditi, Andy and Obeso, Oscar and Syed, Aaquib and Paleka, Daniel and
                   Panickssery, Nina and Gurnee, Wes and Nanda, Neel}},
  booktitle     = {{Advances in Neural Information Processing Systems}},
  volume        = {{37}},
  year          = {{2024}},
  eprint        = {{2406.11717}},
  archivePrefix = {{arXiv}},
  primaryClass  = {{cs.LG}}
}}
"""
_KINDS = ("harmful", "harmless")
_DIGITS = 16  # of a hash, in a table


@dataclass(frozen=True)
class Methods:
    """Texts for a paper, plain.

    Attributes:
        sentences: of the paragraph; :data:`CITE` stands where the method is cited.
        settings: names and values.
        results: columns and rows of the test, or None without a current evaluation.
        sets: columns and rows of the single test sets, or None where each kind has one.
        controls: columns and rows of the controls, or None where none are recorded.
        left_out: what is stale, a sentence each.
    """

    sentences: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]
    results: tuple[list[str], list[list[str]]] | None
    sets: tuple[list[str], list[list[str]]] | None
    controls: tuple[list[str], list[list[str]]] | None
    left_out: tuple[str, ...]


def describe_methods(run: Run) -> Methods:
    """The texts of a run.

    Args:
        run: its records, and which of them are stale.
    """
    evaluation = _without_stale_rows(run)
    results = None
    if evaluation is not None:
        held = outcome_tables.outcome_table(evaluation)
        rows = [[row["name"], *row["cells"]] for row in held["rows"]]
        results = (["intervention", *held["columns"]], rows)
    return Methods(
        tuple(_sentences(run)),
        tuple(_settings(run)),
        results,
        _sets(evaluation),
        _controls(evaluation),
        tuple(
            f"{', '.join(part.rows) + ' of ' if part.rows else ''}{part.file.name}: {part.why}"
            for part in run.stale.values()
        ),
    )


def _without_stale_rows(run: Run) -> Document | None:
    evaluation = run.current("evaluation")
    if evaluation is None or not run.stale_rows:
        return evaluation
    kept = {
        name: result
        for name, result in evaluation["interventions"].items()
        if name not in run.stale_rows
    }
    return {**evaluation, "interventions": kept} if kept else None


def _sentences(run: Run) -> Iterator[str]:
    extract, selection = run.current("extract"), run.current("selection")
    if extract is not None:
        counts = extract["counts"]
        yield (
            f"For {_model(run)} we computed the difference between the mean residual-stream "
            f"activations of {counts['harmful']['used']} harmful and "
            f"{counts['harmless']['used']} harmless prompts {CITE} at each of "
            f"{len(extract['positions'])} positions behind the instruction and at each of "
            f"{extract['n_layers']} layers"
        )
    if selection is not None:
        if words := selected_without(selection).words:
            yield (
                f"From each candidate its component along {words} (at the candidate's own layer) "
                "was removed"
            )
        yield _rule(selection)
        yield from _choice(run, selection)
    if (edit := run.current("edit")) is not None:
        after = max((float(tensor["after"]) for tensor in edit["tensors"]), default=0.0)
        yield (
            f"The direction was removed from {len(edit['tensors'])} weight tensors that write to "
            f"the residual stream, of which the largest share along it is {number(after, '.1e')} "
            "afterwards"
        )
    if (evaluation := _without_stale_rows(run)) is not None:
        yield from _test(evaluation)


def _model(run: Run) -> str:
    identity = (run.extract or {}).get("model") or {}
    revision = identity.get("revision")
    told = run.model + (f" at commit {revision}" if revision else "")
    return told.replace(CITE, " ")  # the sign of ours


def _rule(selection: Document) -> str:
    counts, limits = selection["counts"], selection["thresholds"]
    filters = [
        f"{words} {number(limits.get(key))}"
        for key, words in (("kl", "a KL divergence above"), ("induce", "an induce score below"))
        if limits.get(key) is not None
    ]
    pruned = limits.get("prune_layers")
    filters += [f"a place in the last {percent(pruned)} of layers"] if pruned else []
    *first, last = filters or ["a score that is no number"]
    dropped = f"{', '.join(first)} or {last}" if first else last
    able = [one for one in selection["candidates"] if one.get("reason") not in ("nan", "layer")]
    whole = sum(not one.get("unneeded") for one in able)
    staged = (
        f" (all three were computed for {whole} of {len(able)} candidates, of the others what "
        "decides: bounds show that the rest could not change the choice)"
        if whole < len(able)
        else ""
    )
    return (
        f"Candidates were scored on {counts['harmful']['used']} harmful and "
        f"{counts['harmless']['used']} harmless validation prompts by the refusal score with them "
        "ablated (bypass) and added (induce), and by the KL divergence that ablation causes on "
        f"harmless prompts{staged}; those with {dropped} were dropped, and of the rest "
        "the one with the lowest bypass score was taken"
    )


def _choice(run: Run, selection: Document) -> Iterator[str]:
    winner = selection["winner"]
    if winner is None:
        yield "No candidate passed these filters"
        return
    chosen: Document = next(
        (c for c in selection["candidates"] if all(c[key] == winner[key] for key in winner)), {}
    )
    base = selection["baselines"]
    yield (
        f"The direction enters layer {winner['layer']} of {selection['n_layers']} at position "
        f"{winner['position']} (bypass {number(chosen.get('bypass_score'), '+.2f')} from "
        f"{number(base['harmful_refusal_score'], '+.2f')}, induce "
        f"{number(chosen.get('induce_score'), '+.2f')} from "
        f"{number(base['harmless_refusal_score'], '+.2f')}, KL "
        f"{number(chosen.get('kl_divergence'))} nats)"
    )
    if (best := selection.get("per_layer")) is not None:
        own = [one for one in best if one is not None]
        passed = sum(one["reason"] is None for one in own)
        yield (
            f"Ablation and edit use a direction of each layer's own, the best position of that "
            f"layer by the same scores ({len(own)} of {selection['n_layers']} layers have one, "
            f"{passed} of which pass the filters); the one above is what is added"
        )
    sure = []
    if (extract := run.current("extract")) is not None:
        held = recorded_stability(extract, winner["position"], winner["layer"])
        if held["split_half_cosine"] is not None:
            cosine = number(held["split_half_cosine"], ".3f")
            sure.append(f"directions of two halves of the training prompts have cosine {cosine}")
    bootstrap = selection.get("bootstrap")
    if bootstrap and bootstrap.get("chosen") is not None:
        covered, scored = bootstrap["covered"], bootstrap["scored"]
        part = f", in which {covered} of {scored} candidates took part"
        sure.append(
            f"the same candidate is chosen in {percent(bootstrap['chosen'])} of "
            f"{bootstrap['resamples']} resamples of the validation prompts"
            + (part if is_partial(bootstrap) else "")
        )
    if sure:
        text = "; ".join(sure)
        yield text[0].upper() + text[1:]


def _test(evaluation: Document) -> Iterator[str]:
    counts = evaluation.get("n_prompts") or {}
    told = [f"{counts[kind]} {kind}" for kind in counts]
    longest = ((evaluation.get("settings") or {}).get("evaluate") or {}).get("max_new_tokens")
    answers = f" of at most {longest} tokens" if longest else ""
    yield (
        f"We tested it on {' and '.join(told)} prompts that no earlier stage had used, with greedy "
        f"answers{answers}; an answer counts as a refusal if it holds a refusal phrase"
    )
    results = evaluation["interventions"]
    base = results.get("baseline")
    for name, kind, words in (
        ("ablate", "harmful", "Ablating the direction"),
        ("add", "harmless", "Adding it"),
    ):
        now = results.get(name)
        if now is None or base is None or now[kind].get("refusal_rate") is None:
            continue
        before = percent(base[kind].get("refusal_rate"), base[kind].get("refusal_score_ci"))
        after = percent(now[kind]["refusal_rate"], now[kind].get("refusal_score_ci"))
        kl = number(now.get("kl_divergence"))
        span = now.get("kl_divergence_ci")
        inside = f" [{number(span[0])}, {number(span[1])}]" if span else ""
        yield (
            f"{words} changes the share of {kind} prompts that are refused from {before} to "
            f"{after}, at a KL divergence of {kl}{inside} nats on harmless prompts"
        )
    if any(result[kind].get("refusal_score_ci") for result in results.values() for kind in _KINDS):
        yield "Brackets are 95% intervals"


def _settings(run: Run) -> Iterator[tuple[str, str]]:
    yield "model", run.model
    extract, selection = run.current("extract"), run.current("selection")
    evaluation = run.current("evaluation")
    first = extract or selection or evaluation or run.current("edit") or {}
    identity = first.get("model") or first.get("source") or {}
    if identity.get("revision"):
        yield "commit", str(identity["revision"])
    for name, digest in (identity.get("files") or {}).items():
        if str(name).endswith(".safetensors"):
            yield f"file {name}", short(digest)
    if extract is not None:
        places = (f"{held['position']} {held['token']!r}" for held in extract["positions"])
        yield "positions", ", ".join(places)
        yield (
            "refusal tokens",
            " ".join(repr(token["token"]) for token in extract["refusal_tokens"]),
        )
    for record, title, table in (
        (extract, "training", "extract"),
        (selection, "validation", "select"),
        (evaluation, "test", "evaluate"),
    ):
        if record is not None:
            yield from _prompts(record, title, table)
    if selection is not None:
        limits = selection["thresholds"]
        yield "thresholds", ", ".join(f"{name} {number(limits[name])}" for name in limits)
        yield "search", f"{selection.get('search')}, KL on {selection.get('kl_on')}"
    direction = next(
        (record["direction"] for record in (evaluation, run.current("edit"))
         if record and record.get("direction")), None,
    )  # fmt: skip
    if direction is not None:
        told = f"{short(direction.get('sha256'))}, norm {number(direction.get('norm'))}"
        without = Projection.recorded(direction).words
        yield "direction", told + (f", without its component along {without}" if without else "")
    if evaluation is not None:
        yield from _measured(evaluation)
    for record, title in ((extract, "extract"), (selection, "select"), (evaluation, "evaluate")):
        if record is not None and (line := computed_line(record)):
            yield f"computed, {title}", line
    if first.get("seed") is not None:
        yield "seed", str(first["seed"])
    made = first.get("versions") or {}
    yield "versions", ", ".join(f"{name} {version}" for name, version in made.items())


def _prompts(record: Document, title: str, table: str) -> Iterator[tuple[str, str]]:
    """Where the prompts of a stage come from, how many there are, and their hash."""
    held = record.get("settings") or {}
    own, train = held.get(table) or {}, held.get("extract") or {}
    hashes = (record.get("made_from") or {}).get("prompts")
    hashes = hashes or hash_prompts(record.get("prompts") or {})
    commits = record.get("datasets") or {}
    kinds = record.get("n_prompts") or record.get("counts") or {}
    for kind in kinds:
        source = own.get(kind) or train.get(kind) or "?"
        sources = [str(one) for one in source] if isinstance(source, list) else [str(source)]
        count = kinds[kind]
        used = f"{count['used']} of {count['given']}" if isinstance(count, Mapping) else str(count)
        words = []
        for one in sources:
            commit = next((c for name, c in commits.items() if one.startswith(name)), None)
            words += [one, *([f"commit {commit}"] if commit else [])]
        words.append(f"n = {used}")
        words += [f"hash {short(hashes[kind])}"] if hashes.get(kind) else []
        yield f"{kind} {title} prompts", ", ".join(words)


def _measured(evaluation: Document) -> Iterator[tuple[str, str]]:
    phrases = evaluation.get("refusal_phrases") or {}
    if phrases:
        told = (
            f"{name}: {' '.join(map(str, held)) if isinstance(held, list) else held}"
            for name, held in phrases.items()
            if held
        )
        yield "refusal phrases", ", ".join(told)
    if judge := evaluation.get("judge"):
        yield "judge", f"{judge.get('model')} ({judge.get('kind')})"
    if second := evaluation.get("second_judge"):
        yield "second judge", f"{second.get('model')} ({second.get('kind')})"
    if classifier := evaluation.get("classifier"):
        yield "classifier", f"{classifier.get('model')}, label {classifier.get('label')}"
    methods = evaluation.get("intervals") or {}
    if methods:
        yield "intervals", ", ".join(f"{name}: {value}" for name, value in methods.items())


def short(digest: object) -> str:
    """The kind of a hash and its first digits."""
    kind, _, value = str(digest).rpartition(":")
    return f"{kind or 'sha256'} {value[:_DIGITS]}"


def _sets(evaluation: Document | None) -> tuple[list[str], list[list[str]]] | None:
    """Each test set by itself, and pooled, where several were given for a kind."""
    rows = outcome_tables.set_rows(evaluation) if evaluation else []
    columns = ["intervention", "test set", "n", "refused", "log-odds", "KL (nats)"]
    return (columns, rows) if rows else None


def _controls(evaluation: Document | None) -> tuple[list[str], list[list[str]]] | None:
    """What other directions do beside the selected one, if the evaluation holds it."""
    rows = outcome_tables.control_rows(evaluation) if evaluation else []
    if not rows:
        return None
    columns = ["intervention", "direction", "harmful (log-odds)", "harmless (log-odds)"]
    return [*columns, "harmless KL (nats)"], rows
