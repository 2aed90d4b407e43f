"""audit with a base: every form of edit is named, tensor by tensor, and what is none is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_edits import (
    DEPTH,
    KINDS,
    WIDTH,
    Matrix,
    change_tensors,
    decay_with_common_output,
    edit_matrices,
    keeping_column_norms,
    keeping_row_norms,
    make_checkpoint,
    projected,
    random_direction,
    reader_matrices,
    rescale_channels,
    truncate,
    tune,
)
from audit_forms import (
    FORMS,
    ONE,
    THREE,
    Directions,
    by_layer,
    half_precision,
    lora,
    pruned,
    rank_one,
    same,
    three,
    trained,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from abliterate.cli.diff_command import show_differences
from abliterate.direction_loading import load_directions
from abliterate.report.edit_strip import audit_strip

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Matrix]]]:
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("bases") / kind
        made[kind] = folder, make_checkpoint(kind, folder)
    return made


#: A model for each form of edit, and what it is called.
CASES: dict[str, tuple[str, list[str]]] = {
    "amplified": ("llama", ["one direction", "amplified"]),
    "inverted": ("gemma2", ["one direction", "inverted"]),
    "partial": ("granitemoe", ["one direction", "partial"]),
    "rows": ("llama", ["one direction"]),
    "columns": ("gemma2", ["one direction"]),
    "norms overlooked": ("gemma2", ["one direction", "partial"]),
    "near layers": ("llama", ["by layer"]),
    "half, by layer": ("gemma2", ["by layer", "partial"]),
    "amplified, by layer": ("granitemoe", ["by layer", "amplified"]),
    "rows, by layer": ("granitemoe", ["by layer"]),
    "three": ("granitemoe", ["3 directions"]),
    "three, half": ("llama", ["3 directions", "partial"]),
    "embedding": ("llama", ["one direction"]),
    "one matrix": ("gemma2", ["one direction"]),
    "then a LoRA": ("gemma2", ["one direction"]),
    "then training": ("granitemoe", ["one direction"]),
    "by layer, then training": ("llama", ["by layer"]),
    "three, then a LoRA": ("llama", ["3 directions"]),
}


def _directions(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    return load_file(path), {
        "edit": json.loads(metadata["edit"]),
        "layer_scales": json.loads(metadata["layer_scales"]),
        "model": metadata["model"],
    }


@pytest.mark.parametrize("case", CASES)
def test_every_form_of_edit_is_named(
    cli: Cli, bases: dict[str, tuple[Path, list[Matrix]]], tmp_path: Path, case: str
) -> None:
    """Each changed writer and no other tensor, its signed scale, its layer's direction."""
    kind, kinds = CASES[case]
    base, matrices = bases[kind]
    out, saved = tmp_path / "out", tmp_path / "directions.safetensors"
    edit = FORMS[case]
    directions, gains, scale = edit.directions, edit.gains, edit.scale
    changed = [one.name for one in edit.apply(base, out, matrices)]
    result = cli("audit", out, "--base", base, "--json", "--save-directions", saved)
    assert result.code == 7, result.err
    found = result.json
    assert (found["verdict"], found["evidence"]) == ("edited", "base")
    assert set(found["base"]["projected"]) == set(changed)
    form = found["base"]["form"]
    assert form["kinds"] == kinds
    assert form["behind_gains"] is (gains or kind != "gemma2")
    near = 0.05
    for tensor in found["base"]["tensors"]:
        if tensor["projected"]:
            assert tensor["scale"] == pytest.approx(scale, abs=near)
            assert tensor["directions"] == (3 if "three" in case else 1)
    assert found["removed"] == pytest.approx(scale, abs=0.05)
    # The style's label, where it is so and nowhere else.
    kept = "rows" in case or "columns" in case or case == "norms overlooked"
    assert ("norm-preserving" in (found["style"] or "")) is kept
    tensors, metadata = _directions(saved)
    rows = tensors["directions"]
    assert rows.shape == (DEPTH, WIDTH)
    least = 0.99
    of_layer = {m.layer: directions(m) for m in matrices if directions(m) is not None}
    for layer in range(DEPTH):
        if layer in of_layer:
            true = of_layer[layer].reshape(WIDTH, -1)
            assert float((true.T @ rows[layer]).norm()) > least
            assert metadata["layer_scales"][layer] == pytest.approx(scale, abs=near)
        else:
            assert not rows[layer].any()
            assert metadata["layer_scales"][layer] is None
    assert ("embedding" in tensors) is (None in of_layer)
    if case == "three":  # the saved ones are of this space, and a file of a set all the same
        for spanned in tensors["subspaces"]:
            assert float(torch.linalg.svdvals(spanned @ THREE)[-1]) > 0.999
        assert found["subspace"] == [3, WIDTH]
        assert torch.equal(load_directions(saved).vectors, rows)
    elif "three" not in case:
        assert "subspaces" not in tensors
    assert metadata["edit"]["kinds"] == kinds


