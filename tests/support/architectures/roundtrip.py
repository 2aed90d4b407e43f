"""Takes a tiny random model of one architecture through the command line and measures the result.

The test suite asserts on the outcome; ``scripts/architectures.py`` makes the published table of it.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from abliterate import ablate, add
from abliterate.cli.app import main
from abliterate.writers import Gain, find_writers, stream_width
from abliterate.writers.residual_stream import leak

IDS = torch.randint(3, 100, (2, 13), generator=torch.Generator().manual_seed(3))

Shape = frozenset[tuple[object, ...]]


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture.

    Attributes:
        writers: parameters that write to the stream.
        tensors: tensors on disk that were edited.
        gains: some writers have a direction of their own: behind a gain, or for some channels.
        before: leak of the unedited model.
        hooked: leak under ``ablate``.
        edited: leak of the edited checkpoint, reloaded; None if it was refused.
        difference: largest difference between logits of the edited and the hooked model.
        verified: ``verify --source`` passed.
        refusal: the error, if there is no edited checkpoint.
        shape: what kinds of writers there are, and how each is edited: architectures of one shape
            take the same way through the editor.
        added: the largest difference between logits of a model under ``add`` and of the checkpoint
            with the addition baked in, or the error that refuses it.
    """

    writers: int
    tensors: int
    gains: bool
    before: float
    hooked: float
    edited: float | None
    difference: float | None
    verified: bool
    refusal: str
    shape: Shape = frozenset()
    added: float | str = ""


def abliterate(*args: str | Path) -> tuple[int, str, str]:
    """Run the command line in process; exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(arg) for arg in args])
    return code, out.getvalue(), err.getvalue()


def _shape(model: PreTrainedModel) -> Shape:
    def gain(each: Gain) -> tuple[object, ...]:
        return each.parameter is None, each.offset, each.centred, each.index

    return frozenset(
        (
            writer.kind,
            writer.axis,
            model.get_parameter(writer.parameter).ndim,
            writer.bias,
            writer.part is None,
            *map(gain, writer.gains),
        )
        for writer in find_writers(model).writers
    )


def _logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False)[0].double()


def round_trip(make: Callable[[], PreTrainedModel], folder: Path) -> Outcome:
    """Save a model in several shards, edit it through the command line, reload and measure."""
    model = make()
    model.save_pretrained(folder / "source", max_shard_size="200KB")
    plan = find_writers(model)
    width = stream_width(model, plan)
    direction = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    save_file({"direction": direction}, folder / "direction.safetensors", {"layer": "1"})
    before = leak(model, direction, IDS, plan.blocks)
    with ablate(model, direction):
        hooked = leak(model, direction, IDS, plan.blocks)
        expected = _logits(model)

    from_, to = ("--direction", folder / "direction.safetensors"), folder / "edited"
    code, out, err = abliterate("orthogonalize", folder / "source", *from_, "-o", to, "--json")
    common: dict[str, Any] = {
        "writers": len({writer.parameter for writer in plan.writers}),
        "gains": any(writer.gains or writer.part for writer in plan.writers),
        "before": before,
        "hooked": hooked,
        "shape": _shape(model),
        "added": _baked_addition(model, direction, folder),
    }
    if code != 0:
        assert not to.exists()
        reason = err.strip().splitlines()[-1].removeprefix("error: ")
        return Outcome(
            **common, tensors=0, edited=None, difference=None, verified=False, refusal=reason
        )
    # The edited checkpoint brings its own configuration, untied where the source was tied.
    edited, info = type(model).from_pretrained(
        to, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    verified, _, _ = abliterate("verify", to, *from_, "--source", folder / "source", "--json")
    edited.eval()
    return Outcome(
        **common,
        tensors=len(json.loads(out)["tensors"]),
        edited=leak(edited, direction, IDS, plan.blocks),
        difference=float((_logits(edited) - expected).abs().max()),
        verified=verified == 0,
        refusal="",
    )


def _baked_addition(model: PreTrainedModel, direction: torch.Tensor, folder: Path) -> float | str:
    """The addition before layer 1 as a bias, against ``add`` on the unedited model."""
    from_, to = ("--direction", folder / "direction.safetensors"), folder / "added"
    code, _, err = abliterate("orthogonalize", folder / "source", *from_, "-o", to, "--add", "1.5")
    if code != 0:
        assert code == 4, err
        assert not to.exists()
        return err.strip().splitlines()[-1].removeprefix("error: ")
    code, out, _ = abliterate("verify", to, *from_, "--source", folder / "source")
    assert code == 0, out
    edited, info = type(model).from_pretrained(
        to, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    with add(model, direction, 1, 1.5):
        expected = _logits(model)
    assert (expected - _logits(model)).abs().max() > 1e-3
    return float((_logits(edited.eval()) - expected).abs().max())


def half_precision(make: Callable[[], PreTrainedModel], folder: Path) -> tuple[float, bool]:
    """The same for a checkpoint stored in bfloat16: the leak that rounding leaves, and verify."""
    folder.mkdir()
    model = make()
    plan = find_writers(model)
    width = stream_width(model, plan)
    direction = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    save_file({"direction": direction}, folder / "direction.safetensors")
    model.to(torch.bfloat16).save_pretrained(folder / "source")
    from_, to = ("--direction", folder / "direction.safetensors"), folder / "edited"
    code, _, err = abliterate("orthogonalize", folder / "source", *from_, "-o", to)
    assert code == 0, err
    edited = type(model).from_pretrained(to, dtype=torch.float32, attn_implementation="eager")
    verified, _, _ = abliterate("verify", to, *from_, "--source", folder / "source")
    return leak(edited.eval(), direction, IDS, plan.blocks), verified == 0
