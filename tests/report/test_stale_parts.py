"""What is of something else than the run folder holds now is marked, and renewed by its command."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from abliterate.cli.app import main
from abliterate.report.cards import cards
from abliterate.report.collect import read_run
from abliterate.report.page import make_figures

FREE = ("--kl-threshold", "1e9", "--induce-threshold=-1e9")
OPEN = (*FREE, "--no-filter", "--n-val", "3")
# Of four layers the second alone is left, as the first has no direction at a template token.
SECOND = (*OPEN, "--prune-layers", "0.5")
SHORT = ("--n-test", "2", "--max-new-tokens", "2")
TRAIN = ("--no-filter", "--refusal-token", "I", "--positions", "last", "--save-activations")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """A folder with a run of every stage, and an edited checkpoint ``out`` beside it."""
    place = tmp_path_factory.mktemp("stale")
    run, out, model = place / "run", place / "out", tiny("llama")
    for line in (
        ("extract", model, "-o", run, *TRAIN, "--n-train", "6"),
        ("select", run, *SECOND),
        ("orthogonalize", model, "--direction", run, "-o", out),
        ("evaluate", model, "--direction", run, "--checkpoint", f"edited={out}", *SHORT),
        ("inspect", run),
        ("trace", run, "--n-prompts", "2"),
        ("fragility", run, "--steps", "2", *SHORT, "--no-picture"),
    ):
        assert main([*map(str, line), "--quiet", "--json"]) == 0, line
    return place


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of it, in which everything may be changed; the checkpoint is named from there."""
    place = tmp_path / "place"
    shutil.copytree(finished, place)
    path = place / "run" / "evaluation.json"
    path.write_text(path.read_text().replace(str(finished), str(place)))
    return place / "run"


def _stale(cli: Any, run: Path, command: str = "methods") -> dict[str, Any]:
    """By part, what a command says of it; ``report`` takes longer and leaves a page."""
    result = cli(command, run, "--json")
    assert result.code == 0, result.err
    assert all(f"{found['file']} is stale" in result.err for found in result.json["stale"])
    return {found["part"]: found for found in result.json["stale"]}


def _renew(cli: Any, stale: dict[str, Any]) -> None:
    for found in stale.values():
        for line in found["renew"]:
            result = cli(*shlex.split(line)[1:], "--quiet")
            assert result.code == 0, (line, result.err)


def test_another_choice_leaves_what_is_of_the_earlier_one_marked_until_it_is_renewed(
    run: Path, cli
) -> None:
    assert _stale(cli, run, "report") == {}
    assert 'id="stale"' not in (run / "report.html").read_text()
    before = [card.title for card in cards(read_run(run))]
    assert "KL, ablated" in before

    chosen = cli("select", run, *OPEN, "--prune-layers", "0", "--json")
    winner = chosen.json["winner"]
    assert winner["layer"] != 1
    assert f"{run / 'evaluation.json'} is stale: of the direction of layer 1" in chosen.err
    stale = _stale(cli, run, "report")
    assert list(stale) == ["evaluation", "inspect", "trace", "fragility"]
    page = (run / "report.html").read_text()
    for part in ("inspect", "trace"):
        assert f"<li><strong>{part}</strong>" in page
    assert page.index('id="stale"') < page.index('class="cards"')
    for found in stale.values():
        assert f"{SECTION[found['part']]}" in page
    # No number of theirs stands in the summary, and their figures say what they are.
    shown = [card.title for card in cards(read_run(run))]
    assert shown == ["Direction", "Bypass (validation)", "Induce (validation)", "KL (validation)"]
    marked = {
        name
        for name, made in make_figures(read_run(run)).items()
        if any(note.text == "STALE" for note in made.layout.annotations)
    }
    assert {"refusals", "cosines", "norms", "trace"} <= marked
    assert not any(name.endswith(("_heatmap", "_lines")) for name in marked)

    # What is tested anew is made anew first: the checkpoint is still the edit of before.
    assert [shlex.split(line)[1] for line in stale["evaluation"]["renew"]] == EDIT_FIRST
    line = shlex.split(stale["evaluation"]["renew"][1])
    again = cli(*line[1:])
    assert again.code == 0, again.err
    assert "edited (stale)" in again.out
    assert "ablate and edited: not compared, as edited is stale" in " ".join(again.out.split())
    late = _stale(cli, run, "report")
    assert late["evaluation"]["rows"] == ["edited"]
    assert [shlex.split(line)[1] for line in late["evaluation"]["renew"]] == EDIT_FIRST
    page = (run / "report.html").read_text()
    assert "edited (stale)" in page
    assert "ablate and edited: not compared, as edited is stale" in page
    assert [card.title for card in cards(read_run(run))] == before
    _renew(cli, stale)
    assert _stale(cli, run) == {}
    edit = json.loads((run.parent / "out" / "abliterate.json").read_text())
    assert edit["direction"]["layer"] == winner["layer"]


EDIT_FIRST = ["orthogonalize", "evaluate"]
SECTION = {
    "evaluation": 'class="scroll stale"',
    "inspect": '<section id="subspace" class="stale"',
    "trace": '<section id="trace" class="stale"',
    "fragility": "fragility.json",
}


