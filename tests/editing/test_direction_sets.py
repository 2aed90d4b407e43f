"""A direction for each layer: block ``l`` loses its own, in the files and in hooks; the proof."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from abliterate import ablate
from abliterate.direction_interpolation import interpolated
from abliterate.direction_set import DirectionSet

IDS = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(5))
LAYERS, WIDTH = 4, 48


def _random(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return _random(LAYERS, WIDTH) * torch.arange(1, LAYERS + 1)[:, None]


@pytest.fixture(scope="module")
def held(tmp_path_factory, rows: torch.Tensor) -> Path:
    """A set, as a file from elsewhere."""
    path = tmp_path_factory.mktemp("set") / "set.safetensors"
    save_file({"directions": rows}, path)
    return path


@pytest.fixture(scope="module")
def edited(tiny, held: Path, tmp_path_factory) -> Path:
    from abliterate.cli.app import main

    out = tmp_path_factory.mktemp("edited") / "out"
    argv = ["orthogonalize", str(tiny("llama")), "--direction", str(held), "-o", str(out), "-q"]
    assert main(argv) == 0
    return out


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def _load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.double()


def _less(name: str, matrix: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """``W - r r^T W`` with d_model as rows, or as columns in an embedding."""
    wide = matrix.double()
    if "embed" in name:
        return wide - torch.outer(wide @ unit, unit)
    return wide - torch.outer(unit, unit @ wide)


def test_each_layer_of_the_files_loses_its_own_direction(tiny, edited: Path, rows) -> None:
    before, after = _tensors(tiny("llama")), _tensors(edited)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 1 + 2 * LAYERS
    for name in changed:
        layer = 0 if "embed" in name else int(name.split(".")[2])
        expected = _less(name, before[name], _unit(rows[layer]))
        assert torch.allclose(after[name].double(), expected, atol=1e-6), name
        for other in {*range(LAYERS)} - {layer}:  # no neighbour's
            assert not torch.allclose(
                after[name].double(), _less(name, before[name], _unit(rows[other])), atol=1e-3
            )


def test_hooks_and_files_agree(tiny, edited: Path, rows) -> None:
    model = _load(tiny("llama"))
    plain = _logits(model)
    with ablate(model, DirectionSet(rows)):
        hooks = _logits(model)
    assert (_logits(_load(edited)) - hooks).abs().max() < 1e-4
    assert (hooks - plain).abs().max() > 0.1
    with ablate(model, rows.roll(1, 0)):  # every layer its neighbour's
        assert (_logits(model) - hooks).abs().max() > 0.05
    with ablate(model, rows[0]):
        assert (_logits(model) - hooks).abs().max() > 0.05


def test_the_record_and_the_card_say_what_is_promised(edited: Path, rows) -> None:
    record = json.loads((edited / "abliterate.json").read_text())
    promise = record["promise"]
    assert (promise["tensors_orthogonal"], promise["stream_orthogonal"]) == (True, False)
    assert "each layer lost its own direction" in promise["limits"][0]
    assert torch.tensor(record["vectors"], dtype=torch.float64).equal(rows)
    assert "vector" not in record
    card = (edited / "README.md").read_text()
    assert "a direction of its own for each" in card
    assert "Directions: 4 of 4 layers" in card
    assert "every matrix that writes" not in card


def test_verify_holds_each_layer_against_its_own(
    tiny, cli, held: Path, edited: Path, rows, tmp_path: Path
) -> None:
    result = cli("verify", edited, "--direction", held, "--source", tiny("llama"), "--json")
    assert result.code == 0, result.out
    assert result.json["by_layer"] is True
    result = cli("verify", edited, "--direction", held, "--json")
    assert result.code == 0, result.out
    assert any("its own layer's direction" in note for note in result.json["notes"])
    assert cli("verify", edited, "--direction", edited / "abliterate.json").code == 0
    shifted = tmp_path / "shifted.safetensors"
    save_file({"directions": rows.roll(1, 0)}, shifted)
    result = cli("verify", edited, "--direction", shifted, "--json")
    assert result.code == 6
    assert sum(not writer["clean"] for writer in result.json["writers"]) == 1 + 2 * LAYERS
    result = cli("verify", edited, "--direction", shifted, "--source", tiny("llama"), "--json")
    assert result.code == 6
    assert "another direction for layer 0" in " ".join(result.json["files"])
    # One layer put back, and one that lost its neighbour's direction.
    damaged = tmp_path / "damaged"
    shutil.copytree(edited, damaged)
    tensors, source = load_file(damaged / "model.safetensors"), _tensors(tiny("llama"))
    attention = "model.layers.1.self_attn.o_proj.weight"
    mlp = "model.layers.2.mlp.down_proj.weight"
    tensors[attention] = source[attention]
    tensors[mlp] = _less(mlp, source[mlp], _unit(rows[1])).float()
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    result = cli("verify", damaged, "--direction", held, "--json")
    assert result.code == 6
    assert {w["name"] for w in result.json["writers"] if not w["clean"]} == {attention, mlp}
    # The checkpoint's own record is held against each layer's direction as well.
    shutil.copy(edited / "abliterate.json", damaged / "abliterate.json")
    claimed = {one: cli("audit", one, "--json").json["declared"] for one in (edited, damaged)}
    assert (claimed[edited]["confirmed"], claimed[edited]["mismatches"]) == (True, [])
    assert claimed[edited]["tensors_checked"] == 1 + 2 * LAYERS
    assert claimed[damaged]["confirmed"] is False
    assert {line.split("'")[1] for line in claimed[damaged]["mismatches"]} == {attention, mlp}


def test_verify_measures_what_each_layer_adds(
    tiny, cli, held: Path, edited: Path, tmp_path: Path
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("one two three\nfour five\n")
    prompts = ("--harmful", words, "--harmless", words, "--n-prompts", "2", "--json")
    for where in ("--no-offload", "--offload"):
        result = cli("verify", edited, "--direction", held, "--source", tiny("llama"), "--forward",
                     where, *prompts)  # fmt: skip
        assert result.code == 0, result.out + result.err
        assert result.json["leak"] < 1e-5
        distance = result.json["distance"]
        assert distance["logits"] < 1e-3 < 0.1 < distance["moved"]
        result = cli("verify", tiny("llama"), "--direction", held, "--forward", where, *prompts)
        assert result.code == 6
        assert result.json["leak"] > 0.05


def test_a_set_with_holes_leaves_layers_alone_or_fills_them(
    tiny, cli, fails, rows, tmp_path: Path
) -> None:
    path, out = tmp_path / "holes.safetensors", tmp_path / "out"
    sparse = rows.clone()
    sparse[0] = sparse[2] = 0
    save_file({"directions": sparse}, path)
    base = ("orthogonalize", tiny("llama"), "--direction", path, "--json")
    result = cli(*base, "-o", out)
    assert result.code == 0, result.err
    assert {t["layer"] for t in result.json["tensors"]} == {None, 1, 3}
    assert any("layers (0, 2)" in limit for limit in result.json["promise"]["limits"])
    embedding = "model.embed_tokens.weight"
    before, after = _tensors(tiny("llama")), _tensors(out)
    first = _less(embedding, before[embedding], _unit(rows[1]))  # the first that there is
    assert torch.allclose(after[embedding].double(), first, atol=1e-6)
    result = cli("verify", out, "--direction", path, "--source", tiny("llama"), "--json")
    assert result.code == 0, result.out
    filled = tmp_path / "filled"
    result = cli(*base, "-o", filled, "--interpolate", "spherical")
    assert result.code == 0, result.err
    made = torch.tensor(result.json["vectors"], dtype=torch.float64)
    assert torch.allclose(made[0], _unit(rows[1]))
    a, b = _unit(rows[1]), _unit(rows[3])
    middle = _unit(a + b)  # the same for both kinds halfway
    assert torch.allclose(made[2], middle)
    name = "model.layers.2.mlp.down_proj.weight"
    expected = _less(name, before[name], middle)
    assert torch.allclose(_tensors(filled)[name].double(), expected, atol=1e-6)
    options = ("--direction", path, "--interpolate", "spherical")
    assert cli("verify", filled, *options, "--source", tiny("llama")).code == 0
    # What was asked for otherwise than the edit was made is the option's fault.
    against = ("--source", tiny("llama"), "--direction", path)
    line = fails("verify", out, *against, "--interpolate", "linear", code=2)
    assert "--interpolate=linear: " in line
    assert "records an edit made with no --interpolate: leave it out" in line
    line = fails("verify", filled, *against, "--interpolate", "linear:1", code=2)
    assert "records an edit made with --interpolate=spherical: give --interpolate=spherical" in line


def test_interpolation_turns_by_equal_angles_or_mixes() -> None:
    rows = torch.zeros(5, 3, dtype=torch.float64)
    rows[0], rows[3] = torch.tensor([2.0, 0, 0]), torch.tensor([0, 5.0, 0])
    spherical = interpolated(DirectionSet(rows), "spherical", None).vectors
    angles = torch.atan2(spherical[:, 1], spherical[:, 0]).rad2deg()
    assert torch.allclose(angles, torch.tensor([0.0, 30, 60, 90, 90], dtype=torch.float64))
    linear = interpolated(DirectionSet(rows), "linear", None).vectors
    assert torch.allclose(linear[1], _unit(torch.tensor([2.0, 1, 0], dtype=torch.float64)))
    assert torch.allclose(linear.norm(dim=1), torch.ones(5, dtype=torch.float64))


def test_what_a_set_cannot_do_is_said(tiny, fails, held: Path, rows, tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "out"
    base = ("orthogonalize", model, "-o", out, "--direction")
    assert "--add needs one direction" in fails(*base, held, "--add", "1", code=2)
    assert "one direction" in fails("evaluate", model, "--direction", held, "--intervention",
                                    "add", "-o", out, code=2)  # fmt: skip
    assert "one for all" in fails("export", held, "--to", "npz", "-o", tmp_path / "x.npz", code=2)
    assert "ablated, not added" in fails("chat", model, "--direction", held, "--add", "1", code=2)
    assert "layer 9 has no direction" in fails(*base, held, "--interpolate", "linear:1,9", code=2)
    assert "--interpolate" in fails(*base, held, "--interpolate", "cubic", code=2)
    assert "--position" in fails(*base, held, "--position", "-1", code=2)
    single = tmp_path / "single.safetensors"
    save_file({"direction": rows[0]}, single)
    assert "for all" in fails(*base, single, "--interpolate", "linear", code=2)
    for wrong, message in (
        (rows[:3], "3 layers"),
        (torch.cat([rows, rows[:1]]), "5 layers"),
        (rows[:, :40].clone(), "width 40"),
        (torch.zeros(4, 48), "every row is zero"),
        (rows.masked_fill(rows == rows[2, 3], float("nan")), "NaN"),
        (rows[0], "[n_layers, d_model]"),
    ):
        path = tmp_path / "wrong.safetensors"
        save_file({"directions": wrong}, path)
        assert message in fails(*base, path, code=3)
    assert not out.exists()


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ("[[-1, 0]]", "lists 1 candidates for 4 directions"),
        ("[[-1, 0], [-1, 1], null, [-1, 4]]", "entry 3"),
        ("[[-1, -1], null, null, null]", "entry 0"),
        ("[null, [0, 1], null, null]", "entry 1"),
        ("[null, [-1.0, 1], null, null]", "entry 1"),
        ('[null, ["-1", 1], null, null]', "entry 1"),
        ("[null, [-1, true], null, null]", "entry 1"),
        ("[null, [-1], null, null]", "entry 1"),
        ("[null, -1, null, null]", "entry 1"),
        ("[null, [-1e400, 1], null, null]", "entry 1"),
        ('{"0": [-1, 0]}', "must be a JSON list"),
        ("[[-1, 0],", "must be a JSON list"),
        ("", "must be a JSON list"),
        ("[" * 100_000, "must be a JSON list"),
    ],
)
def test_malformed_candidates_of_a_set_are_refused(
    candidates: str, message: str, tiny, fails, rows, tmp_path: Path
) -> None:
    path, out = tmp_path / "set.safetensors", tmp_path / "out"
    save_file({"directions": rows}, path, {"candidates": candidates})
    line = fails("orthogonalize", tiny("llama"), "--direction", path, "-o", out, code=3)
    assert "'candidates'" in line
    assert message in line
    assert str(path) in line
    assert not out.exists()


def test_where_a_direction_was_taken_is_checked_wherever_it_is_said(
    tiny, fails, edited: Path, rows, tmp_path: Path
) -> None:
    record = json.loads((edited / "abliterate.json").read_text())
    record["direction"]["candidates"] = [[-1, 0], [-1, 9], None, None]
    held = tmp_path / "abliterate.json"
    held.write_text(json.dumps(record))
    line = fails("verify", edited, "--direction", held, code=3)
    assert "'candidates': entry 1" in line
    single = tmp_path / "single.safetensors"
    save_file({"direction": rows[0]}, single, {"layer": "two"})
    line = fails("verify", edited, "--direction", single, code=3)
    assert "metadata 'layer' must be a whole number, not 'two'" in line


def test_what_cannot_be_done_is_said_before_the_model_is_loaded(
    tiny, fails, held: Path, rows, tmp_path: Path, monkeypatch
) -> None:
    from abliterate.run_folder import Session

    def load(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Session, "load", load)
    monkeypatch.setattr(Session, "load_in_memory", load)
    model, bare, out = tiny("llama"), tmp_path / "bare.safetensors", tmp_path / "out"
    save_file({"direction": rows[0]}, bare)
    chat = ("chat", model, "--add", "1", "--direction")
    assert "ablated, not added" in fails(*chat, held, code=2)
    assert "does not record its layer" in fails(*chat, bare, code=2)
    tokens = ("--refusal-token", "id:99999", "-o", out)
    assert "the tokenizer has the ids" in fails("extract", model, *tokens, code=2)
    assert "the tokenizer has the ids" in fails("evaluate", model, *tokens, code=2)


def test_sets_of_other_programs(tiny, cli, rows, tmp_path: Path) -> None:
    import numpy as np

    whole = tmp_path / "whole.npz"
    np.savez(whole, directions=rows.numpy())
    # steering-vectors counts the block whose output it is.
    listed = tmp_path / "listed.safetensors"
    names = {f"layer_activations.{layer - 1}": rows[layer].float() for layer in (1, 3)}
    names[f"layer_activations.{LAYERS - 1}"] = rows[0].float()
    save_file(names, listed)
    before = _tensors(tiny("llama"))
    for path, layers in ((whole, {None, 0, 1, 2, 3}), (listed, {None, 1, 3})):
        out = tmp_path / f"out-{path.stem}"
        result = cli("orthogonalize", tiny("llama"), "--direction", path, "-o", out, "--json")
        assert result.code == 0, result.err
        assert {t["layer"] for t in result.json["tensors"]} == layers
        name = "model.layers.3.self_attn.o_proj.weight"
        expected = _less(name, before[name], _unit(rows[3]))
        assert torch.allclose(_tensors(out)[name].double(), expected, atol=1e-5)
    assert "behind the last block" in result.err
    # The record counts the layers of the model, and can be taken up again.
    assert result.json["direction"]["layers"] == len(result.json["vectors"]) == LAYERS
    record = out / "abliterate.json"
    assert cli("verify", out, "--direction", record, "--source", tiny("llama")).code == 0


def test_an_edit_by_layer_is_repeated_from_its_record(
    tiny, cli, edited: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    record = edited / "abliterate.json"
    assert cli("orthogonalize", tiny("llama"), "--direction", record, "-o", again).code == 0
    for name, tensor in _tensors(edited).items():
        assert torch.equal(tensor, _tensors(again)[name])


def test_what_audit_found_can_be_removed_again(
    tiny, cli, edited: Path, rows, tmp_path: Path
) -> None:
    found, out = tmp_path / "found.safetensors", tmp_path / "out"
    cli("audit", edited, "--base", tiny("llama"), "--save-directions", found)
    result = cli("orthogonalize", tiny("llama"), "--direction", found, "-o", out, "--json")
    assert result.code == 0, result.err
    for name, tensor in _tensors(edited).items():
        assert torch.allclose(tensor, _tensors(out)[name], atol=1e-4), name
