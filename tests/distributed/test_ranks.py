"""Data parallel: ranks started by torchrun and accelerate launch give what one process gives, and
end together when one of them dies, stalls or fails."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import HOOKED, Ended, accelerate_launch, check_close, each_rank, torchrun
from safetensors.torch import load_file
from warm_python import Running

from abliterate.cli.app import main
from abliterate.resources import demo_model_dir

LOOSE = ("--kl-threshold", "1000", "--induce-threshold=-1000")
RAW = ("--no-filter", "--refusal-token", "40")


def one_process(*args: str | Path) -> None:
    assert main([str(arg) for arg in args]) == 0


def record(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text())


def same_means(run: Path, other: Path) -> None:
    """To 1e-6 of the means' size, and the same prompts counted."""
    ours, theirs = (load_file(folder / "directions.safetensors") for folder in (run, other))
    assert sorted(ours) == sorted(theirs) == ["mean_first_token", "mean_harmful", "mean_harmless"]
    for name, mean in ours.items():
        assert mean.dtype == torch.float64
        assert (mean - theirs[name]).abs().max() <= 1e-6 * theirs[name].abs().max()
    for key in ("counts", "refusal_tokens", "positions", "prompts"):
        assert record(run, "extract.json")[key] == record(other, "extract.json")[key]
    same_stability(record(run, "extract.json"), record(other, "extract.json"))


