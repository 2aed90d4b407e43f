"""What a paper says of a run: every number of the records, nothing stale, no stranger's markup."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from abliterate.console import safe
from abliterate.report.methods_text import latex, markdown

STRANGE = r"a\b {c} $d$ 50% & #1 e_f ~g ^h <i> |j| `k` 'l' \"m\" --n ?` !` \input{/etc/passwd}"


@pytest.fixture
def place(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, whose records a stranger may have written."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def _record(run: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((run / f"{name}.json").read_text()))


def _plain(text: str) -> str:
    """LaTeX back to what it sets, for what :func:`latex` writes."""
    named = {
        "textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "textless": "<",
        "textgreater": ">", "textbar": "|", "textasciigrave": "`", "textquotesingle": "'",
        "textquotedbl": '"',
    }  # fmt: skip

    def back(match: re.Match[str]) -> str:
        command, escaped, grouped, bare = match.groups()
        if bare is not None:
            raise AssertionError(f"{bare} is not escaped in {text}")
        return named[command] if command else escaped or grouped

    return re.sub(r"\\(text\w+)\{\}|\\([{}$&#_%])|([-,])\{\}|([\\{}$&#_%~^<>|`\"'])", back, text)


def test_paragraph_and_tables_hold_what_the_records_say(run: Path, cli) -> None:
    result = cli("methods", run, "--json")
    assert result.code == 0, result.err
    extract, selection, evaluation = (
        _record(run, name) for name in ("extract", "selection", "evaluation")
    )
    told, winner = " ".join(result.json["sentences"]), selection["winner"]
    assert f"enters layer {winner['layer']} of {selection['n_layers']}" in told
    assert f"at position {winner['position']} " in told
    assert f"{extract['counts']['harmful']['used']} harmful" in told
    assert f"a KL divergence above {selection['thresholds']['kl']:.3g}" in told
    assert f"{selection['bootstrap']['resamples']} resamples" in told
    able = [one for one in selection["candidates"] if one["reason"] not in ("nan", "layer")]
    whole = sum(len(one["computed"]) == 3 for one in able)
    # What a staged search leaves out, as it cannot matter, is told.
    left_out = f"all three were computed for {whole} of {len(able)} candidates" in told
    assert left_out == (whole < len(able))
    covered, scored = (selection["bootstrap"][key] for key in ("covered", "scored"))
    assert (f"in which {covered} of {scored} candidates took part" in told) == (covered < scored)
    assert "two halves of the training prompts have cosine" in told
    before, after = (
        evaluation["interventions"][name]["harmful"]["refusal_rate"]
        for name in ("baseline", "ablate")
    )
    assert re.search(rf"refused from {before:.1%} \[.*\] to {after:.1%} \[", told)
    settings = dict(result.json["settings"])
    assert "transformers" in settings["versions"]
    assert len([name for name in settings if name.endswith(" prompts")]) == 6
    digest = evaluation["made_from"]["prompts"]["harmful"][:16]
    assert digest in settings["harmful test prompts"]
    columns, rows = result.json["results"]
    assert [row[0] for row in rows] == list(evaluation["interventions"])
    assert {len(row) for row in rows} == {len(columns)}
    assert result.json["left_out"] == result.json["stale"] == []
    assert "2406.11717" in result.json["bibtex"]
    # The text is the same on stdout, and all of it escaped.
    shown = cli("methods", run).out
    assert shown.rstrip("\n") == result.json["text"].rstrip("\n")
    assert "<script>" not in shown.replace("<!-- made by abliterate methods -->", "")
    assert "https://arxiv.org/abs/2406.11717" in shown


def test_whatever_strangers_wrote_is_text_in_either_format(place: Path, cli) -> None:
    assert _plain(latex(STRANGE)) == safe(STRANGE)
    assert latex("中 é \N{EN DASH} ±") == r"\texttt{U+4E2D} é -- $\pm$"
    assert markdown("*a* [b](c) #d|<i>") == r"\*a\* \[b\](c) \#d\|&lt;i&gt;"
    for name in ("extract", "selection", "evaluation"):
        record = _record(place, name)
        record["model"]["id"] = f"{STRANGE} \ufffc \u202e\x1b[31m http://x.example @user"
        record["settings"]["extract"]["harmful"] = STRANGE
        (place / f"{name}.json").write_text(json.dumps(record))
    tex = cli("methods", place, "--format", "latex")
    assert tex.code == 0, tex.err
    assert tex.out.count(latex(STRANGE)) >= 3
    assert r"\input" not in tex.out
    assert tex.out.count(r"\cite{arditi2024refusal}") == 1
    assert tex.out.count(r"\begin{table}") == tex.out.count(r"\end{table}") == 3
    for table in re.findall(r"\\hline\n(.*?)\\end\{tabular\}", tex.out, re.DOTALL):
        lines = [line for line in table.splitlines() if line.endswith(r"\\")]
        assert len({len(re.findall(r"(?<!\\)&", line)) for line in lines}) == 1
    text = cli("methods", place).out
    assert markdown(STRANGE) in text
    for shown in (tex.out, text):
        assert not {"\x1b", "\u202e", "\ufffc"} & set(shown)
    assert "http://x" not in text  # which would become a link


def test_stale_parts_are_left_out_and_named(place: Path, cli) -> None:
    selection = _record(place, "selection")
    selection["winner"] = None
    (place / "selection.json").write_text(json.dumps(selection))
    (place / "direction.safetensors").unlink()
    result = cli("methods", place, "--json")
    assert result.code == 0, result.err
    assert "evaluation.json is stale" in result.err
    assert result.json["results"] is None
    told = " ".join(result.json["sentences"])
    assert "No candidate passed" in told
    assert "We tested" not in told
    assert "harmful test prompts" not in dict(result.json["settings"])
    named = " ".join(result.json["left_out"])
    assert "evaluation.json: selection.json chose no direction since" in named
    for form in ("md", "latex"):
        assert "Left out, as it is stale" in cli("methods", place, "--format", form).out


def test_controls_are_a_table_where_they_are_recorded(place: Path, cli) -> None:
    record = _record(place, "evaluation")
    columns, rows = cli("methods", place, "--json").json["controls"]
    assert columns[:2] == ["intervention", "direction"]
    for name, held in record["controls"]["rows"].items():
        selected = held["selected"]["kl_divergence"]
        assert [name, "selected", f"{selected:.4f}"] in [[*row[:2], row[4]] for row in rows]
        for family in held["families"].values():
            for member in family["members"]:
                shown = f"{member['harmful_score']:+.2f}"
                assert any(row[0] == name and shown in row[2] for row in rows)
    for form in ("md", "latex"):
        assert "isotropic" in cli("methods", place, "--format", form).out
    del record["controls"]
    (place / "evaluation.json").write_text(json.dumps(record))
    assert cli("methods", place, "--json").json["controls"] is None


def test_output_and_errors(run: Path, cli, fails, tmp_path: Path) -> None:
    path = tmp_path / "methods.tex"
    for _ in range(2):  # an earlier one is replaced
        assert cli("methods", run, "--format", "latex", "-o", path).code == 0
    assert path.read_text().startswith("% made by abliterate methods")
    path.write_text("my paper")
    assert str(path) in fails("methods", run, "-o", path, code=2)
    assert path.read_text() == "my paper"
    assert "--format must be md or latex" in fails("methods", run, "--format", "pdf", code=2)
    assert "is no run folder" in fails("methods", tmp_path / "absent", code=3)
    (tmp_path / "empty").mkdir()
    assert "holds no stage's record" in fails("methods", tmp_path / "empty", code=3)
    (tmp_path / "empty" / "selection.json").write_text('{"winner": 3}')
    assert "does not hold" in fails("methods", tmp_path / "empty", code=3)
