"""The library's public names, used as the README shows them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import abliterate


def test_public_names_are_functions_and_classes() -> None:
    for name in abliterate.__all__:
        value = getattr(abliterate, name)
        assert callable(value) or name in ("__version__", "plot"), name
    assert set(abliterate.__all__) <= set(dir(abliterate))
    assert re.fullmatch(r"\d+\.\d+\.\d+", abliterate.__version__)
    with pytest.raises(AttributeError, match="no attribute 'obliterate'"):
        _ = abliterate.obliterate


def test_type_checkers_see_every_public_name_where_it_is() -> None:
    tree = ast.parse(Path(abliterate.__file__).read_text())
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {
        alias.asname or alias.name: str(node.module).removeprefix("abliterate").removeprefix(".")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    declared = {
        node.target.id
        for node in block.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert seen == abliterate._HOME
    assert declared == {"__version__"}
    assert sorted({*seen, *declared}) == sorted(abliterate.__all__)
    package = Path(abliterate.__file__).parent
    assert (package / "py.typed").is_file()  # without it they would look at nothing


def test_the_library_gives_what_the_commands_give(tiny, cli, tmp_path: Path) -> None:
    loaded = abliterate.load_model(str(tiny("llama")))
    kinds = ("harmful", "harmless")
    train = [abliterate.load_prompts(kind, "train", 8) for kind in kinds]
    val = [abliterate.load_prompts(kind, "val", 8) for kind in kinds]
    candidates = abliterate.extract(loaded, *train, refusal_tokens=["I"], filter=False)
    loose = abliterate.Thresholds(kl=1e9, induce=-1e9)
    selection = abliterate.select(loaded, candidates, *val, thresholds=loose, filter=False)
    direction = selection.direction(candidates)
    abliterate.orthogonalize(str(tiny("llama")), direction, tmp_path / "edited")

    run = tmp_path / "run"
    options = ("--no-filter", "--refusal-token", "I", "--n-train", "8")
    assert cli("extract", tiny("llama"), "-o", run, *options).code == 0
    loosened = ("--no-filter", "--n-val", "8", "--kl-threshold", "1e9", "--induce-threshold=-1e9")
    assert cli("select", run, *loosened).code == 0
    saved = abliterate.load_direction(run)
    assert (saved.position, saved.layer) == (direction.position, direction.layer)
    assert torch.equal(saved.vector, direction.vector)
    assert cli("orthogonalize", tiny("llama"), "--direction", run, "-o", tmp_path / "o").code == 0
    here, there = (load_file(tmp_path / n / "model.safetensors") for n in ("edited", "o"))
    assert all(torch.equal(here[name], there[name]) for name in there)

    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = loaded.model(ids).logits
        with abliterate.ablate(loaded.model, direction.vector):
            ablated = loaded.model(ids).logits
        with abliterate.add(loaded.model, direction.vector, direction.layer, coeff=1.0):
            added = loaded.model(ids).logits
    assert not torch.allclose(plain, ablated)
    assert not torch.allclose(plain, added)
    strict = abliterate.Thresholds(kl=1e-12)
    nothing = abliterate.select(loaded, candidates, *val, thresholds=strict, filter=False)
    with pytest.raises(abliterate.AbliterateError, match="none of"):
        nothing.require_winner()
