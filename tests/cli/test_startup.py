"""What each command imports: torch and its kin only where a model is needed.

Names, not seconds: ``scripts/bench_startup.py`` prints the times.
"""

from __future__ import annotations

import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import abliterate
from abliterate.cli.app import app, main
from abliterate.resources import demo_model_dir

# What takes long to import, and what only some command needs.
HEAVY = {
    *("torch", "transformers", "tokenizers", "safetensors", "accelerate", "sympy", "scipy"),
    *("datasets", "pandas", "pyarrow", "sklearn", "lm_eval", "peft", "openai", "huggingface_hub"),
    "plotly",
}
# A process for each command would cost more than all that they do: one runs them in turn.
_DRIVER = """
import json, sys
from abliterate.cli.app import main
for number, argv in enumerate(json.loads(sys.argv[1])):
    code = main(argv)
    sys.stderr.write(f"\\nended {number} {code}\\n")
"""


def _names(importtime: str) -> set[str]:
    """The modules of ``-X importtime``'s lines."""
    return set(re.findall(r"^import time: +\d+ \| +\d+ \| +(\S+)$", importtime, re.MULTILINE))


def _heavy(names: set[str], beyond: set[str] = HEAVY) -> set[str]:
    return {name for name in names if name.partition(".")[0] in beyond}


def _python(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)


