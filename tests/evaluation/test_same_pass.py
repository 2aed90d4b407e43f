"""First-token figures come from the passes that answers start with, and no others."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from abliterate import evaluate
from abliterate.direction import Direction, save_direction
from abliterate.distributed.rank_group import RankGroup
from abliterate.inference.forward import all_last_logits
from abliterate.inference.generation import greedy_answers
from abliterate.inference.interventions import ablate, add
from abliterate.metrics.refusal import exact_kl, kl_divergence, refusal_score
from abliterate.models.loading import LoadedModel, load_model
from abliterate.prompts.chat_template import ChatFormat, encode
from abliterate.prompts.sources import Prompt

KINDS = ("harmful", "harmless")
TEXTS = {kind: [f"{kind} {'word ' * (row % 4)}number {row}" for row in range(7)] for kind in KINDS}
VECTOR = 4 * torch.randn(48, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
LAYER = 2

Passes = list[list[list[int]]]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """The token ids of every pass of a Llama, with its padding."""
    seen: Passes = []
    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((args[0] if args else kwargs["input_ids"]).tolist())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    return seen


def _read(passes: Passes, prompts: Sequence[Sequence[int]]) -> list[int]:
    """How often each prompt was read from its beginning."""
    rows = [row for batch in passes for row in batch]
    return [
        sum(len(row) >= len(ids) and row[len(row) - len(ids) :] == list(ids) for row in rows)
        for ids in prompts
    ]


def _logits(loaded: LoadedModel, ids: Sequence[Sequence[int]], name: str) -> Tensor:
    """By definition: each prompt alone in a plain pass."""
    change = {"baseline": nullcontext(), "ablate": ablate(loaded.model, VECTOR),
              "add": add(loaded.model, VECTOR, LAYER)}[name]  # fmt: skip
    with change, torch.no_grad():
        return torch.stack([loaded.model(torch.tensor([row])).logits[0, -1] for row in ids])


def _figures(loaded: LoadedModel, ids: Mapping[str, Any], name: str, tokens: list[int]) -> Any:
    seen = {kind: _logits(loaded, ids[kind], name) for kind in KINDS}
    base = _logits(loaded, ids["harmless"], "baseline")
    return {
        ("harmful", "refusal_metric"): refusal_score(seen["harmful"], tokens),
        ("harmless", "refusal_metric"): refusal_score(seen["harmless"], tokens),
        ("harmless", "kl_divergence"): kl_divergence(base, seen["harmless"]),
        ("harmless", "kl_exact"): exact_kl(base, seen["harmless"]),
    }


def test_evaluate_reads_each_prompt_once_for_each_row(
    tiny: Callable[..., Path], cli: Any, passes: Passes, tmp_path: Path
) -> None:
    direction, out = tmp_path / "direction.safetensors", tmp_path / "out"
    save_direction(direction, Direction(VECTOR, -1, LAYER), "tiny")
    sources: list[Any] = []
    for kind, texts in TEXTS.items():
        (tmp_path / f"{kind}.txt").write_text("\n".join(texts))
        sources += [f"--{kind}", tmp_path / f"{kind}.txt"]

    def run() -> dict[str, Any]:
        passes.clear()
        made = cli(
            "evaluate", tiny("llama"), "--direction", direction, "-o", out, *sources, "--json",
            "--intervention", "add", "--intervention", "baseline", "--intervention", "ablate",
            "--checkpoint", edited, "--n-test", "7", "--max-new-tokens", "4", "--batch-size", "3",
            "--refusal-token", "I", "--controls", "0",
        )  # fmt: skip
        assert made.code == 0, made.err
        assert list(made.json["interventions"]) == ["add", "baseline", "ablate", "edited"]
        return dict(made.json)

    edited = tmp_path / "edited"
    assert cli("orthogonalize", tiny("llama"), "--direction", direction, "-o", edited).code == 0
    record = run()
    loaded = load_model(str(tiny("llama")))
    ids = {kind: encode(loaded.tokenizer, TEXTS[kind], ChatFormat()) for kind in KINDS}
    every = [row for kind in KINDS for row in ids[kind]]
    assert _read(passes, every) == [4] * 14
    said = sum(len(batch[0]) == 1 for batch in passes)
    assert said > 0

    tokens = [token["id"] for token in record["refusal_tokens"]]
    # A record keeps its prompts in an order of its own.
    lines = {kind: (out / "completions" / f"add-{kind}.jsonl").read_text() for kind in KINDS}
    texts = {
        kind: [json.loads(one)["prompt"] for one in lines[kind].splitlines()] for kind in KINDS
    }
    ids = {kind: encode(loaded.tokenizer, texts[kind], ChatFormat()) for kind in KINDS}
    for name in ("baseline", "ablate", "add"):
        held = record["by_prompt"]["interventions"][name]
        for (kind, figure), expected in _figures(loaded, ids, name, tokens).items():
            assert held[kind][figure] == pytest.approx(expected.tolist(), abs=1e-5), (name, figure)

    # Answers are there and figures are not: the same batches, for one token each.
    (out / "completions" / "measured.json").unlink()
    (out / "evaluation.json").unlink()
    again = run()
    assert _read(passes, every) == [4] * 14
    assert sum(len(batch[0]) == 1 for batch in passes) == 0
    assert again["by_prompt"] == record["by_prompt"]


def test_evaluate_of_the_library_counts_a_text_that_comes_again_again(
    tiny: Callable[..., Path], passes: Passes
) -> None:
    loaded = load_model(str(tiny("llama")))
    # The second comes again, between others.
    texts = {kind: [*some[:3], some[1], some[3]] for kind, some in TEXTS.items()}
    prompts = [[Prompt(text) for text in texts[kind]] for kind in KINDS]
    names = ("ablate", "baseline")
    passes.clear()
    found = evaluate(loaded, *prompts, [5, 9], Direction(VECTOR, -1, LAYER), names,
                     max_new_tokens=2, batch_size=2)  # fmt: skip
    assert tuple(found) == names
    ids = {kind: encode(loaded.tokenizer, texts[kind], ChatFormat()) for kind in KINDS}
    counts = dict(zip(KINDS, (_read(passes, ids[kind]) for kind in KINDS), strict=True))
    # Each text once for each row; one prompt alone shows the vocabulary.
    assert counts == {"harmful": [2] * 5, "harmless": [3, 2, 2, 2, 2]}
    for name in names:
        metrics = found[name].metrics
        assert metrics is not None
        values = {
            ("harmful", "refusal_metric"): metrics.harmful_scores,
            ("harmless", "refusal_metric"): metrics.harmless_scores,
            ("harmless", "kl_divergence"): metrics.divergences,
        }
        expected = _figures(loaded, ids, name, [5, 9])
        for key, held in values.items():
            assert held == pytest.approx(expected[key].tolist(), abs=1e-5), (name, key)


class Dealt(RankGroup):
    """One of two ranks; what the other would have sent is NaN, or nothing."""

    def gather(self, local_results: Sequence[Any]) -> list[Any]:
        whole: list[Any] = [[]] * 7
        whole[self.rank :: self.size] = local_results
        return whole

    def gather_rows(self, local_rows: Tensor) -> Tensor:
        whole = local_rows.new_full((7, local_rows.shape[1]), torch.nan)
        whole[self.rank :: self.size] = local_rows
        return whole

    def chunks(self, items: Sequence[Any]) -> list[list[Any]]:
        return [list(items)]

    def raise_if_any_failed(self, failure: BaseException | None) -> None:
        """The other rank had no failure."""


def test_ranks_share_the_logits_that_their_answers_start_from(
    tiny: Callable[..., Path], passes: Passes
) -> None:
    loaded = load_model(str(tiny("llama")))
    ids = encode(loaded.tokenizer, TEXTS["harmful"], ChatFormat())
    expected = all_last_logits(loaded.model, ids)
    answers = greedy_answers(loaded, ids, 3)
    for rank in (0, 1):
        of_rank = replace(loaded, ranks=Dealt(rank=rank, size=2))
        found: list[Tensor] = []
        heard: dict[int, list[int]] = {}

        def take(rows: Sequence[int], logits: Tensor, found: list[Tensor] = found) -> None:
            assert list(rows) == list(range(7))
            found.append(logits)

        passes.clear()
        # One answer of this rank is known, and starts from logits all the same.
        greedy_answers(of_rank, ids, 3, on_answer=heard.__setitem__, done=[rank], on_first=take)
        own = slice(rank, None, 2)
        (logits,) = found
        assert (logits[own] - expected[own]).abs().max() < 1e-5
        assert rank not in heard
        assert heard[rank + 2] == answers[rank + 2]
        assert _read(passes, ids) == [int(row % 2 == rank) for row in range(7)]
