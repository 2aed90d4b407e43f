"""The frame that all stages of a run folder share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from abliterate.checkpoints.checkpoint import find_checkpoint
from abliterate.errors import InputError
from abliterate.run_folder import Session
from abliterate.run_stage import Stage
from abliterate.settings import load_settings
from abliterate.storage.ownership import is_mapping

STAGE = Stage("look", "look.json", {"seen.json": is_mapping("seen")}, frozenset({"model"}))


@pytest.fixture
def session(tiny) -> Session:
    return Session(find_checkpoint(str(tiny("llama"))), load_settings())


def _run(session: Session, folder: Path, inputs: object = 1, text: str = '{"seen": 1}') -> bool:
    """Run the stage; whether its record was up to date."""
    with STAGE.open(session, folder) as stage:
        outputs = {name: folder / name for name in ("seen.json", "unseen.json")}
        stage.depends_on({"number": inputs}, outputs)
        if stage.finished():
            return True
        stage.finish({"found": inputs}, lambda: outputs["seen.json"].write_text(text) and None)
    return False


def test_record_says_how_it_was_made(session: Session, tmp_path: Path) -> None:
    _run(session, tmp_path)
    record = json.loads((tmp_path / "look.json").read_text())
    made = ["settings", "seed", "versions", "seconds", "computed_with", "inputs", "outputs"]
    assert list(record) == ["model", "found", *made]
    assert record["model"] == session.identity
    assert set(record["settings"]) == {"model"}
    assert set(record["outputs"]) == {"seen.json"}  # the other one was not written


def test_stage_is_up_to_date_until_inputs_or_outputs_change(
    session: Session, tmp_path: Path
) -> None:
    whole = Stage("whole", "whole.json", {"a.json": is_mapping("a")})

    def run(inputs: int = 1) -> bool:
        with whole.open(session, tmp_path) as stage:
            stage.depends_on({"number": inputs}, {"a.json": tmp_path / "a.json"})
            if stage.finished():
                return True
            stage.finish({}, lambda: (tmp_path / "a.json").write_text('{"a": 1}') and None)
        return False

    assert [run(), run()] == [False, True]
    assert [run(2), run(2)] == [False, True]
    (tmp_path / "a.json").write_text('{"a": 2}')
    assert [run(2), run(2)] == [False, True]
    # A promised output that was never written does not pass for finished.
    assert [_run(session, tmp_path / "b"), _run(session, tmp_path / "b")] == [False, False]


def test_foreign_files_stay_and_no_folder_writes_nothing(session: Session, tmp_path: Path) -> None:
    (tmp_path / "seen.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match="was not written by abliterate"):
        _run(session, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["seen.json"]
    with STAGE.open(session, None) as stage:
        stage.depends_on({"number": 1}, {})
        assert stage.finished() is None
        assert stage.finish({"found": 3})["outputs"] == {}
    assert [path.name for path in tmp_path.iterdir()] == ["seen.json"]


def test_clock_counts_from_its_start(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    from abliterate import run_stage

    ticks = iter([0.0, 10.0, 12.5])
    monkeypatch.setattr(run_stage.time, "perf_counter", lambda: next(ticks))
    with STAGE.open(session, None) as stage:
        stage.start_clock()
        assert stage.finish({})["seconds"] == 2.5
