"""Every decoder-only architecture of transformers, through the command line.

A type is edited and then exact (leak, verify, and agreement with ``ablate``), or it is refused by
name with its reason; none is edited in part.
"""

from __future__ import annotations

import importlib.util
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import transformers
from architectures.page import row
from architectures.roundtrip import Outcome, Shape, half_precision, round_trip
from architectures.zoo import (
    TABLE,
    VISION_LANGUAGE,
    decoder_only_types,
    require_running,
    shallow_model,
    shallow_vision_language_model,
)
from transformers import PreTrainedModel

from abliterate import add
from abliterate.errors import UnsupportedArchitectureError
from abliterate.extraction.mean_activations import mean_resid_pre
from abliterate.writers import find_writers, stream_width

# No constant edit of the weights is exact for these: what each refusal has to name.
REFUSED = {
    "ctrl": "adds the buffer transformer.pos_encoding",
    "doge": "per-channel gain model.layers.1.input_residual",
    "dory": "model.layers.0: multiplied per channel by a gate",
    "gemma3n_text": "the residual stream, or a normed copy of it, is added",
    "longcat_flash": "the residual stream, or a normed copy of it, is added",
    "minimax": "per-channel gain model.layers.1.input_layernorm.weight",
    "openai-gpt": "per-channel gain transformer.h.1.ln_1.weight",
    "qwen4_exp": "passes through silu",
    "qwen4_exp_text": "passes through silu",
    "rwkv": "rwkv.blocks.0.feed_forward: multiplied per channel by a gate",
    "xglm": "adds the buffer model.embed_positions.weights",
    "zaya": "per-channel gain model.layers.1.post_attention_residual_scale.residual_scale",
}


# Where a bias of the MLP before a layer can hold the addition; all others are refused by name.
ADDED = {
    "arcee", "biogpt", "bloom", "codegen", "cwm", "deepseek_v2", "fuyu", "gpt2", "gpt_bigcode",
    "gpt_neo", "gpt_neox", "gptj", "granite", "granite_swa", "helium", "iquestcoder", "jais2",
    "llama", "minicpm3", "nemotron", "opt", "persimmon", "phi", "recurrent_gemma", "reformer",
    "seed_oss", "smollm3", "starcoder2",
}  # fmt: skip
# Their blocks see other positions than the prompt's tokens.
NO_TOKENS = {"blt": "byte patches", "cpmant": "a prefix of the model's own"}
# Its dynamic mask keeps a fixed number of positions, padding included, of the tiny window here.
UNEVEN = {"doge"}
# They run blocks several times over; what is seen of a layer is its last run.
RECURRENT = {"dory", "hrm_text"}
# The first type that was edited in bfloat16 for a shape of plan: rounding knows no other.
ROUNDED: dict[Shape, str] = {}
PROMPTS = [list(range(first, first + n)) for first, n in ((3, 8), (20, 12), (40, 16), (60, 8))]


