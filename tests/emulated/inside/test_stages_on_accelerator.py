"""Every stage gives on an accelerator what it gives on the CPU.

Most run without float64, where they take another way than on the CPU; with it they take the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from on_device import MODEL, NAME, TRAIN, VAL, check_same, on_device, on_host
from safetensors.torch import load_file

_SCORES = ("bypass_score", "induce_score", "kl_divergence")
# Sums of float32 products in another order.
_CLOSE = 1e-4


def _record(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def check_directions(run: Path, reference: Path) -> None:
    """Every candidate points the same way."""
    found = []
    for folder in (run, reference):
        means = load_file(folder / "directions.safetensors")
        found.append((means["mean_harmful"] - means["mean_harmless"]).flatten(0, 1))
    ours, theirs = found
    lengths = theirs.norm(dim=1)
    real = lengths > 1e-3 * lengths.max()
    assert int(real.sum()) >= 8
    cosines = torch.nn.functional.cosine_similarity(ours[real], theirs[real], dim=1)
    assert float(cosines.min()) > 0.99999


def check_selection(run: Path, reference: Path) -> None:
    """The same winner, and every score that both measured."""
    ours, theirs = (_record(folder, "selection.json") for folder in (run, reference))
    assert ours["winner"] == theirs["winner"] is not None
    compared = 0
    for one, two in zip(ours["candidates"], theirs["candidates"], strict=True):
        for score in _SCORES:
            if None not in (one[score], two[score]):
                assert one[score] == pytest.approx(two[score], abs=_CLOSE)
                compared += 1
    assert compared >= 10
    check_same(ours["baselines"], theirs["baselines"], _CLOSE)


def test_extract_and_select_are_the_same(on_emu, on_cpu: Path) -> None:
    run, _, _ = on_emu
    assert NAME in _record(run, "extract.json")["device"]
    check_directions(run, on_cpu)
    check_selection(run, on_cpu)


def test_an_exhaustive_search_scores_all_layers_by_answers_the_same(
    on_cpu: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("emu", "cpu")]
    for folder in folders:
        shutil.copytree(on_cpu, folder)
    options = ("--all-layers", "--search", "exhaustive", "--kl-on", "response:2", *VAL,
               "--n-val", "2")  # fmt: skip
    on_device("select", folders[0], *options, float64=False)
    on_host("select", folders[1], *options)
    check_selection(*folders)


def test_saved_activations_are_the_same(tmp_path: Path) -> None:
    options = (*TRAIN, "--save-activations=2,5", "--refusal-token", "I")
    on_device("extract", MODEL, "-o", tmp_path / "emu", *options, float64=False)
    on_host("extract", MODEL, "-o", tmp_path / "cpu", *options)
    ours, theirs = (load_file(tmp_path / n / "activations.safetensors") for n in ("emu", "cpu"))
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-4)


def test_an_edited_checkpoint_is_the_same_and_holds_what_it_says(
    on_cpu: Path, edited_on_cpu: Path, tmp_path: Path
) -> None:
    edit = ("orthogonalize", MODEL, "--direction", on_cpu, "-q")
    on_device(*edit, "-o", tmp_path / "emu", "--device", "auto", float64=False)
    ours, theirs = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "emu", edited_on_cpu)
    )
    differing = sum(int((ours[name] != theirs[name]).sum()) for name in theirs)
    assert differing <= 1e-4 * sum(tensor.numel() for tensor in theirs.values())
    verify = ("verify", tmp_path / "emu", "--source", MODEL, "--direction", on_cpu, "--forward")
    state = on_device(*verify, "--n-prompts", "2", float64=False)
    if state is not None:
        assert state.synchronisations("abliterate", "residual_stream") <= 4  # one a prompt


def test_a_float32_checkpoint_is_edited_as_exactly(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(3)
    save_file({"direction": torch.randn(48, generator=generator)}, tmp_path / "r.safetensors")
    edit = ("orthogonalize", tiny("llama-bias"), "--direction", tmp_path / "r.safetensors", "-q")
    on_device(*edit, "-o", tmp_path / "emu", "--device", NAME, float64=False)
    on_host(*edit, "-o", tmp_path / "cpu")
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("emu", "cpu"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_evaluation_is_the_same(on_cpu: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"A plain sentence, the {n}th of some." for n in range(3, 5)))
    options = ("--direction", on_cpu, "--n-test", "1", "--max-new-tokens", "3", "-q",
               "--dtype", "float32", "--corpus", f"pile={texts}", "--intervention", "ablate",
               "--intervention", "add", "--controls", "1")  # fmt: skip
    on_device("evaluate", MODEL, *options, "-o", tmp_path / "emu", float64=False)
    on_host("evaluate", MODEL, *options, "-o", tmp_path / "cpu")
    ours, theirs = (
        _record(tmp_path / name, "evaluation.json")["interventions"] for name in ("emu", "cpu")
    )
    assert list(theirs) == ["ablate", "add"]
    check_same(ours, theirs, _CLOSE)
    answers = sorted((tmp_path / "cpu" / "completions").glob("*.jsonl"))
    assert answers
    for file in answers:
        assert (tmp_path / "emu" / "completions" / file.name).read_bytes() == file.read_bytes()


def test_analyses_are_the_same(on_cpu: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("emu", "cpu")]
    commands = (
        ("trace", "--suffix", " please now", "--n-prompts", "2", "--dtype", "float32"),
        ("inspect", "--dtype", "float32"),
        (
            "fragility",
            "--steps",
            "2",
            "--n-test",
            "1",
            "--max-new-tokens",
            "2",
            "--controls",
            "1",
            "--dtype",
            "float32",
        ),
    )
    for folder in folders:
        shutil.copytree(on_cpu, folder)
    for command, *options in commands:
        state = on_device(command, folders[0], *options, "-q", float64=False)
        assert state is None or not state.synchronisations("abliterate", "hook")
        on_host(command, folders[1], *options, "-q")
    wanted = {"trace": ("cosines", "heads"), "inspect": ("layers",), "fragility": ("points",)}
    for name, keys in wanted.items():
        ours, theirs = (_record(folder, f"{name}.json") for folder in folders)
        for key in keys:
            assert theirs[key]
            check_same(ours[key], theirs[key], 1e-3)


def test_an_audit_says_the_same(edited_on_cpu: Path, capfd) -> None:
    said = []
    for device in (NAME, "cpu"):
        capfd.readouterr()
        on_device("audit", edited_on_cpu, "--json", "--device", device, code=7)
        said.append(json.loads(capfd.readouterr().out))
    check_same(*said, _CLOSE)


def test_a_streamed_model_parks_what_waits_and_gives_the_same(on_cpu: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kind = {"float64": False}
    state = on_device("extract", MODEL, "-o", run, *TRAIN, "--offload", **kind)
    assert state is None or state.synchronisations("abliterate", "Parked.put") > 0
    on_device("select", run, *VAL, "--offload", **kind)
    check_directions(run, on_cpu)
    check_selection(run, on_cpu)
