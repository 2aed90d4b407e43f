"""``run`` and settings that a stage of it would refuse or ignore: said before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

REFUSED = {
    "as_lora": ("[orthogonalize]\nas_lora = true", 2, "orthogonalize --as-lora"),
    "low_disk": ("[orthogonalize]\nlow_disk = true", 2, "orthogonalize --low-disk"),
    "both formats": (
        "[orthogonalize]\nrequantize = true\ndequantize = true", 2, "exclude each other",
    ),
    "add and scale": ("[orthogonalize]\nadd = 1.0\nscale = 0.5", 2, "--add"),
    "components": ('[orthogonalize]\ncomponents = "head"', 2, "--components"),
    "layers": ('[orthogonalize]\nlayers = "last"', 2, "--layers"),
    "edit's device": ('[orthogonalize]\ndevice = "nowhere"', 2, "nowhere"),
    "task folder alone": ('[evaluate]\ntasks_dir = "x"', 2, "without tasks"),
    "task limit alone": ("[evaluate]\ntask_limit = 3", 2, "without tasks"),
    "judge without url": ('[evaluate]\njudge_model = "x"', 2, "needs --judge-url"),
    "judge that is none": ('[evaluate]\njudge = "./none"', 4, "./none"),
    "corpus": ('[evaluate]\ncorpus = ["wiki"]', 2, "--corpus"),
    "validation prompts": ('[select]\nharmful = "none.txt"', 3, "none.txt"),
    "test prompts": ('[evaluate]\nharmless = "none.txt"', 3, "none.txt"),
    "judged under offload": (
        '[model]\noffload = true\n[evaluate]\ncorpus = ["own"]', 2, "--corpus does not run",
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


def test_run_looks_its_tasks_up_before_the_first_stage(tiny, fails, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks, config, out = tmp_path / "tasks", tmp_path / "run.toml", tmp_path / "run"
    config.write_text(f'[evaluate]\ntasks = "nothing"\ntasks_dir = "{tasks}"\n')
    line = fails("run", tiny("llama"), "-o", out, "--config", config, code=2)
    assert "--tasks-dir" in line
    assert not out.exists()