def _imports(commands: list[list[str]], code: int) -> list[set[str]]:
    """What each command imports that none before it did; all must end with ``code``."""
    found = _python("-c", _DRIVER, json.dumps(commands)).stderr
    parts = re.split(r"^ended \d+ (\d+)$", found, flags=re.MULTILINE)
    codes = parts[1::2]
    assert codes == [str(code)] * len(commands), found[-2000:]
    return [_names(part) for part in parts[: 2 * len(commands) : 2]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo model that has been inspected."""
    folder = tmp_path_factory.mktemp("startup") / "run"
    small = ["--n-train", "8", "--no-filter", "--refusal-token", "I", "--positions", "last"]
    loose = ["--n-val", "4", "--kl-threshold", "1e9", "--induce-threshold=-1e9", "--no-filter"]
    kept = ["--save-activations=3"]
    model, quiet = str(demo_model_dir()), "--quiet"
    assert main(["extract", model, "-o", str(folder), *small, *kept, quiet]) == 0
    assert main(["select", str(folder), *loose, quiet]) == 0
    assert main(["inspect", str(folder), quiet]) == 0
    return folder


def _subcommands() -> list[str]:
    return [command.name or command.callback.__name__ for command in app.registered_commands]


def test_help_and_usage_errors_import_nothing_heavy(tmp_path: Path) -> None:
    helps = [["--help"], ["--version"], *([name, "--help"] for name in _subcommands())]
    assert len(helps) > 15
    for argv, names in zip(helps, _imports(helps, 0), strict=True):
        assert not _heavy(names, HEAVY | {"numpy", "jinja2"}), argv
    (tmp_path / "bad.toml").write_text("[extract]\nn_trian = 3\n")
    wrong = [
        ["nosuchcommand"],
        ["extract"],
        ["extract", "model", "-o", "out", "--n-train", "x"],
        ["extract", "model", "-o", "out", "--n-train", "0"],
        ["extract", "model", "-o", "out", "--config", str(tmp_path / "bad.toml")],
        ["run", "model", "-o", "out", "--no-such-option"],
        ["select"],
        ["select", "run", "--scores", "table.json"],
        ["orthogonalize", "model", "-o", "out", "--direction", "run", "--jobs", "0"],
        ["verify", "edited", "--direction", "run", "--n-prompts", "0"],
        ["evaluate", "model", "--task-limit", "0"],
        ["score", "file.json", "--judge-template", "x"],
        ["trace", "run", "--heads", "0"],
        ["fragility", "run", "--image", "gif"],
        ["methods", "run", "--format", "pdf"],
        ["chat", "model", "--ablate"],
        ["plan", "model", "--tokens", "0"],
        ["plan", "model", "--memory", "much"],
        ["plan", "model", "--dtype", "int3"],
        ["extract", "model", "-o", "out", "--batch-size", "0"],
        ["extract", "model", "-o", "out", "--activation-memory", "much"],
        ["orthogonalize", "model", "-o", "out", "--direction", "run", "--layers", "7-3"],
        ["evaluate", "model", "--intervention", "nothing"],
        ["evaluate", "model", "--intervention", "ablate"],
        ["evaluate", "model", "--checkpoint", f"ablate={tmp_path}"],
        ["audit", "model", "-o", str(tmp_path)],
        ["chat", "model", "--temperature=-1"],
    ]
    for argv, names in zip(wrong, _imports(wrong, 2), strict=True):
        assert not _heavy(names), argv


def test_names_that_do_not_exist_are_told_before_torch_is_imported(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    models = [
        ["extract", absent, "-o", str(tmp_path / "out")],
        ["run", absent, "-o", str(tmp_path / "out")],
        ["evaluate", absent],
        ["verify", absent, "--direction", "run"],
        ["writers", absent],
        ["diff", absent, absent],
        ["audit", absent],
        ["audit", str(demo_model_dir()), "--base", absent],
        ["chat", absent],
        ["plan", absent],
        ["plan", str(tmp_path)],
        ["writers", str(tmp_path)],
        ["diff", str(demo_model_dir()), str(tmp_path)],
        ["evaluate", str(demo_model_dir()), "--checkpoint", f"other={absent}"],
    ]
    for argv, names in zip(models, _imports(models, 4), strict=True):
        assert not _heavy(names), argv
    others = [
        ["prompts", f"{absent}.txt"],
        ["select", absent],
        ["select", "--scores", f"{absent}.json"],
        ["score", f"{absent}.json"],
        ["inspect", absent],
        ["trace", absent],
        ["report", absent],
        ["methods", absent],
        ["orthogonalize", "model", "-o", "out", "--direction", f"{tmp_path}"],
        ["orthogonalize", "model", "-o", "out", "--direction", absent],
        ["evaluate", "model", "--direction", absent],
        ["verify", str(demo_model_dir()), "--direction", absent],
        ["audit", "model", "--direction", absent],
        ["chat", "model", "--direction", absent],
        ["fragility", absent],
    ]
    for argv, names in zip(others, _imports(others, 3), strict=True):
        assert not _heavy(names), argv


def test_commands_without_a_model_import_neither_torch_nor_transformers(
    run: Path, tmp_path: Path
) -> None:
    answers = [{"prompt": "How?", "response": "I cannot say."}]
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    (tmp_path / "mine.csv").write_text("question\nWhy?\nHow?\n")
    light = [
        ["prompts", "harmful"],
        ["prompts", str(tmp_path / "mine.csv"), "--json"],
        ["select", "--scores", str(run / "selection.json")],
        ["inspect", str(run)],
        ["score", str(tmp_path / "answers.json"), "-o", str(tmp_path / "scored.jsonl")],
        ["report", str(run), "-o", str(tmp_path / "report.html")],
        ["methods", str(run)],
        ["methods", str(run), "--format", "latex", "-o", str(tmp_path / "methods.tex")],
    ]
    needed = {"score": {"numpy"}, "report": {"plotly"}}
    for argv, names in zip(light, _imports(light, 0), strict=True):
        assert not _heavy(names, (HEAVY | {"numpy"}) - needed.get(argv[0], set())), argv


def test_a_command_in_a_process_of_its_own_imports_as_little() -> None:
    found = _python("-m", "abliterate", "prompts", "harmless", "--json")
    assert json.loads(found.stdout)["splits"]["train"]["prompts"] > 100
    names = _names(found.stderr)
    assert "abliterate.prompts.sources" in names
    assert not _heavy(names, HEAVY | {"numpy", "jinja2", "rich.table"})


def test_commands_with_a_model_import_no_more_than_transformers_does_for_one() -> None:
    """Every module of the package beside what transformers itself needs to load any model.

    transformers 5.23 imports sympy, torch._dynamo and torch.distributed.tensor with its
    ``PreTrainedModel``, so that they are absent cannot be asked; that nothing else comes can.
    """
    modules = [
        module.name
        for module in pkgutil.walk_packages(abliterate.__path__, "abliterate.")
        # The client is openai's: whoever asks no endpoint imports neither.
        if not module.name.endswith(("__main__", ".endpoint_client"))
    ]
    assert len(modules) > 100
    model = "import transformers.models.llama.modeling_llama; " + "".join(
        f"from transformers import {name}; " for name in ("AutoModelForCausalLM", "AutoTokenizer")
    )
    stated = _python("-c", model + "import " + ", ".join(modules)).stderr
    theirs, ours = stated[: stated.index(" abliterate\n")], stated[stated.index(" abliterate\n") :]
    assert "abliterate.pipeline.run" in _names(ours)
    assert "transformers.modeling_utils" in _names(theirs)
    assert not _heavy(_names(ours))
    # An older transformers imports sklearn, where it is, for its own assisted decoding.
    assert not _heavy(_names(ours), {"sklearn"})
    assert not _heavy(_names(stated), {"datasets", "pandas", "pyarrow", "plotly"})
    assert not _heavy(_names(stated), {"lm_eval", "openai", "peft"})