def test_a_selection_that_chose_nothing_leaves_the_earlier_evaluation_stale(run: Path, cli) -> None:
    none = cli("select", run, *OPEN, "--kl-threshold", "1e-9", "--induce-threshold", "1e9",
               "--prune-layers", "0")  # fmt: skip
    assert none.code == 5
    told = f"{run / 'evaluation.json'} is stale: selection.json chose no direction since"
    assert told in none.err
    stale = _stale(cli, run)
    assert "evaluation" in stale
    assert [card.title for card in cards(read_run(run))] == ["Direction"]
    # What renews it chooses first.
    first, *_ = stale["evaluation"]["renew"]
    words = shlex.split(first)
    assert words[:2] == ["abliterate", "select"]
    # Each threshold once, and those that admit the one that is named as the nearest.
    said = re.search(r"; nearest: .*?\((--\S+) (\S+) (--induce-threshold=\S+) admits", none.err)
    assert said is not None, none.err
    assert f"{said[1]}={said[2]}" in words
    assert said[3] in words
    assert sum(word.startswith(("--kl-", "--induce-")) for word in words) == 2
    _renew(cli, {"evaluation": stale["evaluation"]})
    assert _stale(cli, run).get("evaluation", {"rows": True})["rows"]


def test_another_extraction_makes_the_choice_and_all_of_it_stale(run: Path, cli, tiny) -> None:
    again = cli("extract", tiny("llama"), "-o", run, *TRAIN, "--n-train", "5", "--json")
    assert f"{run / 'selection.json'} is stale" in again.err
    stale = _stale(cli, run)
    assert list(stale) == ["selection", "evaluation", "inspect", "trace", "fragility"]
    held = read_run(run)
    assert [card.value for card in cards(held)] == ["stale"]
    # Neither a later stage nor a choice among the old scores passes it over in silence.
    late = cli("trace", run, "--n-prompts", "2", "--quiet", "--json")
    table = cli(
        "select", "--scores", run / "selection.json", *FREE, "--prune-layers", "0.5", "--json"
    )
    for result in (late, table):
        assert result.code == 0
        assert f"{run / 'selection.json'} is stale" in result.err
    assert cli("select", run, *SECOND, "--json").code == 0
    assert "selection" not in _stale(cli, run)


def test_a_checkpoint_that_was_replaced_makes_its_row_stale_alone(run: Path, cli, tiny) -> None:
    out = run.parent / "out"
    only = ("--layers", "1", "--overwrite", "--json")
    assert cli("orthogonalize", tiny("llama"), "--direction", run, "-o", out, *only).code == 0
    stale = _stale(cli, run, "report")
    assert stale.keys() == {"evaluation"}
    assert stale["evaluation"]["rows"] == ["edited"]
    page = (run / "report.html").read_text()
    assert '<th scope="row">edited (stale)</th>' in page
    assert '<th scope="row">ablate</th>' in page
    assert "KL, ablated" in [card.title for card in cards(read_run(run))]
    # Answers that are not those which were counted are stale too, and then all of it is.
    file = run / "completions" / "ablate-harmful.jsonl"
    file.write_text(file.read_text().replace('"response": "', '"response": "No. ', 1))
    assert _stale(cli, run)["evaluation"]["rows"] == []


def test_records_without_the_hashes_of_their_inputs_are_compared_by_what_they_name(
    run: Path, cli
) -> None:
    for name in ("selection", "evaluation", "inspect", "trace", "fragility", "extract"):
        record = json.loads((run / f"{name}.json").read_text())
        del record["made_from"]
        (run / f"{name}.json").write_text(json.dumps(record))
    assert _stale(cli, run) == {}
    assert cli("select", run, *OPEN, "--prune-layers", "0", "--json").code == 0
    assert list(_stale(cli, run)) == ["evaluation", "inspect", "trace", "fragility"]


def _edit_words(stale: dict[str, Any]) -> list[str]:
    (line, *_) = stale["evaluation"]["renew"]
    words = shlex.split(line)
    assert words[1] == "orthogonalize"
    return words


def test_renewing_takes_out_what_was_asked_of_the_edit_and_not_of_an_earlier_choice(
    run: Path, cli, tiny
) -> None:
    out = run.parent / "out"

    def edit(*options: str) -> None:
        words = ("orthogonalize", tiny("llama"), "--direction", run, "-o", out, "--overwrite")
        assert cli(*words, *options).code == 0

    assert cli("select", run, *SECOND, "--project-harmless").code == 0
    edit()  # along what select has projected
    assert cli("select", run, *SECOND).code == 0
    assert "--project-harmless" not in _edit_words(_stale(cli, run))
    edit("--project-harmless")
    assert cli("select", run, *OPEN, "--prune-layers", "0").code == 0
    assert "--project-harmless" in _edit_words(_stale(cli, run))


def test_renewing_in_a_copied_folder_leaves_the_other_ones_model_alone(
    run: Path, cli, tiny, tmp_path: Path
) -> None:
    model, copy = tiny("llama"), tmp_path / "copy"
    assert cli("orthogonalize", model, "--direction", run, "-o", run / "model").code == 0
    asked = ("--checkpoint", run / "model", *SHORT)
    assert cli("evaluate", model, "--direction", run, *asked).code == 0
    shutil.copytree(run, copy)
    assert cli("select", copy, *OPEN, "--prune-layers", "0").code == 0
    stale = _stale(cli, copy)
    words = _edit_words(stale)
    assert words[words.index("-o") + 1] == str(copy / "model")
    _renew(cli, stale)
    assert _stale(cli, copy) == {}
    assert _stale(cli, run) == {}


def test_a_choice_that_is_gone_is_told_as_such(run: Path, cli, tiny, tmp_path: Path) -> None:
    none = cli("select", run, *SECOND, "--induce-threshold", "1e9")
    assert none.code == 5
    assert f"the earlier choice, {run / 'direction.safetensors'}, is removed" in none.err
    edited = cli("orthogonalize", tiny("llama"), "--direction", run, "-o", tmp_path / "edited")
    assert edited.code == 3
    assert "no candidate passed the filters of select" in edited.err
