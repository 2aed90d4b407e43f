"""``run`` and settings that a stage of it would refuse or ignore: said before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

REFUSED = {
    "as_lora": ("[orthogonalize]\nas_lora = true", 2, "orthogonalize --as-lora"),
    "low_disk": ("[orthogonalize]\nlow_disk = true", 2, "orthogonalize --low-disk"),
    "both formats": (
        "[orthogonalize]\nrequantize = true\ndequantize = true", 2,
        "run.toml: [orthogonalize] requantize and [orthogonalize] dequantize exclude each other",
    ),
    "scale": (
        "[orthogonalize]\nscale = 0.0", 2,
        "run.toml: [orthogonalize] scale must be a number other than zero",
    ),
    "add and scale": (
        "[orthogonalize]\nadd = 1.0\nscale = 0.5", 2,
        "run.toml: [orthogonalize] add goes with none",
    ),
    "components": (
        '[orthogonalize]\ncomponents = "head"', 2, "run.toml: [orthogonalize] components knows",
    ),
    "layers": ('[orthogonalize]\nlayers = "last"', 2, "run.toml: [orthogonalize] layers must be"),
    "edit's device": ('[orthogonalize]\ndevice = "nowhere"', 2, "nowhere"),
    "task folder alone": ('[evaluate]\ntasks_dir = "x"', 2, "without tasks"),
    "task limit alone": ("[evaluate]\ntask_limit = 3", 2, "without tasks"),
    "judge without url": (
        '[evaluate]\njudge_model = "x"', 2,
        "run.toml: [evaluate] judge_model needs [evaluate] judge_url beside it",
    ),
    "judge that is none": ('[evaluate]\njudge = "./none"', 4, "./none"),
    "corpus": ('[evaluate]\ncorpus = ["wiki"]', 2, "run.toml: [evaluate] corpus"),
    "validation prompts": ('[select]\nharmful = "none.txt"', 3, "none.txt"),
    "test prompts": ('[evaluate]\nharmless = "none.txt"', 3, "none.txt"),
    "judged under offload": (
        '[model]\noffload = true\n[evaluate]\ncorpus = ["own"]', 2,
        "run.toml: [evaluate] corpus does not run o",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_run_refuses_a_setting_of_a_later_stage_before_the_first(
    name: str, tiny, fails, tmp_path: Path
) -> None:
    text, code, part = REFUSED[name]
    config, out = tmp_path / "run.toml", tmp_path / "run"
    config.write_text(text)
    assert part in fails("run", tiny("llama"), "-o", out, "--config", config, code=code)
    assert not out.exists()


# By the model, configuration and code: what the edit would find out after hours.
_E = "[orthogonalize]"
UNFIT = [
    ("llama", f"{_E}\nlayers = '0-9'", 2, f"{_E} layers 0-9: the model has layers 0 to 3"),
    ("llama", f"{_E}\nrequantize = true", 2, f"{_E} requantize has no effect"),
    ("llama", f"{_E}\ndequantize = true", 2, f"{_E} dequantize has no effect"),
    ("llama", f"{_E}\ntied_embeddings = 'share'", 2, f"{_E} tied_embeddings share has no effect"),
    ("llama", f"{_E}\ncomponents = 'mlp,expert'", 2, f"{_E} components expert has no effect"),
    ("llama", f"{_E}\nleave_behind = ['mtp.safetensors']", 2, f"{_E} leave_behind mtp.saf"),
    ("llama", f"{_E}\nlayer_scale = 'LAYERS'", 2, f"{_E} layer_scale names layer 4"),
    ("qwen2", f"{_E}\nadd = 1.0", 4, "model has no bias at 'model.layers.0.mlp.down_proj.bias'"),
    ("llama", f"{_E}\nadd = 1.0\n[select]\nper_layer = true", 2, f"{_E} add needs one direction"),
    ("llama", "[select]\nposition = -2\n[extract]\npositions = [-3, -1]", 2,
     "[select] position -2: extract keeps positions -3, -1"),
    ("llama", "[select]\nper_layer = true\ninterpolate = 'linear:1,4'", 2,
     "[select] interpolate 1,4: the model has layers 0 to 3"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "text", "code", "part"), UNFIT)
def test_run_holds_the_edit_against_the_model_before_the_first_stage(
    model: str, text: str, code: int, part: str, tiny, fails, tmp_path: Path
) -> None:
    config, out, scales = tmp_path / "run.toml", tmp_path / "run", tmp_path / "scales.toml"
    scales.write_text("[layers]\n0-4 = 0.5\n")
    config.write_text(text.replace("LAYERS", str(scales)))
    assert part in fails("run", tiny(model), "-o", out, "--config", config, code=code)
    assert not out.exists()


@pytest.mark.parametrize("shape", [(47,), (3, 48), (4, 47)])
def test_a_direction_of_another_model_is_told_before_the_model_is_loaded(
    shape: tuple[int, ...], tiny, fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("abliterate.run_folder.Session.load", load)
    monkeypatch.setattr("abliterate.run_folder.Session.load_in_memory", load)
    file, model = tmp_path / "d.safetensors", tiny("llama")
    save_file({"direction" if len(shape) == 1 else "directions": torch.ones(shape)}, file,
              {"layer": "2"})  # fmt: skip
    for command in (("evaluate", model), ("chat", model), ("orthogonalize", model, "-o", "none")):
        line = fails(*command, "--direction", file, code=3)
        assert "it was made for another model" in line


def test_run_looks_its_tasks_up_before_the_first_stage(tiny, fails, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks, config, out = tmp_path / "tasks", tmp_path / "run.toml", tmp_path / "run"
    config.write_text(f'[evaluate]\ntasks = "nothing"\ntasks_dir = "{tasks}"\n')
    line = fails("run", tiny("llama"), "-o", out, "--config", config, code=2)
    assert f"run.toml: [evaluate] tasks_dir {tasks} is no folder" in line
    assert not out.exists()


def test_an_error_names_the_key_that_a_file_gave_and_the_option_that_the_user_typed(
    tiny, fails, tmp_path: Path
) -> None:
    config = tmp_path / "mine.toml"
    config.write_text("[orthogonalize]\nscale = 0.0\nrequantize = true\n")
    base = ("orthogonalize", tiny("llama"), "--direction", tmp_path / "d.safetensors",
            "-o", tmp_path / "out", "--config", config)  # fmt: skip
    save_file({"direction": torch.ones(48)}, tmp_path / "d.safetensors")
    assert "mine.toml: [orthogonalize] scale must be a number" in fails(*base, code=2)
    assert "error: --scale must be a number" in fails(*base, "--scale", "0", code=2)
    both = fails(*base, "--scale", "1", "--dequantize", code=2)
    assert f"{config}: [orthogonalize] requantize and --dequantize exclude each other" in both
    config.write_text("[orthogonalize]\ndequantize = true\n")
    both = fails(*base, "--requantize", code=2)
    assert "error: --requantize and --dequantize exclude each other" in both
    assert f"(--dequantize is [orthogonalize] dequantize in {config})" in both
    config.write_text("[orthogonalize]\nscale = 0.0\n[evaluate]\nmax_new_tokens = 3\n")
    assert "mine.toml" not in fails("extract", "none", "-o", tmp_path, "--config", config, code=4)


_MEMBER, _EMPTY = "each member must be text or a whole number, not ", "is empty: name one at least"
LISTS = {
    "[extract] positions": {
        "[-1, -2.5]": f"{_MEMBER}-2.5", "[[-1]]": f"{_MEMBER}a list", "[]": _EMPTY,
        "[-1, true]": f"{_MEMBER}a switch", "[-1, 2]": "must be",
    },
    "[extract] refusal_tokens": {
        "[4.5]": f"{_MEMBER}4.5", "[{a = 1}]": f"{_MEMBER}a table",
        "[]": f"{_EMPTY}, or leave it out for those that are detected", '"I"': "must be a list",
    },
    "[extract] harmful": {
        '["a"]': "must be one text, not a list ([evaluate] alone takes several)",
    },
    "[extract] save_activations": {"[]": _EMPTY, "[0, 9.5]": f"{_MEMBER}9.5"},
    "[select] n_val": {
        "[3]": "must be an integer, not [3]", '"8"': "must be an integer, not '8'",
        "8.0": "must be an integer, not 8.0",
    },
    "[orthogonalize] scale": {'"0.5"': "must be a number, not '0.5'"},
    "[evaluate] harmful": {
        "[]": f"{_EMPTY}, or leave it out for what extract used", "[true]": f"{_MEMBER}a switch",
        '[["a"]]': f"{_MEMBER}a list",
    },
    "[evaluate] harmless": {"[]": _EMPTY},
    "[evaluate] corpus": {"[2.5]": f"{_MEMBER}2.5", '["wiki"]': "corpus"},
    "[evaluate] tasks": {"[]": _EMPTY},
    "[evaluate] refusal_phrases": {'["en", 3]': "no list for '3'", "[]": _EMPTY},
    "[evaluate] judge_url": {'["http://secret"]': "must be one text, not a list"},
    "[orthogonalize] layers": {
        "[1.5]": f"{_MEMBER}1.5", "[]": _EMPTY, "[2, 9]": "2,9: the model has layers 0 to 3",
        "9": "layers 9: the model has",
    },
    "[orthogonalize] components": {"[]": _EMPTY, '["mlp", "head"]': "not 'head'"},
    "[orthogonalize] leave_behind": {"[[1]]": f"{_MEMBER}a list"},
    "[model] batch_size": {"[1]": "batch_size: must be"},
}  # fmt: skip


def test_lists_of_a_configuration_say_which_member_is_wrong(tiny, fails, tmp_path: Path) -> None:
    config, out = tmp_path / "run.toml", tmp_path / "run"
    for where, values in LISTS.items():
        table, _, key = where.partition(" ")
        for value, part in values.items():
            config.write_text(f"{table}\n{key} = {value}\n")
            line = fails("run", tiny("llama"), "-o", out, "--config", config, code=2)
            assert f"run.toml: {where}" in line, line
            assert part in line, line
            assert "secret" not in line
            assert not out.exists()