@pytest.mark.parametrize(
    ("kind", "times", "change", "scale"),
    [
        ("llama", 3, keeping_row_norms, 0.5),  # a third of the change is the rescaling
        ("gemma2", 9, keeping_row_norms, 0.5),  # most of it
        ("granitemoe", 31, keeping_row_norms, 1),
        ("llama", 9, keeping_row_norms, -1),
        ("gemma2", 9, keeping_column_norms, 1),
    ],
)
def test_norms_kept_along_a_strong_direction_hide_neither_scale_nor_direction(
    cli: Cli,
    bases: dict[str, tuple[Path, list[Matrix]]],
    tmp_path: Path,
    kind: str,
    times: int,
    change: Callable[[float], Any],
    scale: float,
) -> None:
    """The model writes so many times as much along the direction as along others."""
    weak, matrices = bases[kind]
    base, out, saved = tmp_path / "base", tmp_path / "out", tmp_path / "saved.safetensors"
    edit_matrices(weak, base, matrices, same, projected(1 - times))
    changed = edit_matrices(base, out, matrices, same, change(scale))
    result = cli("audit", out, "--base", base, "--json", "-o", saved)
    assert result.code == 7, result.err
    found = result.json
    tensors = [t for t in found["base"]["tensors"] if t["projected"]]
    assert {t["name"] for t in tensors} == set(changed)
    assert all(t["directions"] == 1 for t in tensors)
    assert [t["scale"] for t in tensors] == pytest.approx([scale] * len(tensors), abs=0.01)
    kinds = {0.5: ["partial"], -1: ["amplified"]}.get(scale, [])
    assert found["base"]["form"]["kinds"] == ["one direction", *kinds]
    assert "norm-preserving" in found["style"]
    assert abs(float(load_file(saved)["direction"] @ ONE)) > 0.9999


@pytest.mark.parametrize(
    ("kind", "directions", "kinds"),
    [
        ("llama", same, ["one direction", "readers"]),
        ("gemma2", by_layer(0.8), ["by layer", "readers"]),
        ("granitemoe", three, ["3 directions", "readers"]),
    ],
)
def test_readers_that_no_longer_read_a_direction_are_named(
    cli: Cli,
    bases: dict[str, tuple[Path, list[Matrix]]],
    tmp_path: Path,
    kind: str,
    directions: Directions,
    kinds: list[str],
) -> None:
    base, _ = bases[kind]
    matrices = reader_matrices(base)
    changed = edit_matrices(base, tmp_path / "out", matrices, directions, projected())
    saved = tmp_path / "directions.safetensors"
    result = cli("audit", tmp_path / "out", "--base", base, "--json", "--save-directions", saved)
    assert result.code == 7
    assert set(result.json["base"]["projected"]) == set(changed)
    assert len(changed) == DEPTH * 5  # of experts the router is one, with a row for each
    assert result.json["base"]["form"]["kinds"] == kinds
    assert result.json["embeddings"] is not True
    rows = load_file(saved)["directions"]
    for one in matrices:
        assert one.layer is not None
        true = directions(one)
        assert true is not None
        assert float((true.reshape(WIDTH, -1).T @ rows[one.layer]).norm()) > 0.99


def _clean(cli: Cli, out: Path, base: Path) -> Any:
    result = cli("audit", out, "--base", base, "--json")
    assert result.json["base"]["projected"] == []
    assert result.json["base"]["form"] is None
    assert result.json["verdict"] != "edited"
    return result.json


def test_decay_of_writers_with_a_common_output_is_no_edit(
    cli: Cli, bases: dict[str, tuple[Path, list[Matrix]]], tmp_path: Path
) -> None:
    """It takes most along the direction that all share, and as much of everything else."""
    base, matrices = bases["llama"]
    shutil.copytree(base, tmp_path / "base")
    strong = decay_with_common_output(tmp_path / "base", matrices, 0.98)
    found = _clean(cli, tmp_path / "decayed", strong)
    writers = {one.name for one in matrices}
    assert all(t["first"] > 0.9 for t in found["base"]["tensors"] if t["name"] in writers)
    # The same direction projected out is one.
    edit_matrices(
        strong, tmp_path / "out", matrices, lambda _: random_direction(77), projected(0.1)
    )
    assert cli("audit", tmp_path / "out", "--base", strong, "-q").code == 7


