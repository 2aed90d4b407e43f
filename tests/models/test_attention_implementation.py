"""``--attn-implementation``: what computes attention is chosen, recorded, and never fetched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from abliterate.models.attention import attention_failure
from abliterate.resources import demo_model_dir

MODEL = str(demo_model_dir())
SMALL = ("--n-train", "8", "--positions=-1", "--refusal-token", "I", "--no-filter", "-q")


def _record(run: Path) -> Any:
    return json.loads((run / "extract.json").read_text())


def _means(run: Path) -> torch.Tensor:
    return load_file(run / "directions.safetensors")["mean_harmful"]


@pytest.mark.parametrize("streamed", ["--no-offload", "--offload"])
def test_the_chosen_implementation_computes_and_is_recorded(
    streamed: str, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    used = {}
    for name in ("auto", "eager"):
        options = (streamed, "--attn-implementation", name)
        assert cli("extract", MODEL, "-o", tmp_path / name, *SMALL, *options).code == 0
        record = _record(tmp_path / name)
        assert record["settings"]["model"]["attn_implementation"] == name
        used[name] = record["attention"]
    assert used == {"auto": "sdpa", "eager": "eager"}
    auto, eager = _means(tmp_path / "auto"), _means(tmp_path / "eager")
    assert not torch.equal(auto, eager)  # other code has run
    assert torch.allclose(auto, eager, atol=1e-4)
    assert _record(tmp_path / "auto")["inputs"] != _record(tmp_path / "eager")["inputs"]


def test_later_stages_take_it_from_the_record_unless_they_are_told(
    tmp_path: Path, cli: Callable[..., Any]
) -> None:
    run = tmp_path / "run"
    assert cli("extract", MODEL, "-o", run, *SMALL, "--attn-implementation", "eager").code == 0
    for options, used in (((), "eager"), (("--attn-implementation", "auto"), "sdpa")):
        cli("select", run, "--n-val", "2", "--no-filter", "-q", *options)
        assert json.loads((run / "selection.json").read_text())["attention"] == used


@pytest.mark.parametrize("streamed", ["--no-offload", "--offload"])
def test_a_name_that_the_model_does_not_have_is_told_with_those_that_it_has(
    streamed: str, tmp_path: Path, fails: Callable[..., str]
) -> None:
    command = ("extract", MODEL, "-o", tmp_path / "run", *SMALL, streamed, "--attn-implementation")
    line = fails(*command, "fast", code=2)
    assert line == (
        "error: --attn-implementation fast is none that a 'llama' model has here: use auto, eager, "
        "sdpa or flex_attention"
    )
    # Without its package transformers would fetch a kernel from the hub, and run it.
    assert "flash_attention_2 is none" in fails(*command, "flash_attention_2", code=2)


def test_a_kernel_on_the_hub_is_no_name(tmp_path: Path, fails: Callable[..., str]) -> None:
    command = ("extract", MODEL, "-o", tmp_path / "run", *SMALL, "--attn-implementation")
    line = fails(*command, "kernels-community/flash-attn2", code=2)
    assert "must be auto, eager, sdpa" in line


def test_what_an_implementation_needs_and_lacks_is_an_error_of_the_option() -> None:
    said = ValueError("Flash Attention 2 requires a GPU:\nfound none")
    failure = attention_failure("flash_attention_2", said)
    assert failure is not None
    assert failure.exit_code == 2
    assert "attn_implementation flash_attention_2 cannot be used here: Flash" in str(failure)
    assert attention_failure("auto", said) is None
    assert attention_failure("eager", ValueError("no such file")) is None
