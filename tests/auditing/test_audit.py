"""audit and diff: edits are found, named and undone by nothing; what is unedited stays so."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

from abliterate.auditing import component_pools, soft_null_space
from abliterate.auditing.eigengap_test import SoftNullProjector, gap, of_matrix, p_agreement
from abliterate.direction_loading import load_direction
from abliterate.resources import demo_model_dir

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def direction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    save_file({"direction": _vector()}, path)
    return path


def _vector(width: int = 128) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def _cosine(path: Path, width: int = 128) -> float:
    found, true = load_file(path)["direction"].double(), _vector(width)
    return abs(float(found @ true)) / float(found.norm() * true.norm())


def _edit(cli: Cli, source: Path, direction: Path, out: Path, *options: str) -> Path:
    result = cli("orthogonalize", source, "--direction", direction, "-o", out, "-q", *options)
    assert result.code == 0, result.err
    return out


def _anonymous(folder: Path) -> Path:
    """Without its record and card, as someone who hides the edit would leave it."""
    (folder / "abliterate.json").unlink()
    (folder / "README.md").unlink()
    return folder


def test_the_unedited_model_is_clean(cli: Cli) -> None:
    result = cli("audit", demo_model_dir(), "--json")
    assert result.code == 0
    found = result.json
    assert found["verdict"] == "clean"
    assert found["writers"]["p_value"] > 1e-3
    assert found["writers"]["detectable_scale"] <= 0.8
    assert found["units"] == []


@pytest.mark.parametrize(
    ("options", "least", "style", "embeddings"),
    [
        ((), 0.9999, "all writers", True),
        (("--components", "attention,mlp"), 0.9999, "attention and MLP only", False),
        (("--layers", "3-5"), 0.999, "layers 3-5", False),
        (("--norm-preserve",), 0.99, "norm-preserving", True),
        (("--scale", "0.8"), 0.98, None, True),
        (("--scale", "0.5"), 0.85, None, None),
    ],
)
def test_edits_are_found_without_a_base(
    cli: Cli,
    direction: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    least: float,
    style: str | None,
    embeddings: bool | None,
) -> None:
    edited = _anonymous(_edit(cli, demo_model_dir(), direction, tmp_path / "edited", *options))
    recovered = tmp_path / "found" / "direction.safetensors"
    result = cli("audit", edited, "--json", "-o", recovered)
    assert result.code == 7, result.err
    found = result.json
    assert (found["verdict"], found["evidence"]) == ("edited", "writers")
    assert found["writers"]["p_value"] < 1e-7
    assert _cosine(recovered) > least
    assert "nothing in the checkpoint declares this edit" in found["warnings"]
    if style is not None:
        assert style in found["style"]
    if embeddings is not None:
        assert found["embeddings"] is embeddings
    if not options:
        assert found["full"]
        assert all(unit["carries"] and unit["removed"] > 0.99 for unit in found["units"])
    if "--layers" in options:
        carrying = {unit["layer"] for unit in found["units"] if unit["carries"]}
        assert carrying == {3, 4, 5}


def test_a_direction_behind_gains_and_centring_is_that_of_the_stream(
    cli: Cli, tmp_path: Path
) -> None:
    """Gemma 2 has a gain behind every writer of its blocks; GPT-2 has biases and Conv1D."""
    common = {"vocab_size": 300, "tie_word_embeddings": True, "pad_token_id": 0}
    torch.manual_seed(0)
    gemma = Gemma2Config(
        **common, hidden_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=160,
    )  # fmt: skip
    gpt2 = GPT2Config(**common, n_embd=64, n_layer=6, n_head=4, n_positions=64)
    path = tmp_path / "direction.safetensors"
    save_file({"direction": _vector(64)}, path)
    for name, config in (("gemma", gemma), ("gpt2", gpt2)):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.5 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / name)
        assert cli("audit", tmp_path / name, "-q").code == 0
        edited = _anonymous(_edit(cli, tmp_path / name, path, tmp_path / f"{name}-edited"))
        blind = cli("audit", edited, "--json", "-o", tmp_path / f"{name}.safetensors")
        assert blind.code == 7
        assert blind.json["style"] == "all writers"
        assert _cosine(tmp_path / f"{name}.safetensors", 64) > 0.999
        assert blind.json["biases"] is (True if name == "gpt2" else None)
        compared = cli(
            "audit", edited, "--base", tmp_path / name, "--json",
            "-o", tmp_path / f"{name}-base.safetensors",
        )  # fmt: skip
        assert compared.code == 7
        assert compared.json["evidence"] == "base"
        assert compared.json["base"]["beyond"] == []
        assert _cosine(tmp_path / f"{name}-base.safetensors", 64) > 0.999


def test_a_base_shows_weak_edits_and_what_else_differs(
    cli: Cli, direction: Path, tmp_path: Path
) -> None:
    edited = _anonymous(
        _edit(cli, demo_model_dir(), direction, tmp_path / "edited", "--scale", "0.3")
    )
    recovered = tmp_path / "found.safetensors"
    base = ("--base", demo_model_dir())
    result = cli("audit", edited, *base, "--json", "-o", recovered)
    assert result.code == 7
    assert _cosine(recovered) > 0.999
    assert result.json["removed"] == pytest.approx(0.3, abs=0.02)
    assert result.json["base"]["beyond"] == []
    writers = {t["name"] for t in result.json["base"]["tensors"] if t["state"] == "rank 1"}
    assert len(writers) >= 16

    tensors = load_file(edited / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    save_file(tensors, edited / "model.safetensors", {"format": "pt"})
    result = cli("audit", edited, *base, "--json")
    assert result.json["base"]["beyond"] == ["model.norm.weight"]
    assert any("beyond the edit" in warning for warning in result.json["warnings"])


def test_a_base_that_was_tuned_or_copied_shows_no_edit(cli: Cli, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(demo_model_dir(), copy)
    result = cli("audit", copy, "--base", demo_model_dir(), "--json")
    assert result.code == 0
    assert result.json["evidence"] == "base"
    assert cli("diff", demo_model_dir(), copy).out.splitlines()[-1].startswith("unchanged: ")

    generator = torch.Generator().manual_seed(1)
    tensors = load_file(copy / "model.safetensors")
    for name, value in tensors.items():
        noise = torch.randn(value.shape, generator=generator) * value.float().square().mean().sqrt()
        tensors[name] = (value.float() + 0.05 * noise).to(value.dtype)
    # A rank 1 change that is no projection: it adds what the matrix never had.
    name = "model.layers.2.mlp.down_proj.weight"
    shape = tensors[name].shape
    tensors[name] = load_file(demo_model_dir() / "model.safetensors")[name] + torch.outer(
        torch.ones(shape[0]), torch.randn(shape[1], generator=generator)
    ).to(torch.bfloat16)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    result = cli("audit", copy, "--base", demo_model_dir(), "--json")
    assert result.code == 0, result.out
    states = {t["name"]: t["state"] for t in result.json["base"]["tensors"]}
    assert states.pop(name) == "rank 1"
    assert set(states.values()) == {"dense"} | (
        {"rank 1"} if "rank 1" in states.values() else set()
    )
    assert states["model.layers.3.mlp.down_proj.weight"] == "dense"
    assert result.json["base"]["projected"] == []


def test_a_declared_edit_is_confirmed_or_contradicted(
    cli: Cli, direction: Path, tmp_path: Path
) -> None:
    edited = _edit(cli, demo_model_dir(), direction, tmp_path / "edited", "--scale", "0.3")
    result = cli("audit", edited, "--json", "--direction", direction)
    assert result.code == 7
    declared = result.json["declared"]
    assert (declared["confirmed"], declared["tensors_checked"]) == (True, 17)
    assert result.json["evidence"] == "declared"

    # The weights are put back: record and card claim what is not so.
    shutil.copy(demo_model_dir() / "model.safetensors", edited / "model.safetensors")
    result = cli("audit", edited, "--json")
    assert result.code == 0
    assert result.json["declared"]["confirmed"] is False
    assert any("the record says" in warning for warning in result.json["warnings"])
    assert any("model card" in warning for warning in result.json["warnings"])


@pytest.mark.parametrize(
    ("options", "least"),
    [((), 0.999), (("--layers", "3-5"), 0.99), (("--scale", "0.5"), 0.9), (None, None)],
)
def test_wide_models_are_judged_by_cheaper_computations(
    cli: Cli,
    direction: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...] | None,
    least: float | None,
) -> None:
    """What is meant for thousands of channels, on this model: float32, pooled cells, probes,
    half-precision storage, Krylov spaces."""
    monkeypatch.setattr(soft_null_space, "WIDE", 32)
    monkeypatch.setattr(component_pools, "_MOST_BYTES", 0.0)
    target = demo_model_dir()
    if options is not None:
        target = _anonymous(_edit(cli, target, direction, tmp_path / "edited", *options))
    recovered = tmp_path / "direction.safetensors"
    result = cli("audit", target, "--json", "-o", recovered, "--device", "cpu")
    assert result.code == (0 if least is None else 7), result.out
    assert result.json["writers"]["compared"] <= 13 < 17
    if least is None:
        assert result.json["writers"]["detectable_scale"] <= 0.5
    else:
        assert result.json["evidence"] == "writers"
        assert _cosine(recovered) > least


def test_wide_emptiness_and_its_edge_are_those_of_dense_solvers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    tall = torch.linspace(1, 40, 200).unsqueeze(1) * torch.randn(200, 260, generator=generator)
    tall[7] = 0  # a channel that is not written
    gram = (tall @ tall.T).double()
    dense, shift = soft_null_space.emptiness(gram.clone(), 0, 0.0)
    values = torch.linalg.eigvalsh(dense)
    assert values[-1] == pytest.approx(1, abs=1e-6)
    assert float(values[:-1].mean()) == pytest.approx(soft_null_space.SHARE, abs=1e-4)
    monkeypatch.setattr(soft_null_space, "WIDE", 64)
    wide, found = soft_null_space.emptiness(gram.float(), 1, 50.0)
    assert found == pytest.approx(shift, rel=0.15)
    assert float(wide.trace() - 1) / 199 == pytest.approx(soft_null_space.SHARE, abs=0.02)
    upper, first = soft_null_space.upper_edge(dense.float(), 10, 0)
    torch.testing.assert_close(upper[:10], values.flip(0)[:10], rtol=0, atol=1e-4)
    assert abs(float(first[7])) > 0.9999


@pytest.mark.parametrize("alike", [1, 3, 20])
def test_the_edge_refined_from_float32_is_that_of_float64(alike: int) -> None:
    """To far below what float32 rounds, also where several eigenvalues are the same."""
    generator = torch.Generator().manual_seed(alike)
    basis = torch.linalg.qr(torch.randn(160, 160, generator=generator, dtype=torch.float64))[0]
    values = torch.linspace(0.6, 0, 160, dtype=torch.float64) ** 2
    values[:alike] = 0.4
    matrix = basis * values @ basis.T
    upper, vectors = soft_null_space.upper_edge(matrix, 14, 0, kept=5)
    torch.testing.assert_close(upper[:14], values[:14], rtol=0, atol=1e-10)
    torch.testing.assert_close(matrix @ vectors, vectors * upper[:5], rtol=0, atol=1e-6)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(5).double(), rtol=0, atol=1e-9)


def _emptiness(matrix: Tensor, shift: float) -> Tensor:
    gram = matrix @ matrix.T
    return shift * torch.linalg.inv(gram + shift * torch.eye(len(gram), dtype=gram.dtype))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_changes_of_an_emptiness_are_exact(scale: float) -> None:
    """A planted edit, and a direction left out, against inverses of what they stand for."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 60, generator=generator, dtype=torch.float64)
    r = torch.linalg.qr(torch.randn(40, 2, generator=generator, dtype=torch.float64))[0]
    unit = of_matrix(_emptiness(matrix, 9.0)).edited(r[:, 0], scale)
    edited = matrix - scale * torch.outer(r[:, 0], r[:, 0] @ matrix)
    expected = _emptiness(edited, 9.0)
    torch.testing.assert_close(_whole(unit), expected)
    assert unit.along(r[:, 0]) == pytest.approx(float(r[:, 0] @ expected @ r[:, 0]))
    left = unit.without(r[:, 1:])
    rest = torch.eye(40, dtype=torch.float64) - torch.outer(r[:, 1], r[:, 1])
    expected = _emptiness(rest @ edited, 9.0) - torch.outer(r[:, 1], r[:, 1])
    torch.testing.assert_close(_whole(left), expected)


