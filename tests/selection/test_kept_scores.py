"""What a selection has scored is not scored again, and what is left where no candidate passes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from abliterate.inference.batched_interventions import InterventionRunner
from abliterate.run_folder import Session
from abliterate.selection.candidate_filters import Score, Thresholds, apply_filters
from abliterate.selection.pareto_front import front_records
from abliterate.selection.prompt_scores import PromptScores
from abliterate.selection.search_inputs import CandidateGrid
from abliterate.selection.search_state import SearchState

METRICS = ("bypass_score", "induce_score", "kl_divergence")
SELECT = ("--no-filter", "--n-val", "9", "-q")
OPEN = ("--kl-threshold", "1e9", "--induce-threshold=-1e9")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    from abliterate.cli.app import main

    folder = tmp_path_factory.mktemp("kept") / "run"
    extract = ["extract", tiny("llama"), "-o", folder, "--no-filter", "--refusal-token", "I",
               "--n-train", "12", "--positions", "-3,-2,-1", "-q"]  # fmt: skip
    assert main([*map(str, extract)]) == 0
    return folder


@pytest.fixture(scope="module")
def exhaustive(run: Path, tmp_path_factory) -> dict:
    """Every score of the run, by another search in another folder."""
    from abliterate.cli.app import main

    folder = shutil.copytree(run, tmp_path_factory.mktemp("all") / "run")
    select = ["select", folder, *SELECT, *OPEN, "--search", "exhaustive"]
    assert main([*map(str, select)]) == 0
    return json.loads((folder / "selection.json").read_text())


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture
def work(monkeypatch) -> Callable[[], tuple[int, int]]:
    """How often a model was opened, and how many pairs of candidate and prompt were run, since this
    was last asked."""
    opened, pairs = 0, 0
    load, measure = Session.load, InterventionRunner.measure

    def counted_load(self, *args):
        nonlocal opened
        opened += 1
        return load(self, *args)

    def counted_measure(self, candidates, piece, metric):
        nonlocal pairs
        pairs += len(candidates) * len(piece.batch.rows)
        return measure(self, candidates, piece, metric)

    monkeypatch.setattr(Session, "load", counted_load)
    monkeypatch.setattr(InterventionRunner, "measure", counted_measure)

    def since() -> tuple[int, int]:
        nonlocal opened, pairs
        found = opened, pairs
        opened, pairs = 0, 0
        return found

    return since


def _finite(document: dict) -> list[dict]:
    return [c for c in document["candidates"] if c["bypass_score"] is not None]


def _same(one: dict, other: dict) -> None:
    assert one["winner"] == other["winner"]
    for mine, theirs in zip(one["candidates"], other["candidates"], strict=True):
        assert (mine["reason"], mine["kept"]) == (theirs["reason"], theirs["kept"])
        for metric in set(mine["computed"]) & set(theirs["computed"]):
            assert mine[metric] == pytest.approx(theirs[metric], abs=1e-5)


def test_nothing_passes_scores_the_front_and_its_advice_admits(
    folder: Path, exhaustive: dict, cli, work
) -> None:
    induce = max(c["induce_score"] for c in _finite(exhaustive)) + 0.5
    strict = ("--kl-threshold", "1e-6", f"--induce-threshold={induce}")
    result = cli("select", folder, *SELECT, *strict)
    assert result.code == 5
    record = json.loads((folder / "selection.json").read_text())
    assert record["winner"] is None
    # The front of the candidates that are not in the last layers, by comparing all with all.
    scored = [c for c in _finite(exhaustive) if c["layer"] < 3]

    def beats(one: dict, other: dict) -> bool:
        signs = (1, -1, 1)
        pairs = [(s * one[m], s * other[m]) for s, m in zip(signs, METRICS, strict=True)]
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    front = [c for c in scored if not any(beats(other, c) for other in scored)]
    front.sort(key=lambda c: c["bypass_score"])
    assert len(front) > 1
    assert [(c["position"], c["layer"]) for c in record["front"]] == [
        (c["position"], c["layer"]) for c in front
    ]
    for found, expected in zip(record["front"], front, strict=True):
        for metric in METRICS:
            assert found[metric] == pytest.approx(expected[metric], abs=1e-5)
        by = {miss["filter"]: miss["by"] for miss in found["fails"]}
        assert by["kl"] == pytest.approx(expected["kl_divergence"] - 1e-6, abs=1e-5)
        assert by["induce"] == pytest.approx(induce - expected["induce_score"], abs=1e-5)
        assert f"{found['kl_divergence']:.4f}" in result.err
    assert "at least" not in result.err
    assert "at most" not in result.err
    assert cli("report", folder).code == 0
    page = (folder / "report.html").read_text()
    assert "No other beats these" in page
    assert all(miss["option"] in page for row in record["front"] for miss in row["fails"])
    work()
    # What the line advises admits a candidate, without a model.
    advice = re.search(r"\((--[^)]*) admits it\)", result.err)
    assert advice, result.err
    admitted = cli("select", folder, *SELECT, *shlex.split(advice[1]), "--json")
    assert admitted.code == 0, admitted.err
    named = re.search(r"nearest: position (-\d+) layer (\d+)", result.err)
    kept = [(c["position"], c["layer"]) for c in admitted.json["candidates"] if c["kept"]]
    assert (int(named[1]), int(named[2])) in kept
    assert work()[0] == 0
    # And so does that of every row of the table.
    for row in record["front"]:
        options = [word for miss in row["fails"] for word in shlex.split(miss["option"])]
        again = cli("select", folder, *SELECT, *options, "--json").json
        assert any((c["position"], c["layer"]) == (row["position"], row["layer"]) and c["kept"]
                   for c in again["candidates"])  # fmt: skip


def test_what_fails_one_filter_names_that_one(folder: Path, exhaustive: dict, cli) -> None:
    """KL alone is in the way: the line names the exact KL, never a bound."""
    strict = ("--kl-threshold", "1e-6", "--induce-threshold=-1e9")
    result = cli("select", folder, *SELECT, *strict)
    assert result.code == 5
    scored = [c for c in _finite(exhaustive) if c["layer"] < 3]
    answering = [c for c in scored if c["bypass_score"] < 0] or scored
    nearest = min(answering, key=lambda c: c["kl_divergence"])
    expected = f"position {nearest['position']} layer {nearest['layer']} with"
    assert expected in result.err
    assert "--induce-threshold=" not in result.err.splitlines()[-1]


def test_other_thresholds_compute_only_what_is_missing(
    folder: Path, exhaustive: dict, cli, work, monkeypatch
) -> None:
    finite = [c for c in _finite(exhaustive) if c["layer"] < 3]
    middle = sorted(c["induce_score"] for c in finite)[len(finite) // 2] - 1e-4
    kl = sorted(c["kl_divergence"] for c in finite if c["induce_score"] > middle)[-2] + 1e-4
    narrow = (f"--induce-threshold={middle}", "--kl-threshold", str(kl))
    first = cli("select", folder, *SELECT, *narrow, "--json")
    assert first.code == 0, first.err
    assert work()[0] == 1
    # The same, and stricter ones that admit the same winner, need nothing.
    for options in (narrow, (*narrow, "--prune-layers", "0.25")):
        again = cli("select", folder, *SELECT, *options, "--json")
        assert work() == (0, 0)
        _same(again.json, first.json)
    # Wider ones complete what is missing: no pair twice, and as from scratch.
    held = load_file(folder / "scores.safetensors")
    wide = cli("select", folder, "--no-filter", "--n-val", "9", *OPEN, "--search", "exhaustive",
               "--prune-layers", "0", "--json")  # fmt: skip
    assert "going on from" in wide.err
    missing = sum(int(held[name][:, 1:].isnan().sum()) for name in ("bypass", "induce", "kl"))
    opened, pairs = work()
    assert opened == 1
    # No more than the batches that hold something missing; layer 0 has no direction.
    assert missing <= pairs < 0.9 * 3 * 9 * len(exhaustive["candidates"])
    after = load_file(folder / "scores.safetensors")
    for name in ("bypass", "induce", "kl"):
        complete = ~held[name].isnan().any(-1)
        assert torch.equal(after[name][complete], held[name][complete])
        assert not after[name][:, 1:].isnan().any()
    scratch = cli("select", shutil.copytree(folder, folder.with_name("scratch"),
                                            ignore=shutil.ignore_patterns("sc*", "sel*")),
                  *SELECT, *OPEN, "--search", "exhaustive", "--prune-layers", "0",
                  "--json").json  # fmt: skip
    _same(wide.json, scratch)
    # Now that all is there, any choice is free: the filter of prompts, too, where it leaves some.
    work()
    for options in (OPEN, narrow, ("--search", "exhaustive", *narrow), ("--all-layers", *OPEN)):
        assert cli("select", folder, *SELECT, *options).code == 0
    assert work() == (0, 0)


def test_a_killed_search_goes_on_where_it_was(
    folder: Path, exhaustive: dict, cli, work, monkeypatch
) -> None:
    """Killed inside of a round: what was saved before it is not measured again."""
    every = (*SELECT, *OPEN, "--search", "exhaustive")
    cli("select", shutil.copytree(folder, folder.with_name("whole")), *every)
    whole = work()[1]
    measure, calls = InterventionRunner.measure, 0

    def dies(self, candidates, piece, metric):
        nonlocal calls
        calls += 1
        if calls > 12:
            raise KeyboardInterrupt
        return measure(self, candidates, piece, metric)

    with monkeypatch.context() as patched:
        patched.setattr(InterventionRunner, "measure", dies)
        assert cli("select", folder, *every).code == 130
    assert not (folder / "selection.json").exists()
    held = load_file(folder / "scores.safetensors")
    saved = sum(int((~held[name].isnan()).sum()) for name in ("bypass", "induce", "kl"))
    assert saved > 0
    work()
    again = cli("select", folder, *every, "--json")
    assert work()[1] == whole - saved
    _same(again.json, exhaustive)


def test_scores_of_something_else_are_not_used(folder: Path, cli, work, tiny) -> None:
    """Each of these changes what scores are; all but KL stays where only KL is asked otherwise."""
    loud = ("--no-filter", "--n-val", "9", *OPEN)
    assert cli("select", folder, *loud).code == 0
    work()
    changes = (("--n-val", "10"), ("--dtype", "float64"), ("--model", tiny("qwen2")))
    for number, changed in enumerate(changes):
        copy = shutil.copytree(folder, folder.with_name(f"changed-{number}"))
        result = cli("select", copy, *loud, *changed)
        assert "scores.safetensors is of other prompts" in result.err
        assert "going on from" not in result.err
        assert work()[0] == 1
    result = cli("select", folder, *loud, "--kl-on", "response:2")
    assert "another --kl-on" in result.err
    assert "going on from" in result.err
    work()
    # A stranger's file: other shapes, impossible scores, a link.
    with safe_open(folder / "scores.safetensors", "pt") as file:
        metadata = file.metadata()
    held = load_file(folder / "scores.safetensors")
    for spoiled in (
        held | {"kl": held["kl"][:, :2].contiguous()},
        held | {"bypass": held["bypass"] - 1e6},
    ):
        save_file(spoiled, folder / "scores.safetensors", metadata)
        result = cli("select", folder, *loud, "--kl-on", "response:2")
        assert result.code == 0
        assert "all is computed again" in result.err
        assert work()[0] == 1
    (folder / "scores.safetensors").rename(folder / "elsewhere")
    (folder / "scores.safetensors").symlink_to(folder / "elsewhere")
    assert cli("select", folder, *loud).code == 3


def test_a_streamed_search_keeps_its_scores_too(folder: Path, exhaustive: dict, cli, work) -> None:
    stream = (*SELECT, "--offload")
    failed = cli("select", folder, *stream, "--kl-threshold", "1e-6", "--induce-threshold=1e9")
    assert failed.code == 5
    record = json.loads((folder / "selection.json").read_text())
    assert record["front"]
    assert record["offload"]
    assert work()[0] == 1
    # All of them are scored by now: nothing is read from disk again.
    opened = cli("select", folder, *stream, *OPEN, "--json")
    assert opened.code == 0, opened.err
    assert work()[0] == 0
    assert opened.json["offload"] == record["offload"]
    expected = {(c["position"], c["layer"]): c for c in exhaustive["candidates"]}
    for candidate in opened.json["candidates"]:
        for metric in candidate["computed"]:
            theirs = expected[candidate["position"], candidate["layer"]][metric]
            assert candidate[metric] == pytest.approx(theirs, abs=1e-4)
    assert opened.json["winner"] == exhaustive["winner"]


def test_ranks_that_measured_nothing_have_the_scores_of_those_that_did() -> None:
    directions = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    grid = CandidateGrid(directions, (-1,), Thresholds(kl=0.1, induce=0.0, prune_layers=0.0))
    one, other = (SearchState(grid, PromptScores.empty(directions, 3, 4)) for _ in range(2))
    key, some = (-1, 1), torch.tensor([True, False, True, False])
    one.put_floor(torch.full((4,), -0.01).double())
    one.put("kl", key, torch.full((4,), 0.5).double(), some)
    one.put("induce", key, torch.full((4,), -9.0).double(), some)
    one.put("bypass", key, torch.tensor([1.0, 2.0, 4.5]).double(), torch.ones(3, dtype=torch.bool))
    other.take(key, one.exchange(key))
    assert other.scores == one.scores
    score = other.scores[key]
    assert score.bypass_score == 2.5
    assert score.kl_at_least == pytest.approx((0.5 + 0.5 - 0.02) / 4)
    assert score.induce_score is None
    # Prompts to come count with the largest refusal score there is: no reason to drop it yet.
    assert score.induce_at_most is None
    assert one.scores[-1, 2] == Score(-1, 2)


def test_a_table_of_bounds_alone_names_none_of_them(fails, tmp_path: Path) -> None:
    """As earlier versions left them where no candidate passed."""
    rows = [{"position": -1, "layer": layer, **dict.fromkeys(METRICS), "computed": [],
             "induce_at_most": -0.081, "kl_at_least": None} for layer in (0, 1)]  # fmt: skip
    table = tmp_path / "selection.json"
    table.write_text(json.dumps({"candidates": rows, "n_layers": 10}))
    line = fails("select", "--scores", table, code=5)
    assert "0.081" not in line
    assert "run select on the run folder" in line


def test_a_table_shows_the_front_and_what_admits_it(cli, tmp_path: Path) -> None:
    rows = [(-1, 0, -5.0, 1.0, 1234.56789), (-1, 1, -4.0, -1.25, 0.05), (-1, 2, -3.0, -2.0, 0.2),
            (-1, 9, -9.0, 3.0, 0.01)]  # fmt: skip
    keys = ("position", "layer", *METRICS)
    table = tmp_path / "scores.json"
    table.write_text(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]))
    base = ("select", "--scores", table, "--n-layers", "10")
    result = cli(*base)
    assert result.code == 5
    assert result.out == ""
    assert "fails" in result.err
    front = front_records(
        apply_filters([Score(*row) for row in rows], 10, Thresholds()), 10, Thresholds()
    )
    # Layer 2 is beaten by layer 1 in all three; the one in the pruned layers beats nobody before.
    assert [c["layer"] for c in front] == [9, 0, 1]
    for candidate in front:
        (miss,) = candidate["fails"]
        choice = cli(*base, *shlex.split(miss["option"]), "--json").json
        assert choice["winner"]["layer"] == candidate["layer"]
        assert miss["option"] in result.err