def test_tokens_that_training_pushes_along_together_are_no_edit(
    cli: Cli, bases: dict[str, tuple[Path, list[Matrix]]], tmp_path: Path
) -> None:
    """Tables whose rare tokens share a direction, which grows nearly in proportion."""
    common, rare = random_direction(77), torch.linspace(0.4, 1, WIDTH * 2)
    generator = torch.Generator().manual_seed(3)

    def shared(name: str, value: Tensor) -> Tensor:
        if "embed_tokens" in name or "lm_head" in name:
            value = value.clone()
            value[: len(rare)] += 4 * value.norm(dim=1).mean() * torch.outer(rare, common.float())
        return value

    def grown(name: str, value: Tensor) -> Tensor:
        if "embed_tokens" in name or "lm_head" in name:
            noise = torch.randn(len(value), generator=generator)
            value = value + torch.outer(
                (0.2 + 0.05 * noise) * (value @ common.float()), common.float()
            )
        return value + 0.02 * value.std() * torch.randn(value.shape, generator=generator)

    shutil.copytree(bases["llama"][0], tmp_path / "base")
    change_tensors(tmp_path / "base", shared)
    shutil.copytree(tmp_path / "base", tmp_path / "out")
    change_tensors(tmp_path / "out", grown)
    found = _clean(cli, tmp_path / "out", tmp_path / "base")
    tables = [t for t in found["base"]["tensors"] if t["component"] in ("embedding", "lm_head")]
    assert len(tables) == 2
    assert all(t["first"] > 0.9 for t in tables)


@pytest.mark.parametrize(("kind", "cut"), [("llama", 1), ("granitemoe", 13)])
def test_an_approximation_of_lower_rank_is_no_edit(
    cli: Cli, bases: dict[str, tuple[Path, list[Matrix]]], tmp_path: Path, kind: str, cut: int
) -> None:
    """Half of the directions of a matrix (of each expert of a stack) are gone, the least ones."""
    base, matrices = bases[kind]
    shutil.copytree(base, tmp_path / "out")
    chosen = matrices[-cut:]
    truncate(tmp_path / "out", chosen, 0.5)
    found = _clean(cli, tmp_path / "out", base)
    states = {t["name"]: t["state"] for t in found["base"]["tensors"]}
    assert {n for n, state in states.items() if state == "truncated"} == {m.name for m in chosen}
    if cut == 1:
        assert found["verdict"] == "clean"
        assert found["why"].startswith("1 matrix is an approximation of lower rank: ")
        # Without one direction besides, of all writers, it is an edit all the same.
        shutil.rmtree(tmp_path / "out")
        edit_matrices(base, tmp_path / "out", matrices, same, projected())
        truncate(tmp_path / "out", chosen, 0.5)
        edited = cli("audit", tmp_path / "out", "--base", base, "--json")
        assert edited.code == 7
        assert len(edited.json["base"]["projected"]) == len(matrices) - 1


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_channels_that_were_rescaled_are_no_projection(
    cli: Cli, bases: dict[str, tuple[Path, list[Matrix]]], tmp_path: Path, kind: str
) -> None:
    """A few channels hold most of what changed, each with a scale of its own."""
    base, matrices = bases[kind]
    shutil.copytree(base, tmp_path / "out")
    rescale_channels(tmp_path / "out", matrices)
    _clean(cli, tmp_path / "out", base)


@pytest.fixture(scope="module")
def with_biases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Matrix]]:
    folder = tmp_path_factory.mktemp("biases") / "starcoder2"
    return folder, make_checkpoint("starcoder2", folder)


def _named_biases(document: Any) -> list[Any]:
    tensors = document["base"]["tensors"]
    return [t for t in tensors if t["projected"] and t["name"].endswith(".bias")]


@pytest.mark.parametrize(("directions", "count"), [(three, 3), (by_layer(0.8), 1)])
def test_biases_that_lost_directions_are_named_with_their_scales(
    cli: Cli,
    with_biases: tuple[Path, list[Matrix]],
    tmp_path: Path,
    directions: Directions,
    count: int,
) -> None:
    """Of a plain edit all: by layer one bias has no more than 0.001 of itself to lose."""
    base, matrices = with_biases
    changed = edit_matrices(base, tmp_path / "out", matrices, directions, projected(0.5))
    found = cli("audit", tmp_path / "out", "--base", base, "--json").json
    assert set(found["base"]["projected"]) == set(changed)
    named = _named_biases(found)
    assert len(named) == 2 * DEPTH
    assert all(t["scale"] == pytest.approx(0.5, abs=0.001) for t in named)
    assert all(t["directions"] == count for t in named)


