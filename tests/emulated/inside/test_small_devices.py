"""Accelerators that run out of memory, that are several, or that are asked for in vain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from on_device import MODEL, TRAIN, VAL, accelerator, on_device, on_host
from safetensors.torch import load_file

import abliterate
from abliterate import precision
from abliterate.direction import save_direction
from abliterate.errors import UsageError
from abliterate.inference.forward import Batch, for_each_batch, last_logits
from abliterate.inference.logit_lens import logit_lens
from abliterate.inference.token_batches import TokenBudget, budget_record
from abliterate.models.loading import pick_device

_WEIGHTS = 9_000_000  # of the demo model in float32


def _directions(run: Path) -> torch.Tensor:
    means = load_file(run / "directions.safetensors")
    return means["mean_harmful"] - means["mean_harmless"]


def test_batches_shrink_until_they_fit(on_cpu: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tight = _WEIGHTS + 1_000_000
    state = on_device("extract", MODEL, "-o", run, *TRAIN, "--no-offload", memory=tight)
    assert state.refused > 0
    assert state.peak <= tight
    assert state.forwards > 2 + 2  # the trial of padding, and a batch of each kind
    difference = _directions(run) - _directions(on_cpu)
    assert difference.norm() <= 1e-5 * _directions(on_cpu).norm()


def test_batches_are_as_large_as_what_is_free_has_room_for(tiny: Callable[..., Path]) -> None:
    """By what the first of them takes, not by a constant; nothing runs out."""
    prompts = [[(7 * row + at) % 500 + 3 for at in range(40)] for row in range(250)]
    largest = {}
    precision._computes_float64.cache_clear()
    for memory in (16_000_000, 160_000_000):
        with accelerator.accelerator(float64=False, memory=memory) as state:
            model = abliterate.load_model(str(tiny("llama")), "emu", "float32").model
            sizes: list[int] = []

            def run(batch: Batch, model=model, sizes=sizes) -> None:
                sizes.append(batch.input_ids.numel())
                last_logits(model, batch)

            with torch.inference_mode():
                for_each_batch(model, prompts, run)
            assert state.refused == 0
            assert state.peak <= memory
            assert sum(sizes) == 250 * 40
            assert sizes[0] <= 4096
            largest[memory] = max(sizes)
            assert budget_record(model) == {"batch_tokens": max(sizes)}
    assert largest[16_000_000] < 4096 < largest[160_000_000]


def test_a_budget_is_a_share_of_what_is_free_by_what_a_token_takes() -> None:
    with accelerator.accelerator(memory=10_000_000):
        device = torch.device("emu")
        held = torch.zeros(500_000, device="emu")  # 2 MB are taken, 8 MB are free
        budget = TokenBudget(device, measure=True)
        assert budget.tokens == 4096

        def run(each: int) -> None:
            torch.zeros(100 * each, dtype=torch.uint8, device="emu")

        for each, tokens in ((1000, 4096), (100, 4096), (2000, 2048)):  # never more than was known
            assert budget.try_batch(lambda each=each: run(each), 2, 100, lambda: "")
            assert budget.tokens == tokens, each
        assert budget.largest == 100
        assert not budget.try_batch(lambda: run(1_000_000), 2, 100, lambda: "")
        assert budget.tokens == 50  # and what it has learned is not believed any more
        assert TokenBudget(device, 8, measure=True).rows == 8
        assert TokenBudget(device).tokens == 32768  # nobody measures
        assert held.device.type == "emu"


def test_what_does_not_fit_is_streamed(on_cpu: Path, tmp_path: Path, capfd) -> None:
    capfd.readouterr()
    run = tmp_path / "run"
    small = {"memory": 6_000_000, "float64": False}
    on_device("extract", MODEL, "-o", run, *TRAIN[:-1], **small)
    assert "of emu is free: its layers are streamed from disk" in capfd.readouterr().err
    assert json.loads((run / "extract.json").read_text())["offload"]["passes"] > 0
    difference = _directions(run) - _directions(on_cpu)
    assert difference.norm() <= 1e-5 * _directions(on_cpu).norm()


def test_what_does_not_fit_at_all_is_said_in_one_line(tmp_path: Path, capfd) -> None:
    on_device("extract", MODEL, "-o", tmp_path / "run", *TRAIN, "--no-offload", code=2,
              memory=_WEIGHTS + 60_000)  # fmt: skip
    (line,) = [one for one in capfd.readouterr().err.splitlines() if one.startswith("error: ")]
    assert "memory ran out (emu out of memory." in line
    assert "use a smaller --batch-size or --dtype, --offload, or another --device" in line


def test_plan_counts_the_accelerators_own_memory(capfd) -> None:
    capfd.readouterr()
    on_device("plan", MODEL, "--json", memory=6_000_000)
    document = json.loads(capfd.readouterr().out)
    assert document["machine"]["gpu_memory"] == 6_000_000
    assert document["machine"]["matmul"] is None  # no room to measure it
    assert document["mode"] == "in memory"  # bfloat16 there: 4 MB of weights
    on_device("plan", MODEL, "--json", "--dtype", "float32", memory=6_000_000)
    assert json.loads(capfd.readouterr().out)["mode"] == "offload"


def test_a_model_lies_on_two_devices(on_cpu: Path, tmp_path: Path) -> None:
    names = [f"model.layers.{layer}" for layer in range(8)]
    spread = {name: f"emu:{at // 4}" for at, name in enumerate(names)}
    spread |= {"model.embed_tokens": "emu:0", "model.rotary_emb": "emu:0"}
    spread |= {"model.norm": "emu:1", "lm_head": "emu:1"}
    run = tmp_path / "run"
    options = ("--device-map", json.dumps(spread))
    on_device("extract", MODEL, "-o", run, *TRAIN, *options, devices=2, float64=False)
    on_device("select", run, *VAL, "--n-val", "4", *options, devices=2, float64=False)
    difference = _directions(run) - _directions(on_cpu)
    assert difference.norm() <= 1e-5 * _directions(on_cpu).norm()
    ours, theirs = (json.loads((f / "selection.json").read_text()) for f in (run, on_cpu))
    assert ours["winner"] == theirs["winner"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--device", "emu:2"), "--device emu:2 does not exist: this machine has emu:0 to emu:1"),
        (("--device", "cuda"), "--device cuda is not on this machine, or its torch lacks it: use "
                               "auto or cpu or emu"),
        (("--device", "emulated"), "--device emulated is no device that torch knows: use auto"),
        (("--device-map", '{"": 2}'), "--device-map: '2' of '' does not exist: this machine has"),
    ],
)  # fmt: skip
def test_devices_that_are_not_there_are_refused(
    options: tuple[str, ...], line: str, tmp_path: Path, capfd
) -> None:
    on_device("extract", MODEL, "-o", tmp_path / "run", *options, "-q", code=2, devices=2)
    (error,) = [one for one in capfd.readouterr().err.splitlines() if one.startswith("error: ")]
    assert line in error


def test_each_rank_of_a_machine_gets_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with accelerator.accelerator(devices=2):
        assert pick_device("auto") == pick_device("emu") == torch.device("emu", 1)
        assert pick_device("emu:0") == torch.device("emu", 0)
    with (
        accelerator.accelerator(devices=1),
        pytest.raises(UsageError, match="local rank 1 finds no emu device of its own"),
    ):
        pick_device("auto")


def test_a_direction_may_lie_on_the_device(tmp_path: Path) -> None:
    """As a library's caller has it who computed it there."""
    vector = torch.randn(128, generator=torch.Generator().manual_seed(2))
    precision._computes_float64.cache_clear()
    with accelerator.accelerator(float64=False):
        here = vector.to("emu")
        found = abliterate.Direction(here, -1, 3)
        assert found.summary()["norm"] == pytest.approx(float(vector.norm()))
        save_direction(tmp_path / "r.safetensors", found, "demo")
        loaded = abliterate.load_model(MODEL, device="emu", dtype="float32")
        ids = torch.tensor([[1, 5, 9, 33]], device="emu")
        logits = []
        for same in (here, vector):
            with torch.no_grad(), abliterate.ablate(loaded.model, same):
                logits.append(loaded.model(ids).logits.cpu())
        assert torch.equal(*logits)
        assert logit_lens(loaded.model, here[None]).shape == (1, 2048)
        abliterate.orthogonalize(MODEL, found, tmp_path / "edited")
    assert torch.equal(load_file(tmp_path / "r.safetensors")["direction"], vector)
    assert (tmp_path / "edited" / "model.safetensors").exists()


def test_float64_is_refused_where_there_is_none(tmp_path: Path, capfd) -> None:
    options = ("--dtype", "float64", "-q")
    on_device("extract", MODEL, "-o", tmp_path / "run", *options, code=2, float64=False)
    assert "--dtype float64: emu has no float64: use float32" in capfd.readouterr().err


def test_a_conversation_is_the_same(on_cpu: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    import io

    said = []
    for run in (on_device, on_host):
        monkeypatch.setattr("sys.stdin", io.StringIO("How do I bake bread?\n/ablate\nHello\n"))
        capfd.readouterr()
        options = ("--direction", on_cpu, "--max-new-tokens", "4", "--dtype", "float32", "-q")
        run("chat", MODEL, *options)
        said.append(capfd.readouterr().out)
    assert said[0] == said[1]
    assert len(said[0]) > 20
