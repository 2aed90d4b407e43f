"""A local judge and lm-eval on a device, under hooks: verdicts and figures as on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from on_device import check_same, on_device, on_host
from safetensors.torch import save_file


def test_a_local_judge_and_lm_eval_say_the_same(tiny: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    model, tasks = tiny("llama"), tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"question": f"which is {at}", "choices": ["red", "no"], "answer": at % 2}
            for at in range(4)]  # fmt: skip
    (tasks / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "tiny_text.yaml").write_text(
        "task: tiny_text\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tasks / 'data.jsonl'}\n"
        'test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ""\n'
        'doc_to_target: "{{question}}"\nmetric_list:\n  - metric: byte_perplexity\n'
    )
    direction = torch.randn(48, generator=torch.Generator().manual_seed(3))
    save_file({"direction": direction}, tmp_path / "r.safetensors")
    options = ("--direction", tmp_path / "r.safetensors", "--n-test", "1", "--max-new-tokens", "3",
               "--refusal-token", "5", "--intervention", "baseline", "--intervention", "ablate",
               "--dtype", "float32", "--judge", model, "--tasks", "tiny_text", "--tasks-dir",
               tasks, "-q")  # fmt: skip
    # What a judge of random weights says is no verdict: the figures are there all the same.
    on_device("evaluate", model, *options, "-o", tmp_path / "emu", code=4, float64=False)
    on_host("evaluate", model, *options, "-o", tmp_path / "cpu", code=4)
    ours, theirs = (
        json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("emu", "cpu")
    )
    assert theirs["judge"]["kind"] == "local"
    check_same(ours["interventions"], theirs["interventions"], 1e-4)
    perplexities = [
        theirs["interventions"][name]["tasks"]["tiny_text"]["byte_perplexity,none"]
        for name in ("baseline", "ablate")
    ]
    assert abs(perplexities[0] - perplexities[1]) > 1e-3  # the hooks reach lm-eval
    for file in sorted((tmp_path / "cpu" / "completions").glob("*.jsonl")):
        assert (tmp_path / "emu" / "completions" / file.name).read_bytes() == file.read_bytes()
