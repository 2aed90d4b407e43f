"""evaluate on several ranks: answers and corpus losses are split, and outlive a killed rank."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import check_close, each_rank

from abliterate.direction import Direction, save_direction
from abliterate.distributed.rank_group import RankGroup
from abliterate.evaluation import losses
from abliterate.evaluation.losses import measure_loss
from abliterate.models.loading import load_model
from abliterate.prompts.corpora import Corpus, Example

# Of different lengths, and an odd number of them.
TEXTS = [f"Text {n} tells of {'rain and ' * n}snow." for n in range(7)]


@pytest.fixture
def options(tiny: Any, tmp_path: Path) -> tuple[str, ...]:
    """evaluate, but for ``-o``."""
    file, corpus = tmp_path / "direction.safetensors", tmp_path / "texts.jsonl"
    vector = 4 * torch.randn(48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    save_direction(file, Direction(vector, -1, 2), "tiny")
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return (
        "evaluate", str(tiny("llama")), "--direction", str(file), "--refusal-token", "I",
        "--n-test", "8", "--max-new-tokens", "6", "--intervention", "baseline", "--intervention",
        "ablate", "--corpus", f"pile={corpus}", "--corpus", "own",
    )  # fmt: skip


def same_evaluation(out: Path, other: Path) -> None:
    """Byte for byte the same completions, the same losses and scores up to rounding."""
    ours, theirs = (
        json.loads((folder / "evaluation.json").read_text())["interventions"]
        for folder in (out, other)
    )
    for name, outcome in theirs.items():
        assert sorted(outcome["losses"]) == ["own", "pile"]
        assert ours[name]["kl_divergence"] == pytest.approx(outcome["kl_divergence"], abs=1e-4)
        for corpus, loss in outcome["losses"].items():
            assert ours[name]["losses"][corpus]["loss"] == pytest.approx(loss["loss"], rel=1e-6)
        for kind in ("harmful", "harmless"):
            check_close(ours[name][kind], outcome[kind])
            file = f"completions/{name}-{kind}.jsonl"
            assert (out / file).read_bytes() == (other / file).read_bytes()


def test_a_killed_rank_ends_evaluate_which_goes_on(options: Any, tmp_path: Path, cli) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli(*options, "-o", one).code == 0
    zero, killed = each_rank(2, *options, "-o", two, env={"FAULT": "1 3 kill"})
    assert (zero.code, killed.code) == (4, -9)
    (line,) = zero.errors
    assert line.startswith("error: rank 0: ")
    assert "run the same command again" in line
    assert "Traceback" not in zero.err
    assert not (two / "evaluation.json").exists()
    # Two of four rounds were complete: what rank 1 answered in them has reached rank 0.
    (file,) = (two / "completions").glob("*.jsonl")
    kept, wanted = (f.read_text() for f in (file, one / "completions" / file.name))
    assert len(kept.splitlines()) == 4
    assert wanted.startswith(kept)
    result = cli(*options, "-o", two)
    assert result.code == 0, result.err
    assert "4 of 8 completions are there already" in result.err
    same_evaluation(two, one)


@dataclass(frozen=True)
class Dealt(RankGroup):
    """One of two ranks, to which the other has sent ``other`` already."""

    other: Any = None

    def all_gather(self, value: Any) -> list[Any]:
        return [value, self.other] if self.rank == 0 else [self.other, value]

    def raise_if_any_failed(self, failure: BaseException | None) -> None:
        """The other rank had no failure."""


def test_each_rank_measures_its_share_of_a_corpus(tiny: Any, monkeypatch: Any) -> None:
    loaded = load_model(str(tiny("llama")))
    corpus = Corpus("texts", "here", tuple(Example(text) for text in TEXTS))
    whole = measure_loss(loaded, corpus)
    run, rows = losses.last_logits, []

    def counted(model: Any, batch: Any, *args: Any) -> Any:
        rows.append(len(batch.rows))
        return run(model, batch, *args)

    monkeypatch.setattr(losses, "last_logits", counted)
    found = 0.0
    for rank, share in ((0, 4), (1, 3)):
        rows.clear()
        ranks = Dealt(rank=rank, size=2, other=torch.zeros(7 - share, dtype=torch.float64))
        part = measure_loss(replace(loaded, ranks=ranks), corpus)
        assert sum(rows) == share
        assert (part.n_tokens, part.n_texts) == (whole.n_tokens, whole.n_texts)
        found += part.loss
    assert found == pytest.approx(whole.loss, rel=1e-6)
