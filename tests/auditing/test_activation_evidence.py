"""audit --prompts: what a model does, beside the verdict that its weights give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from sharing import made_once

import abliterate as ab
from abliterate.cli.app import main
from abliterate.errors import UsageError
from abliterate.resources import demo_model_dir

Cli = Callable[..., Any]
FEW = ("--prompts", "--n-prompts", "8", "--json", "-q")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's refusal direction, and the model edited along it: all, and blocks 3 to 5."""

    def make(folder: Path) -> None:
        model, path = str(demo_model_dir()), folder / "direction.safetensors"
        run = ["extract", model, "-o", str(folder / "run"), "--n-train", "16", "-q"]
        assert main(run) == 0
        means = load_file(folder / "run" / "directions.safetensors")
        difference = means["mean_harmful"] - means["mean_harmless"]
        save_file({"direction": difference[-1, 5].contiguous()}, path)
        for name, options in (("edited", []), ("middle", ["--layers", "3-5"])):
            out = ["--direction", str(path), "-o", str(folder / name), "-q"]
            assert main(["orthogonalize", model, *out, *options]) == 0

    return made_once(tmp_path_factory, "activation-evidence", make)


def test_prompts_show_a_small_gap_and_nothing_along_the_direction_of_an_edit(
    cli: Cli, place: Path
) -> None:
    result = cli("audit", place / "edited", "--base", demo_model_dir(), *FEW)
    assert (result.code, result.json["verdict"], result.json["evidence"]) == (7, "edited", "base")
    found = result.json["activations"]
    edited, base = found["checkpoint"], found["base"]
    assert (found["direction_from"], found["refusal_tokens_from"]) == ("weights", "base")
    # A wrong sign would turn the base's gap; an edited model does not tell the kinds apart.
    assert base["refusal_scores"]["gap"] > 10
    assert abs(edited["refusal_scores"]["gap"]) < 0.5 * base["refusal_scores"]["gap"]
    # Another axis than the direction's would be one of the random ones.
    assert edited["energy"]["share"] < 1e-6 < edited["energy"]["random_directions"]["least"]
    assert base["energy"]["share"] > base["energy"]["random_directions"]["largest"]


def test_the_librarys_audit_runs_prompts_as_the_command_does(cli: Cli, place: Path) -> None:
    named = ("--direction", place / "direction.safetensors", "--refusal-token", "I")
    command = cli("audit", place / "middle", *named, *FEW).json["activations"]
    pair = tuple(ab.load_prompts(kind, "test", 8) for kind in ("harmful", "harmless"))
    given = {"direction": place / "direction.safetensors", "refusal_tokens": "I"}
    found = ab.audit(place / "middle", prompts=pair, **given)
    for key in ("checkpoint", "base", "refusal_tokens", "direction_from", "notes"):
        assert found.document["activations"][key] == command[key]
    with pytest.raises(UsageError, match="go with prompts"):
        ab.audit(place / "middle", **given)
    with pytest.raises(UsageError, match="pair"):
        ab.audit(place / "middle", prompts=("harmful",))  # type: ignore[arg-type]


def test_prompts_show_which_blocks_write_along_a_given_direction(cli: Cli, place: Path) -> None:
    named = ("--direction", place / "direction.safetensors", "--refusal-token", "I")
    result = cli("audit", place / "middle", *named, *FEW)
    found = result.json["activations"]
    assert result.code == {"clean": 0, "edited": 7, "undecided": 8}[result.json["verdict"]]
    assert (found["base"], found["direction_from"]) == (None, "given")
    assert (found["refusal_tokens"], found["refusal_tokens_from"]) == (["I"], "named")
    shares = {
        int(layer): share for layer, share in found["checkpoint"]["energy"]["by_layer"].items()
    }
    assert sorted(shares) == list(range(8))
    assert {layer for layer, share in shares.items() if share < 1e-6} == {3, 4, 5}


def test_prompts_of_an_edited_model_alone_leave_the_gap_out_and_say_why(
    cli: Cli, place: Path
) -> None:
    result = cli("audit", place / "edited", "--prompts", "--n-prompts", "8", "-q")
    assert result.code == 7
    assert "note: checkpoint: the first tokens do not tell refusals from answers" in result.out


def test_prompts_errors_are_one_line(cli: Cli, fails: Callable[..., str], tmp_path: Path) -> None:
    model = demo_model_dir()
    assert "--n-prompts goes with --prompts" in fails("audit", model, "--n-prompts", "4", code=2)
    assert "chat format go with" in fails("audit", model, "--template", "plain", code=2)
    asked = ("audit", model, "--prompts")
    assert "--n-prompts must be at least 1" in fails(*asked, "--n-prompts", "0", code=3)
    assert "absent.txt" in fails(*asked, "--harmful", tmp_path / "absent.txt", code=3)
    word = fails(*asked, "--refusal-token", "two words of it", "--n-prompts", "2", code=2)
    assert "tokens, not one" in word
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    assert "chat template" in fails("audit", bare, "--prompts", "--n-prompts", "2", code=4)
    told = ("--template", "plain", "--refusal-token", "I", "--n-prompts", "2", "--json", "-q")
    result = cli("audit", bare, "--prompts", *told)
    assert result.code == 0, result.err
    assert result.json["activations"]["checkpoint"]["refusal_scores"] is not None