def _cells(name: str, heading: str) -> list[str]:
    """The row of a type on the published page, behind a heading."""
    rows = TABLE.partition(heading)[2].splitlines()
    (row, *_) = [row for row in rows if row.startswith(f"| {name} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def _is_published(name: str, outcome: Outcome, heading: str = "# Architectures") -> None:
    """The page says what was measured, but for the digits of what is rounding."""
    if transformers.__version__ not in TABLE:
        return  # made with another release
    measured = [cell.strip() for cell in row(name, outcome).strip("|").split("|")]
    *said, rounding = _cells(name, heading)
    for ours, theirs in zip(said, measured, strict=False):
        if "." in ours and ours.replace(".", "").replace("e-", "").isdigit():
            assert float(ours) == pytest.approx(float(theirs), rel=0.1, abs=0.011), name
        else:
            assert ours == theirs, name
    assert len(said) + 1 == len(measured)
    assert float(rounding) <= 1e-5


def _assert_exact(outcome: Outcome) -> None:
    assert outcome.edited is not None, outcome.refusal
    assert outcome.before > 0.03
    assert outcome.edited <= 1e-5
    assert outcome.hooked <= 1e-5
    assert outcome.verified
    assert outcome.tensors >= outcome.writers > 0
    if not outcome.gains:
        assert outcome.difference is not None
        assert outcome.difference <= 1e-4


@pytest.fixture(scope="module", params=decoder_only_types())
def model_type(request: pytest.FixtureRequest) -> str:
    """Each type in turn, for all tests of one after the other."""
    return str(request.param)


@pytest.fixture(scope="module")
def model(model_type: str) -> PreTrainedModel:
    """A small one of the type, which nothing changes."""
    made = shallow_model(model_type)
    require_running(made)
    return made


def test_every_architecture_is_exact_or_refused(
    model_type: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    """Exact in float32; in bfloat16 rounding bounds the leak, once for every shape of plan."""
    outcome = round_trip(lambda: model, tmp_path)
    if isinstance(outcome.added, float):
        assert outcome.added <= 1e-4
        assert model_type in ADDED
    else:
        assert model_type not in ADDED, outcome.added
        assert f"'{model_type}" in outcome.added or REFUSED.get(model_type, "?") in outcome.added
    _is_published(model_type, outcome)
    if model_type not in REFUSED:
        _assert_exact(outcome)
        if ROUNDED.setdefault(outcome.shape, model_type) == model_type:
            left, verified = half_precision(lambda: deepcopy(model), tmp_path / "half")
            assert left <= 1e-3
            assert verified
        return
    assert outcome.edited is None
    assert outcome.hooked <= 1e-5  # under hooks the stream is clean even there
    assert "cannot be made exact" in outcome.refusal
    assert REFUSED[model_type] in outcome.refusal
    assert "--allow-leak" in outcome.refusal


@pytest.mark.parametrize("wrapper", VISION_LANGUAGE)
def test_text_decoders_of_vision_language_models(wrapper: str, tmp_path: Path) -> None:
    outcome = round_trip(lambda: shallow_vision_language_model(wrapper), tmp_path)
    _assert_exact(outcome)
    _is_published(wrapper, outcome, "## Vision-language wrappers")


def test_the_published_page_is_what_the_script_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the figures, which the other tests compare."""
    # By its path: it has the name of the package that it reads.
    path = Path(__file__).parents[2] / "scripts" / "architectures.py"
    spec = importlib.util.spec_from_file_location("architectures_script", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.with_lists(TABLE) == TABLE
    monkeypatch.setattr(script, "VISION_LANGUAGE", ("gemma3",))
    monkeypatch.setattr(script, "tqdm", iter)
    made = script.with_wrappers(TABLE)
    before, _, rest = TABLE.partition("## Vision-language wrappers")
    assert made.startswith(before)
    assert made.endswith(rest.partition("## Not in the table")[2])
    rows = [line.split("|")[1].strip() for line in rest.splitlines() if line.startswith("| ")]
    assert rows == ["type", *VISION_LANGUAGE]
    (row_of,) = [line for line in made.splitlines() if line.startswith("| gemma3 |")]
    assert row_of.rpartition(" | ")[0] in TABLE
    excluded = rest.partition("## Not in the table")[2]
    for line in excluded.splitlines():
        names = line.rpartition(": ")[2].split(", ")
        if {*names} & {*VISION_LANGUAGE}:
            assert "exact, see above" in line


def test_means_do_not_depend_on_batching_in_any_architecture(
    model_type: str, model: PreTrainedModel
) -> None:
    """Padding where it is masked, batches of one length where it is not; several streams too."""
    plan = find_writers(model)
    if model_type in NO_TOKENS:
        with pytest.raises(UnsupportedArchitectureError, match="no resid_pre of a token"):
            mean_resid_pre(model, PROMPTS, [-1])
        return
    alone, _ = mean_resid_pre(model, PROMPTS, [-2, -1], batch_size=1)
    together, _ = mean_resid_pre(model, PROMPTS, [-2, -1], batch_size=4)
    assert alone.shape == (2, len(plan.blocks), stream_width(model, plan))
    if model_type not in UNEVEN:
        assert (together - alone).norm() <= 1e-6 * alone.norm()
    # A vector added at the middle block shows in every stream from there on, and not before.
    middle = len(plan.blocks) // 2
    vector = 3 * torch.ones(alone.shape[-1], dtype=torch.float64)
    with add(model, vector, middle):
        added, _ = mean_resid_pre(model, PROMPTS, [-2, -1], batch_size=1)
    if model_type not in RECURRENT:
        assert (added - alone)[:, :middle].norm() == 0
    assert (added - alone)[:, middle:].flatten(1).norm(dim=1).min() > 0