def test_scales_of_biases_are_told_only_where_they_are_known(
    cli: Cli,
    with_biases: tuple[Path, list[Matrix]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Training tilts what is known of the directions; along those some biases had almost nothing.

    Of these ``-(r . D) / (r . b)`` was off by up to 4.4.
    """
    base, matrices = with_biases
    out = tmp_path / "out"
    edit_matrices(base, out, matrices, by_layer(0.8), projected())
    tune(out, 0.03)
    generator = torch.Generator().manual_seed(3)

    def trained_too(_: str, value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=generator)
        return value + 1e-3 * value.norm() * noise / noise.norm() if value.ndim == 1 else value

    change_tensors(out, trained_too)
    result = cli("audit", out, "--base", base, "--json")
    assert result.code == 7, result.err
    named = _named_biases(result.json)
    told = [t["scale"] for t in named if t["scale"] is not None]
    assert 0 < len(told) < len(named)
    assert told == pytest.approx([1] * len(told), abs=0.05)
    # What cannot be told is empty in the strip and a dash in the table.
    drawn = audit_strip(result.json | {"base": result.json["base"] | {"tensors": named}})
    assert drawn is not None
    blank = sum(value is None for row in drawn.data[0].z for value in row)
    assert blank == 2 * DEPTH - len(told)
    capfd.readouterr()
    show_differences(result.json["base"] | {"tensors": named})
    lines = [line.rstrip("│ ") for line in capfd.readouterr().out.splitlines()]
    dashes = [line for line in lines if ".bias" in line and line.endswith(" -")]
    assert len(dashes) == len(named) - len(told)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [rank_one, half_precision, pruned, trained, lora])
def test_benign_changes_are_no_projection(
    cli: Cli,
    bases: dict[str, tuple[Path, list[Matrix]]],
    tmp_path: Path,
    kind: str,
    change: Callable[[Path], None],
) -> None:
    base, _ = bases[kind]
    shutil.copytree(base, tmp_path / "out")
    change(tmp_path / "out")
    _clean(cli, tmp_path / "out", base)


def test_one_expert_of_a_stack_is_found(
    cli: Cli, bases: dict[str, tuple[Path, list[Matrix]]], tmp_path: Path
) -> None:
    base, matrices = bases["granitemoe"]
    stack = next(one for one in matrices if "output_linear" in one.name and one.layer == 2)
    shutil.copytree(base, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    unit = (stack.gain * ONE) / (stack.gain * ONE).norm()
    expert = tensors[stack.name][3].double()
    tensors[stack.name][3] = (expert - torch.outer(unit, unit @ expert)).float()
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    result = cli("audit", tmp_path / "out", "--base", base)
    assert result.code == 7
    lines = result.out.splitlines()
    assert lines[0].endswith(": edited")
    assert lines[1] == f"one direction, projected out of 1 writer (scale 1.00): {stack.name}"


def test_what_people_see_is_short(
    cli: Cli, bases: dict[str, tuple[Path, list[Matrix]]], tmp_path: Path
) -> None:
    """Verdict, why and a summary; every tensor only with --tensors."""
    base, matrices = bases["llama"]
    edit_matrices(base, tmp_path / "out", matrices, by_layer(0.8), projected(0.5))
    result = cli("audit", tmp_path / "out", "--base", base)
    lines = result.out.splitlines()
    assert lines[0] == f"{tmp_path / 'out'}: edited"
    assert lines[1] == (
        "a direction of its own in each layer, partly projected out of 12 writers (scale 0.50)"
    )
    attention = next(line for line in lines if line.lstrip(" │|").startswith("attention"))
    assert "0-5" in attention
    assert "6 of 6" in attention
    assert "│ 0.50 │" in " ".join(attention.split())
    assert "layers.3.mlp.down_proj.weight" not in result.out
    assert len(lines) < 40
    long = cli("audit", tmp_path / "out", "--base", base, "--tensors")
    assert "layers.3.mlp.down_proj.weight" in long.out


def test_save_directions_needs_a_base_and_a_name_of_its_own(
    fails: Callable[..., str], bases: dict[str, tuple[Path, list[Matrix]]], tmp_path: Path
) -> None:
    base, _ = bases["llama"]
    path = tmp_path / "d.safetensors"
    assert "--base" in fails("audit", base, "--save-directions", path, code=2)
    both = ("--base", base, "--save-directions", path, "-o", path)
    assert "two files" in fails("audit", base, *both, code=2)
    save_file({"x": torch.zeros(2)}, path)
    error = fails("audit", base, "--base", base, "--save-directions", path, code=2)
    assert "no earlier output" in error


def _adapter_of(cli: Cli, base: Path, out: Path, *options: str) -> Path:
    path = out.parent / "direction.safetensors"
    save_file({"direction": ONE}, path)
    edit = ("orthogonalize", base, "--direction", path, "-o", out, "-q", *options)
    assert cli(*edit).code == 0
    return out


def test_an_adapter_is_judged_as_what_it_makes_of_its_base(
    cli: Cli, bases: dict[str, tuple[Path, list[Matrix]]], tmp_path: Path
) -> None:
    base, matrices = bases["gemma2"]
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    adapter = _adapter_of(cli, base, tmp_path / "adapter", "--as-lora", "--scale", "0.5")
    merged = _adapter_of(cli, base, tmp_path / "merged", "--scale", "0.5")
    found = {}
    for folder in (adapter, merged):
        (folder / "abliterate.json").unlink()
        saved = tmp_path / f"{folder.name}.safetensors"
        result = cli("audit", folder, "--base", base, "--json", "-o", saved)
        assert result.code == 7, result.err
        found[folder] = result.json, load_file(saved)["direction"]
    one, other = found[adapter][0], found[merged][0]
    assert set(one["base"]["projected"]) == {m.name for m in matrices}
    assert one["base"]["form"]["kinds"] == ["one direction", "partial"]
    for mine, theirs in zip(one["base"]["tensors"], other["base"]["tensors"], strict=True):
        assert mine["name"] == theirs["name"]
        assert mine["scale"] == pytest.approx(theirs["scale"], abs=1e-4)
    assert abs(float(found[adapter][1] @ ONE)) > 0.9999
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_a_lora_of_peft_is_scaled_as_peft_does(
    cli: Cli, bases: dict[str, tuple[Path, list[Matrix]]], tmp_path: Path
) -> None:
    """alpha / r, or alpha / sqrt(r): a rank-4 LoRA that removes 0.3 of the direction of two."""
    base, matrices = bases["llama"]
    weights = load_file(base / "model.safetensors")
    for stabilised, alpha in ((False, 8.0), (True, 4.0)):
        adapter = tmp_path / str(stabilised)
        adapter.mkdir()
        factors = {}
        chosen = [m.name for m in matrices if m.name.endswith("o_proj.weight")][:2]
        for name in chosen:
            up = torch.zeros(WIDTH, 4)
            up[:, 1] = -0.15 * ONE
            down = torch.zeros(4, weights[name].shape[1])
            down[1] = ONE.float() @ weights[name]
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            factors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        save_file(factors, adapter / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": alpha, "use_rslora": stabilised}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        result = cli("audit", adapter, "--base", base, "--json")
        assert result.code == 7
        scales = {t["name"]: t["scale"] for t in result.json["base"]["tensors"] if t["projected"]}
        assert scales == pytest.approx(dict.fromkeys(chosen, 0.3), abs=1e-4)


def test_adapters_that_cannot_be_merged_are_one_line(
    fails: Callable[..., str], bases: dict[str, tuple[Path, list[Matrix]]], tmp_path: Path
) -> None:
    base, _ = bases["llama"]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    stem = "base_model.model.model.layers.0.self_attn.o_proj"
    factors = {
        f"{stem}.lora_A.weight": torch.zeros(1, 9),
        f"{stem}.lora_B.weight": torch.ones(9, 1),
    }

    def write(changes: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
        save_file(tensors, adapter / "adapter_model.safetensors")

    for changes, tensors, told in (
        ({"use_dora": True}, factors, "use_dora"),
        ({"peft_type": "IA3"}, factors, "IA3"),
        ({"alpha_pattern": {"(a+)+b": 2}}, factors, "pattern"),
        ({"lora_alpha": "x"}, factors, "no configuration"),
        ({}, factors, "[9, 9]"),
        ({}, {"base_model.model.nowhere.lora_A.weight": torch.zeros(1, 9)}, "nowhere"),
        ({}, {f"{stem}.lora_A.weight": torch.zeros(1, 64)}, "do not fit each other"),
        ({}, {f"{stem}.other": torch.zeros(1, 64)}, "no factor of a LoRA"),
    ):
        write(changes, tensors)
        assert told in fails("audit", adapter, "--base", base, code=4)