def _whole(unit: SoftNullProjector) -> Tensor:
    return unit.times(torch.eye(len(unit.matrix), dtype=torch.float64))


def test_pruned_and_dead_channels_are_no_edit(cli: Cli, direction: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pruned"
    shutil.copytree(demo_model_dir(), copy)
    tensors = load_file(copy / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for name, value in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            value[[5, 77]] = 0
            value[torch.rand(len(value), generator=generator) < 0.03] = 0
        elif name == "model.embed_tokens.weight":
            value[:, [5, 77]] = 0
        elif "norm" in name:
            value[[5, 30]] = 0
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    result = cli("audit", copy, "--json")
    assert result.code == 0
    assert result.json["writers"]["set_aside"][0]["channels"] == [5, 77]
    # Nor do they hide one: after it the dead channels write a little, against the direction.
    edited = _anonymous(_edit(cli, copy, direction, tmp_path / "edited"))
    found = tmp_path / "found.safetensors"
    assert cli("audit", edited, "-o", found).code == 7
    assert _cosine(found) > 0.999


def test_centred_writers_are_no_edit(cli: Cli, tmp_path: Path) -> None:
    """A model read through LayerNorm may have the mean taken out of all its writers."""
    copy = tmp_path / "centred"
    shutil.copytree(demo_model_dir(), copy)
    tensors = load_file(copy / "model.safetensors")
    for name, value in tensors.items():
        wide = value.double()
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = (wide - wide.mean(dim=0)).float()
        elif name == "model.embed_tokens.weight":
            tensors[name] = (wide - wide.mean(dim=1, keepdim=True)).float()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    result = cli("audit", copy, "--json")
    assert result.code == 0
    assert "the mean of all channels" in result.json["writers"]["set_aside"][0]["reason"]


def test_what_is_set_aside_is_no_edit_where_nothing_else_can_be_told(
    cli: Cli, tmp_path: Path
) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=300,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, value in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            value.data -= value.data.mean(dim=0)
    model.model.embed_tokens.weight.data -= model.model.embed_tokens.weight.data.mean(1, True)
    model.save_pretrained(tmp_path / "narrow")
    result = cli("audit", tmp_path / "narrow", "--json")
    assert (result.code, result.json["verdict"]) == (8, "undecided")
    assert "31 channels are too few" in result.json["reason"]


@pytest.mark.parametrize("size", [1e-24, 1e24])
def test_wide_models_of_any_scale(
    cli: Cli, direction: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float
) -> None:
    """Squares of such weights leave float32, in which wide models are judged."""
    monkeypatch.setattr(soft_null_space, "WIDE", 64)
    copy = tmp_path / "scaled"
    shutil.copytree(demo_model_dir(), copy)
    tensors = load_file(copy / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            value *= size
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    edited = _anonymous(_edit(cli, copy, direction, tmp_path / "edited"))
    found = tmp_path / "found.safetensors"
    result = cli("audit", edited, "--json", "-o", found)
    assert result.code == 7
    assert result.json["style"] == "all writers"
    assert _cosine(found) > 0.999


def test_copies_of_experts_leave_most_directions_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled at the same columns they are of low rank: the shift ends where float32 can go."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(256, 64, generator=generator)
    monkeypatch.setattr(soft_null_space, "WIDE", 64)
    found, _ = soft_null_space.emptiness(columns @ columns.T, 0, 0.2)
    values = torch.linalg.eigvalsh(found.double())
    assert float(values[64:].min()) > 0.9
    assert float(values.max()) < 1.1
    assert float(values[:64].max()) < 0.1


def test_one_block_is_undecided(cli: Cli, tmp_path: Path) -> None:
    config = GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=300, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "small")
    result = cli("audit", tmp_path / "small", "--json")
    assert (result.code, result.json["verdict"]) == (8, "undecided")
    assert result.json["reason"]


def test_errors_are_one_line(
    fails: Callable[..., str], tmp_path: Path, tiny: Callable[..., Path], direction: Path
) -> None:
    assert "folder" in fails("audit", demo_model_dir(), "-o", tmp_path, code=2)
    fails("audit", tmp_path / "nothing", code=4)
    assert "--device nonsense" in fails("audit", demo_model_dir(), "--device", "nonsense", code=2)
    assert "no tensor in common" in fails("diff", demo_model_dir(), _renamed(tmp_path), code=4)
    broken = tmp_path / "broken"
    AutoModelForCausalLM.from_config(
        Gemma2Config(
            hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, vocab_size=300,
        )
    ).save_pretrained(broken)  # fmt: skip
    tensors = load_file(broken / "model.safetensors")
    gain = "model.layers.2.post_feedforward_layernorm.weight"
    tensors[gain][7] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    assert f"'{gain}' holds NaN" in fails("audit", broken, code=4)
    save_file({"direction": _vector(64)}, tmp_path / "narrow.safetensors")
    edit = ("orthogonalize", broken, "--direction", tmp_path / "narrow.safetensors")
    assert f"'{gain}' holds NaN" in fails(*edit, "-o", tmp_path / "out", code=4)
    assert not (tmp_path / "out").exists()
    shutil.rmtree(broken)
    shutil.copytree(demo_model_dir(), broken)
    (broken / "abliterate.json").write_text('{"tensors": 3}')
    assert "no record" in fails("audit", broken, code=3)


def _renamed(tmp_path: Path) -> Path:
    folder = tmp_path / "renamed"
    shutil.copytree(demo_model_dir(), folder)
    save_file({"something.else": torch.zeros(3, 3)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_chance_levels_of_the_statistic() -> None:
    """Random grams: no gap, no agreement; a planted direction: both."""
    generator = torch.Generator().manual_seed(0)
    grams, edited = [], []
    r = torch.randn(64, generator=generator, dtype=torch.float64)
    r /= r.norm()
    for _ in range(12):
        w = torch.randn(64, 128, generator=generator, dtype=torch.float64)
        grams.append(of_matrix(soft_null_space.emptiness(w @ w.T, 0, 0.0)[0]))
        w = w - torch.outer(r, r @ w)
        edited.append(of_matrix(soft_null_space.emptiness(w @ w.T, 0, 0.0)[0]))
    halves = [i % 2 == 1 for i in range(12)]
    null, found = gap(grams, halves), gap(edited, halves)
    assert null.p_value > 1e-3
    assert found.p_value < 1e-8
    assert found.count == 1
    assert abs(float(found.directions[:, 0] @ r)) > 0.99
    assert gap(edited[:6] + grams[6:], halves).p_value < 1e-5
    # Several are told by where the gap lies.
    for count in (2, 5):
        basis = torch.linalg.qr(torch.randn(64, count, generator=generator, dtype=torch.float64))[0]
        several = []
        for _ in range(12):
            w = torch.randn(64, 128, generator=generator, dtype=torch.float64)
            w = w - basis @ (basis.T @ w)
            several.append(of_matrix(soft_null_space.emptiness(w @ w.T, 0, 0.0)[0]))
        found = gap(several, halves)
        assert (found.count, found.p_value < 1e-8) == (count, True)
        assert float(torch.linalg.svdvals(found.directions.T @ basis)[-1]) > 0.99
    # The bound holds: of 4000 random pairs, no more agree than it says.
    pairs = torch.randn(4000, 2, 16, generator=generator, dtype=torch.float64)
    pairs = pairs / pairs.norm(dim=2, keepdim=True)
    squared = (pairs[:, 0] * pairs[:, 1]).sum(dim=1).square()
    for level in (0.1, 0.3, 0.5):
        assert float((squared > level).double().mean()) <= p_agreement(level, 16) + 0.02
    planes = torch.linalg.qr(torch.randn(4000, 2, 16, 2, generator=generator))[0]
    least = torch.linalg.svdvals(planes[:, 0].mT @ planes[:, 1])[:, -1].square()
    for level in (0.2, 0.3, 0.5):
        assert float((least > level).double().mean()) <= p_agreement(level, 16, 2)


def test_the_gap_of_writers_with_shared_eigenbases_has_a_wider_null() -> None:
    """Where halves agree on further directions the null of independent writers does not hold."""
    generator = torch.Generator().manual_seed(11)
    width, halves = 64, [i % 2 == 1 for i in range(12)]
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
    slope = torch.linspace(0.7, 1.4, width, dtype=torch.float64)
    r = torch.randn(width, generator=generator, dtype=torch.float64)
    r = r / r.norm()

    def units(shared: bool, scale: float) -> list[SoftNullProjector]:
        made = []
        for _ in range(12):
            w = torch.randn(width, 2 * width, generator=generator, dtype=torch.float64)
            if shared:
                w = basis @ (slope[:, None] * w)
            w = w - scale * torch.outer(r, r @ w)
            made.append(of_matrix(soft_null_space.emptiness(w @ w.T, 0, 0.0)[0]))
        return made

    alone, common = (gap(units(shared, 0.0), halves) for shared in (False, True))
    assert 0.5 < alone.shared < 2 < 3 < common.shared
    # The same ratio is much less of a surprise there.
    from abliterate.auditing.eigengap_test import _p_gap

    assert common.p_gap == _p_gap(common.ratio, True) >= _p_gap(common.ratio, False)
    assert _p_gap(1.12, True) == pytest.approx(0.25 * math.exp(-5 * 0.62))
    assert _p_gap(1.12, True) > 100 * _p_gap(1.12, False)
    assert _p_gap(2.0, True) == pytest.approx(0.25 * math.exp(-5 - 12 * 0.5))
    # An edit is claimed in both, and is no reason to take the other null.
    for shared in (False, True):
        found = gap(units(shared, 1.0), halves)
        assert (found.count, found.shared > 3) == (1, shared)
        assert found.p_value < 1e-8
        assert abs(float(found.directions[:, 0] @ r)) > 0.99


def test_readers_and_several_directions_are_found_without_a_base(cli: Cli, tmp_path: Path) -> None:
    """Each with its own line; the basis of all is recovered by the statistic itself."""
    base = demo_model_dir()
    tensors = load_file(base / "model.safetensors")
    basis = torch.linalg.qr(torch.stack([_vector(), _vector().roll(1), _vector().roll(2)], 1))[0]
    readers = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    writers = ("o_proj", "down_proj")
    cases: dict[str, tuple[tuple[str, ...], Tensor, tuple[str, ...]]] = {
        "all readers avoid one direction": (readers, basis[:, :1], ("readers",)),
        "all writers avoid 3 directions": ((*writers, "embed_tokens"), basis, ("writers",)),
        "all readers avoid 3 directions": (readers, basis, ("readers",)),
        "nothing reads or writes one direction": ((*readers, *writers, "embed_tokens"),
                                                  basis[:, :1], ("writers", "readers")),
    }  # fmt: skip
    for told, (names, directions, sides) in cases.items():
        out = tmp_path / told.replace(" ", "-")
        shutil.copytree(base, out)
        new = {}
        for name, value in tensors.items():
            wide, module = value.double(), name.removesuffix(".weight").rsplit(".", 1)[-1]
            if module in names and module in writers:
                wide = wide - directions @ (directions.T @ wide)
            elif module in names:  # a table's rows are written, a reader's rows read
                wide = wide - (wide @ directions) @ directions.T
            new[name] = wide.to(value.dtype)
        save_file(new, out / "model.safetensors", {"format": "pt"})
        path = tmp_path / "direction.safetensors"
        result = cli("audit", out, "--json", "-o", path)
        found = result.json
        assert told in found["why"]
        if len(sides) == 2:  # the same as a direction that was never used: no verdict
            assert (result.code, found["verdict"]) == (8, "undecided")
            continue
        assert (result.code, found["evidence"]) == (7, sides[0])
        assert "(p < 1e-07)" in found["why"]
        assert found[sides[0]]["directions"] == directions.shape[1]
        saved = load_file(path)
        assert abs(float((directions.T @ saved["direction"]).norm()) - 1) < 1e-3
        assert ("subspace" in saved) is (directions.shape[1] > 1)
        if "subspace" in saved:
            assert found["subspace"] == [3, directions.shape[0]]
            assert float(torch.linalg.svdvals(saved["subspace"] @ directions)[-1]) > 0.999
            assert torch.equal(load_direction(path).vector, saved["direction"])
            text = cli("audit", out, "-o", path).out
            assert f"direction: {path}, one of 3, and all of them as 'subspace' [3, 128]" in text
        assert found["full"]
        assert all(unit["carries"] for unit in found["units"])
        other = "writers" if sides == ("readers",) else "readers"
        assert found[other]["verdict"] == "clean"
        assert found["style"].startswith(f"all {sides[0]}")
