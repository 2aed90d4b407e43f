"""How often the host waits for the accelerator, and where: it stands still meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from on_device import MODEL, accelerator, on_device

import abliterate
from abliterate import precision
from abliterate.inference import interventions
from abliterate.inference.forward import capture_resid_pre, left_pad
from abliterate.inference.generation import greedy_answers
from abliterate.models.loading import LoadedModel, load_model
from abliterate.prompts.chat_template import ChatFormat, encode

_TEXTS = ["How do I bake bread?", "Name a river.", "Write a poem about the sea and the wind."]


@contextmanager
def _loaded(dtype: str = "bfloat16", **kind: Any) -> Iterator[tuple[LoadedModel, Any]]:
    precision._computes_float64.cache_clear()  # the device of this name is another one now
    with accelerator.accelerator(**kind) as state:
        yield load_model(MODEL, "emu", dtype), state


def _ours(state: accelerator.State) -> dict[str, int]:
    """Waits in this project's code, by place."""
    found: dict[str, int] = {}
    for wait, count in state.waits.items():
        if wait.package == "abliterate":
            found[wait.where] = found.get(wait.where, 0) + count
    return found


def test_extract_and_select_wait_at_most_once_a_batch(on_emu) -> None:
    _, _, counts = on_emu
    for command, state in counts.items():
        ours = _ours(state)
        assert 0 < sum(ours.values()) <= state.forwards, (command, state.forwards, ours)


def test_extraction_waits_once_for_each_batch_and_once_for_the_refusal_tokens(
    tmp_path: Path,
) -> None:
    options = ("--n-train", "12", "--batch-size", "4", "-q", "--positions", "-2,-1")
    state = on_device("extract", MODEL, "-o", tmp_path / "run", *options, float64=False)
    trial = 2  # whether padding is masked
    first_token = 1  # a batch of its own
    batches = state.forwards - trial - first_token
    assert batches == 6
    assert sum(_ours(state).values()) == batches + first_token + 1 + 1, _ours(state)


def test_generation_waits_once_in_eight_tokens() -> None:
    with _loaded() as (loaded, state):
        ids = encode(loaded.tokenizer, _TEXTS, ChatFormat())
        greedy_answers(loaded, ids, 1)
        state.waits.clear()
        state.forwards = 0
        answers = greedy_answers(loaded, ids, 12)
        assert max(map(len, answers)) > 8
        assert state.forwards >= 9
        ours = sum(_ours(state).values())
        assert ours <= -(-state.forwards // 8) + 1, _ours(state)
        # The library's own stop test, one a token; what it asks of masks comes on top.
        stops = state.synchronisations("transformers", "StopCheck")
        assert stops <= state.forwards


def test_answers_end_where_they_end_on_the_cpu() -> None:
    """Looking late at rows that have ended changes no answer, nor which rows are handed over."""
    on_cpu = load_model(MODEL, "cpu", "float32")
    ids = encode(on_cpu.tokenizer, _TEXTS, ChatFormat())
    with _loaded("float32", float64=False) as (loaded, _):
        for limit in (8, 17):
            heard: dict[int, list[int]] = {}
            found = greedy_answers(loaded, ids, limit, on_answer=heard.__setitem__)
            assert found == greedy_answers(on_cpu, ids, limit)
            assert heard == dict(enumerate(found))


@pytest.mark.parametrize("change", ["ablate", "add", "captured"])
def test_hooks_make_one_tensor_of_the_streams_size_at_most_and_none_wider(change: str) -> None:
    """In bfloat16, the stream is nowhere copied to float32 by this tool's code."""
    with _loaded("bfloat16", float64=False) as (loaded, state):
        model = loaded.model
        vector = torch.randn(128, generator=torch.Generator().manual_seed(1))
        ids = torch.arange(3, 3 + 2 * 16, device="emu").view(2, 16)
        hooked: dict[str, Any] = {
            "ablate": lambda: abliterate.ablate(model, vector),
            "add": lambda: abliterate.add(model, vector, 3),
            "captured": lambda: capture_resid_pre(model, [-2, -1]),
        }
        with torch.inference_mode(), hooked[change]():
            model(ids)  # what is moved to the device once
            state.made = []
            model(ids)
        made, state.made = state.made, None
        stream = ids.numel() * 128
        library = [one for one in made if one.package == "transformers" and one.numel >= stream]
        assert len(library) > 50  # all that is made is seen
        assert any(one.dtype == torch.float32 for one in library)  # its norms compute so
        ours = [one for one in made if one.package == "abliterate"]
        assert ours or change == "ablate"
        assert {one.dtype for one in ours} <= {torch.bfloat16, torch.long}
        large = Counter(one.where for one in ours if one.numel >= stream)
        # The embedding's output is overwritten; what attention and MLPs give may be someone else's.
        assert sum(large.values()) == {"ablate": 2 * 8, "add": 1, "captured": 0}[change], large


def test_a_direction_a_row_takes_one_tensor_of_the_streams_size() -> None:
    """And so does an output that belongs to someone else, which must not be overwritten."""
    with accelerator.accelerator(float64=False) as state:
        written = torch.randn(4, 8, 64, device="emu", dtype=torch.bfloat16)
        units = torch.nn.functional.normalize(torch.randn(4, 64, device="emu"), dim=1).bfloat16()
        for one_each, inplace, expected in (
            (units[0], False, 1), (units, False, 1), (units[0], True, 0), (units, True, 0),
        ):  # fmt: skip
            state.made = []
            interventions.project_out(written, one_each, inplace)
            large = [one for one in state.made if one.numel >= written.numel()]
            assert len(large) == expected, large
            assert {one.dtype for one in state.made} == {torch.bfloat16}


def test_what_comes_from_the_host_is_pinned_and_not_waited_for() -> None:
    with _loaded() as (loaded, state):
        ids = encode(loaded.tokenizer, _TEXTS, ChatFormat())
        state.pinned = state.pageable = 0
        state.waits.clear()
        batch = left_pad(loaded.model, ids, range(3))
        assert state.pinned == 3 * batch.input_ids.numel() * 8
        assert state.pageable == 0
        assert not state.waits
        assert str(batch.input_ids.device) == "emu:0"
        assert batch.input_ids.cpu()[0, -len(ids[0]) :].tolist() == list(ids[0])


@pytest.mark.parametrize("change", ["ablate", "add"])
def test_hooks_wait_for_nothing_and_keep_the_dtype(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, torch.dtype, str]] = []

    def watched(plain: Any) -> Any:
        def run(value: torch.Tensor, *rest: Any) -> torch.Tensor:
            result = plain(value, *rest)
            seen.append((value.dtype, result.dtype, str(result.device)))
            return result

        return run

    for name in ("project_out", "shifted"):
        monkeypatch.setattr(interventions, name, watched(getattr(interventions, name)))
    with _loaded("bfloat16", float64=False) as (loaded, state):
        width = loaded.model.config.hidden_size
        vector = torch.randn(width, generator=torch.Generator().manual_seed(1))
        ids = torch.tensor([[1, 5, 9, 33]], device="emu")
        hooked = (
            abliterate.ablate(loaded.model, vector)
            if change == "ablate"
            else abliterate.add(loaded.model, vector, 3)
        )
        with torch.no_grad(), hooked:
            loaded.model(ids)
            seen.clear()
            state.waits.clear()
            for _ in range(3):
                loaded.model(ids)
        assert not state.waits, state.waits
    assert set(seen) == {(torch.bfloat16, torch.bfloat16, "emu:0")}
    assert len(seen) == 3 * (17 if change == "ablate" else 1)
