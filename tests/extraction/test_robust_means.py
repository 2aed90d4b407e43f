"""``--robust``: means that one prompt's outlying activations do not move."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

_N = 12


@pytest.fixture
def outlier(tiny, tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """A checkpoint with one enormous embedding row, and prompts of which one ends with it."""
    model = tmp_path / "model"
    shutil.copytree(tiny("llama"), model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    token = tokenizer("~", add_special_tokens=False).input_ids
    assert len(token) == 1
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][token[0]] *= 1e4
    save_file(tensors, path, {"format": "pt"})
    texts = [f"Tell me about number {n}, the {'abcdefghijkl'[n]}" for n in range(_N)]
    texts[7] += " ~"
    (tmp_path / "harmful.txt").write_text("\n".join(texts) + "\n")
    chat = [{"role": "user", "content": texts[7]}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    position = ids.index(token[0]) - len(ids)
    options = (
        "--harmful", str(tmp_path / "harmful.txt"), "--harmless", "harmless",
        "--n-train", str(_N), f"--positions={position},-1", "--refusal-token", "5",
        "--no-filter", "-q",
    )  # fmt: skip
    return model, options


def _read(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Means ``[positions, layers, d_model]`` and activations ``[n, ...]`` of harmful prompts."""
    rows = load_file(run / "activations.safetensors")["harmful"].double()
    return load_file(run / "directions.safetensors")["mean_harmful"], rows.transpose(1, 2)


def test_one_outlying_prompt_moves_the_mean_and_no_robust_one(
    outlier, cli: Callable, tmp_path: Path
) -> None:
    model, options = outlier
    keep = ("--save-activations", "--activation-positions", "all")
    found = {}
    for name, more in {
        "mean": (), "winsor": ("--robust", "winsor", "--winsor-quantile", "0.1"),
        "median": ("--robust", "median"),
        "streamed": ("--robust", "median", "--offload"),
    }.items():  # fmt: skip
        run = tmp_path / name
        done = cli(
            "extract", model, "-o", run, *options, *(() if name == "streamed" else keep), *more
        )
        assert done.code == 0, done.err
        found[name] = run
    plain, rows = _read(found["mean"])
    out = int(rows[:, 0].norm(dim=-1).sum(-1).argmax())  # prompts are drawn in another order
    inside = torch.cat([rows[:out], rows[out + 1 :]])
    # At the outlying token itself, in every layer; the other position hardly sees it.
    spread = inside[:, 0].std(0).norm(dim=-1)
    assert bool(((plain[0] - inside[:, 0].mean(0)).norm(dim=-1) > 10 * spread).all())
    winsor, median = (_read(found[name])[0] for name in ("winsor", "median"))
    for robust in (winsor, median):
        assert bool(((robust[0] - inside[:, 0].mean(0)).norm(dim=-1) < 2 * spread).all())
    # By the book: the second smallest and largest of twelve stand in for the extremes.
    ordered = rows.sort(0).values
    ordered[0], ordered[-1] = ordered[1], ordered[-2]
    assert torch.allclose(winsor, ordered.mean(0), atol=1e-9)
    # At the geometric median the unit vectors to all points cancel, unless it is one of them.
    away = rows - median
    distance = away.norm(dim=-1, keepdim=True)
    pull = (away / distance.clamp(min=1e-12)).sum(0).norm(dim=-1)
    on_one = (distance < 1e-9 * rows.norm(dim=-1).max()).any(0).squeeze(-1)
    assert bool(((pull < 1e-4) | on_one).all())
    streamed = load_file(found["streamed"] / "directions.safetensors")["mean_harmful"]
    assert torch.allclose(streamed, median, rtol=1e-4, atol=1e-3)
    records = {name: json.loads((run / "extract.json").read_text()) for name, run in found.items()}
    assert "robust" not in records["mean"]
    assert records["winsor"]["robust"] == {
        "mean": "winsor", "quantile": 0.1, "clipped": {"harmful": 1, "harmless": 1}
    }  # fmt: skip
    assert records["median"]["robust"] == {"mean": "median"}
    # How sure a candidate is follows the mean that is used.
    cosines = {n: torch.tensor(r["stability"]["split_half_cosine"][0]) for n, r in records.items()}
    assert float(cosines["median"].mean()) > float(cosines["mean"].mean())


def test_a_median_of_equal_rows_is_that_row() -> None:
    """The first layer at a template's token: every prompt has the same embedding there."""
    from abliterate.extraction.robust_means import robust_rows

    row = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(1)).double()
    rows = row.expand(9, 2, 5).clone()
    assert torch.allclose(robust_rows(rows, "median", 0.0).mean(0), row[0], rtol=1e-12)
    rows[3:, 1] += 1.0  # most of the points lie on one another: the median is there
    median = robust_rows(rows, "median", 0.0).mean(0)
    assert torch.allclose(median[1], row[0, 1] + 1.0, rtol=1e-6)


def test_a_quantile_of_no_prompt_is_said(tiny, cli: Callable, fails, tmp_path: Path) -> None:
    base = ("extract", tiny("llama"), "--n-train", "8", "--positions=-1", "--refusal-token", "5",
            "--no-filter", "--robust", "winsor")  # fmt: skip
    done = cli(*base, "-o", tmp_path / "run")
    assert done.code == 0
    assert "their plain mean is taken" in done.err
    assert "winsor-quantile" in fails(
        *base, "-o", tmp_path / "no", "--winsor-quantile", "0.5", code=2
    )