def same_stability(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The same halves of the prompts, and the same spread along each direction."""
    for name, values in theirs["stability"].items():
        for one, other in zip(ours["stability"][name], values, strict=True):
            known = [value for value in other if value is not None]
            assert [v for v in one if v is not None] == pytest.approx(known, rel=1e-4, abs=1e-6)


def same_selection(run: Path, other: Path) -> None:
    """The same winner, verdicts and scores, up to rounding of batches."""
    ours, theirs = (record(folder, "selection.json") for folder in (run, other))
    assert ours["winner"] == theirs["winner"] is not None
    assert ours["baselines"] == pytest.approx(theirs["baselines"], abs=1e-4)
    for one, two in zip(ours["candidates"], theirs["candidates"], strict=True):
        for key in ("position", "layer", "kept", "reason", "computed"):
            assert one[key] == two[key]
        for metric in one["computed"]:
            assert one[metric] == pytest.approx(two[metric], abs=1e-4, nan_ok=True)
    vectors = [load_file(folder / "direction.safetensors")["direction"] for folder in (run, other)]
    assert torch.cosine_similarity(*vectors, dim=0) > 1 - 1e-9


@pytest.fixture(scope="module")
def tiny_run(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model, and what one process makes of it."""
    model, run = tiny("llama"), tmp_path_factory.mktemp("one") / "run"
    one_process("extract", model, "-o", run, "--n-train", "10", *RAW)
    one_process("select", run, "--n-val", "9", "--no-filter", *LOOSE)
    return model, run


def test_torchrun_runs_the_whole_pipeline(tmp_path: Path) -> None:
    corpus, config = tmp_path / "texts.jsonl", tmp_path / "config.toml"
    texts = [f"Text {n} tells of {'rain and ' * n}snow." for n in range(7)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config.write_text(f'[evaluate]\ncorpus = ["pile={corpus}", "own"]\n')
    args = ("run", demo_model_dir(), "--n-train", "21", "--n-val", "9", "--n-test", "3",
            "--max-new-tokens", "4", "--config", config)  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    one_process(*args, "-o", one)
    done = torchrun(2, "-m", "abliterate", *args, "-o", two, "--json")
    assert done.code == 0, done.err[-2000:]
    document = json.loads(done.out)  # one document: rank 0 alone speaks
    assert document["select"] == record(two, "selection.json")
    same_means(two, one)
    same_selection(two, one)
    ours, theirs = (record(folder, "evaluation.json")["interventions"] for folder in (two, one))
    for name, outcome in theirs.items():
        for kind in ("harmful", "harmless"):
            check_close(ours[name][kind], outcome[kind])
            files = [folder / "completions" / f"{name}-{kind}.jsonl" for folder in (two, one)]
            assert files[0].read_text() == files[1].read_text()
        assert sorted(outcome["losses"]) == ["own", "pile"]
        for which, loss in outcome["losses"].items():
            assert ours[name]["losses"][which]["loss"] == pytest.approx(loss["loss"], rel=1e-6)
    assert sorted(file.name for file in two.rglob("*")) == sorted(
        file.name for file in one.rglob("*")
    )


def test_accelerate_launch_splits_uneven_prompts(tiny_run: Any, tmp_path: Path) -> None:
    model, one = tiny_run
    args = ("extract", model, "-o", tmp_path / "run", "--n-train", "10", *RAW)
    done = accelerate_launch(3, "-m", "abliterate", *args)
    assert done.code == 0, done.err[-2000:]
    assert done.out.count("next: abliterate select") == 1
    same_means(tmp_path / "run", one)
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "directions.safetensors",
        "extract.json",
    ]


def test_a_killed_rank_ends_torchrun_and_select_goes_on(tiny_run: Any, tmp_path: Path, cli) -> None:
    _, one = tiny_run
    run, logs = tmp_path / "run", tmp_path / "logs"
    run.mkdir()
    for name in ("extract.json", "directions.safetensors"):
        (run / name).write_bytes((one / name).read_bytes())
    args = ("select", run, "--n-val", "9", "--no-filter", *LOOSE)
    kept = ("--log-dir", logs, "--redirects", "3")
    done = torchrun(3, HOOKED, *args, env={"FAULT": "2 3 kill"}, options=kept)
    assert done.code != 0
    for rank in (0, 1):
        (log,) = logs.glob(f"*/attempt_0/{rank}/stderr.log")
        ended = Ended(1, "", log.read_text())
        assert ended.errors, ended.err
        assert ended.errors[0].startswith(f"error: rank {rank}: ")
        assert "run the same command again" in ended.errors[0]
        assert "Traceback" not in ended.err
    assert sorted(file.name for file in run.iterdir()) == [
        "directions.safetensors",
        "extract.json",
        "scores.safetensors",
    ]
    # Two rounds were complete: what rank 2 found in them has reached rank 0.
    kept = load_file(run / "scores.safetensors")["induce"]
    assert int((~kept.isnan()).all(-1).sum()) >= 6
    result = cli(*args)
    assert result.code == 0
    assert "going on from the" in result.err
    same_selection(run, one)


def test_a_stalled_rank_ends_all_within_the_timeout(tiny_run: Any, tmp_path: Path) -> None:
    model, _ = tiny_run
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def free_once_rank_0_has_given_up(processes: list[Running]) -> None:
        processes[0].wait(300)
        os.open(pipe, os.O_RDWR)  # never blocks; open until this process ends

    zero, one = each_rank(
        2, "extract", model, "-o", tmp_path / "run", "--n-train", "10", *RAW,
        env={"FAULT": f"1 1 wait:{pipe}", "ABLITERATE_TIMEOUT": "5"},
        meanwhile=free_once_rank_0_has_given_up,
    )  # fmt: skip
    assert zero.code == one.code == 4
    (first,), (second,) = zero.errors, one.errors
    assert first.startswith("error: rank 0: rank 1 is dead, or was not there within 5 seconds")
    assert "ABLITERATE_TIMEOUT" in first
    assert second.startswith("error: rank 1: another rank is gone")
    assert "Traceback" not in zero.err + one.err
    assert not (tmp_path / "run").exists()


def test_a_failing_rank_is_quoted_by_the_others(tiny_run: Any, tmp_path: Path) -> None:
    model, _ = tiny_run
    zero, one = each_rank(
        2, "extract", model, "-o", tmp_path / "run", "--n-train", "10", *RAW, "--json",
        env={"FAULT": "1 1 raise"},
    )  # fmt: skip
    assert (zero.code, one.code) == (4, 3)
    assert zero.errors == ["error: rank 0: rank 1 failed: the disk of this rank is on fire"]
    assert one.errors == ["error: rank 1: the disk of this rank is on fire"]
    assert zero.out == one.out == ""


def test_a_port_of_zero_is_no_meeting_place(tiny_run: Any, tmp_path: Path) -> None:
    """What older releases of accelerate make of ``--main_process_port 0``."""
    ended = each_rank(
        2, "extract", tiny_run[0], "-o", tmp_path / "run", *RAW, env={"MASTER_PORT": "0"}
    )
    for rank in ended:
        assert rank.code == 2
        assert "--main_process_port" in rank.errors[0]
    assert not (tmp_path / "run").exists()


def test_timeout_must_be_a_number(tiny_run: Any, fails, monkeypatch, tmp_path: Path) -> None:
    model, _ = tiny_run
    monkeypatch.setenv("ABLITERATE_TIMEOUT", "soon")
    one_process("extract", model, "-o", tmp_path / "run", "--n-train", "10", *RAW)  # no ranks
    from abliterate.distributed.rank_group import timeout
    from abliterate.errors import UsageError

    with pytest.raises(UsageError, match=r"ABLITERATE_TIMEOUT must be .* not 'soon'"):
        timeout()
