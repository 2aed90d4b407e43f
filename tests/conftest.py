"""Fixtures: a tiny tokenizer and tiny random checkpoints on disk, and the command line."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Workers share the cores: one thread each is faster, and keeps sums in one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Each client of a server reads all authorities of the system, 0.05 s, to talk to this machine.
os.environ.setdefault("SSL_CERT_DIR", str(Path(__file__).parent))
# Tables of a result fit COLUMNS, which readline hands to the workers that pytest starts.
os.environ.pop("COLUMNS", None)

import pytest
import torch
from commands import Commands
from hub_server import Hub, commands_beside_hub
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils import collect_env
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from warm_python import warm_python

from abliterate.cli.app import main
from abliterate.prompts.sources import read_source

torch.set_num_threads(1)
# lm-eval asks pip for all packages with every run, for more than a second.
collect_env.get_pretty_env_info = cache(collect_env.get_pretty_env_info)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
VOCABULARY = 512


# Files that take longest, in the order of their time: a worker that begins one of them last keeps
# the others waiting (``--dist loadfile`` gives a file to one worker).
_LONGEST = (
    "writers/test_architectures.py", "emulated/test_emulated_accelerator.py",
    "emulated/test_emulated_check.py", "writers/test_disk_tensors.py", "distributed/test_ranks.py",
    "selection/test_staged_search.py", "models/test_device_placement.py",
    "report/test_report_files.py", "test_demo.py", "report/test_report.py",
    "checkpoints/test_hub_faults.py", "cli/test_tampered_files.py", "auditing/test_edit_forms.py",
    "offload/test_offload.py", "offload/test_offload_memory.py",
    "evaluation/test_thinking_modes.py", "pipeline/test_run.py", "test_without_posix.py",
    "cli/test_startup.py", "editing/test_edit_ranks.py", "checkpoints/test_hub_commits.py",
)  # fmt: skip


# Files of one worker: what they make once, or import, takes as long as they do.
_TOGETHER = (
    # Hundreds of modules with models.
    ("writers/test_architectures.py", "writers/test_disk_tensors.py"),
    # The hub, and the process that starts commands beside it.
    ("checkpoints/test_hub_faults.py", "checkpoints/test_hub_commits.py",
     "editing/test_hub_sources.py", "editing/test_push_to_hub.py"),
    # lm-eval.
    ("evaluation/test_capability.py", "inference/test_decoding.py",
     "pipeline/test_run_settings.py"),
    # peft.
    ("editing/test_edit_options.py", "editing/test_direction_set_outputs.py",
     "models/test_adapter_beside.py"),
)  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadfile``, where some files count as one."""
    from xdist.scheduler import LoadFileScheduling

    if config.getoption("dist") != "loadfile":
        return None
    first = {f"tests/{file}": f"tests/{files[0]}" for files in _TOGETHER for file in files}

    class FilesTogether(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return first.get(file, file)

    return FilesTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; ``scripts/test.sh`` tells xdist to keep the order."""
    here = Path(__file__).parent
    place = {str(here / name): at for at, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(str(item.path), len(place)))


_file: Path | None = None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Take what has been imported out of the garbage collection, at the first test of each file.

    Commands collect when they let a model go, and look at all objects of the process each time: a
    worker has many times those of a command.
    """
    global _file
    if item.path != _file:
        _file = item.path
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with a ChatML-like template, trained on the bundled prompts."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [p.text for p in read_source("harmless").splits["train"]]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder


_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": None,
}

CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SMALL, tie_word_embeddings=False),
    "llama-bias": lambda: LlamaConfig(
        **_SMALL, tie_word_embeddings=False, attention_bias=True, mlp_bias=True
    ),
    "qwen2": lambda: Qwen2Config(**_SMALL, tie_word_embeddings=True),
    "gemma": lambda: GemmaConfig(**_SMALL, head_dim=12),
    # A model that is no edit of the others.
    "other": lambda: LlamaConfig(**{**_SMALL, "vocab_size": VOCABULARY + 8}),
    "mistral": lambda: MistralConfig(**_SMALL, tie_word_embeddings=False, sliding_window=16),
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Callable[..., Path]:
    """Make (once) a random checkpoint of an architecture in ``CONFIGS``, sharded on request."""
    made: dict[tuple[str, bool, torch.dtype], Path] = {}

    def build(
        kind: str = "llama", sharded: bool = False, dtype: torch.dtype = torch.float32
    ) -> Path:
        key = (kind, sharded, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-model")
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    # Norm gains and biases too: left at one and zero they would hide mistakes.
                    base = 1.0 if parameter.ndim == 1 and float(parameter.mean()) == 1.0 else 0.0
                    parameter.copy_(base + 0.3 * torch.randn_like(parameter))
            model.to(dtype).save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
            for file in tokenizer_dir.iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
            made[key] = folder
        return made[key]

    return build


class Result:
    """What a command left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command line in process, as a user would type it."""

    def run(*args: str | Path) -> Result:
        capfd.readouterr()
        code = main([str(arg) for arg in args])
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def commands() -> Commands:
    """The command line in processes of its own, which start in milliseconds."""
    return Commands(warm_python())


@pytest.fixture
def fails(cli: Callable[..., Result]) -> Callable[..., str]:
    """Run a command that must fail with one line on stderr and nothing on stdout; returns it."""

    def run(*args: str | Path, code: int) -> str:
        result = cli(*args)
        assert result.code == code, result.err
        assert result.out == ""
        lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert "Traceback" not in result.err
        assert "unexpected" not in lines[0]
        return lines[0]

    return run


@pytest.fixture(scope="session")
def hub_place(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Hub, Commands, Path]]:
    """A hub on loopback, commands that know no other, and where they keep what they fetch.

    One for all tests: the commands' server takes seconds to start. Each test clears the hub and
    fills it with its own.
    """
    cache = tmp_path_factory.mktemp("home")
    with commands_beside_hub(cache, "datasets") as (hub, run):
        yield hub, run, cache
