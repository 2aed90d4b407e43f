"""A run folder: what its files are called, and the model and settings with which stages fill it.

``RUN/extract.json`` + ``directions.safetensors`` -> ``selection.json`` + ``direction.safetensors``
-> ``model/`` -> ``evaluation.json`` + ``completions/``. A record holds the hash of everything that
the stage depended on, so that ``run`` can tell a finished stage from a stale one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abliterate.checkpoints.checkpoint import Checkpoint
from abliterate.console import log
from abliterate.errors import UsageError
from abliterate.prompts.chat_template import ChatFormat
from abliterate.prompts.sampling import prompt_key
from abliterate.prompts.sources import Prompt
from abliterate.settings import Settings
from abliterate.storage.artifacts import check_writable, hash_file, versions
from abliterate.storage.json_text import parse_json
from abliterate.storage.locks import hold_folder
from abliterate.storage.ownership import Kind, claim

if TYPE_CHECKING:
    from abliterate.distributed.rank_group import RankGroup
    from abliterate.models.device_placement import Placement
    from abliterate.models.loading import LoadedModel

EXTRACT, DIRECTIONS = "extract.json", "directions.safetensors"
ACTIVATIONS = "activations.safetensors"
SELECTION, EVALUATION, COMPLETIONS = "selection.json", "evaluation.json", "completions"
PARTIAL = "selection.partial.json"
INSPECT, TRACE = "inspect.json", "trace.json"
MODEL = "model"
# What the evaluation of ``run`` calls the checkpoint in ``model/``.
EDITED = "orthogonalized"


@dataclass(frozen=True)
class Session:
    """A checkpoint and settings; the model, and what runs it, is loaded when first needed."""

    checkpoint: Checkpoint
    settings: Settings

    @cached_property
    def loaded(self) -> LoadedModel:
        return self.load(self.checkpoint)

    @cached_property
    def ranks(self) -> RankGroup:
        from abliterate.distributed.rank_group import join_ranks

        return join_ranks()

    @cached_property
    def placement(self) -> Placement:
        from abliterate.models.device_placement import find_placement

        model = self.settings.model
        return find_placement(self.ranks, model.device, model.device_map, model.tensor_parallel)

    @cached_property
    def offload(self) -> bool | None:
        """Whether models are streamed, as told or by what is free now.

        Decided once: a checkpoint that is compared with the model has its size, and figures of the
        two ways differ in their last digits. None where several devices or processes share them.
        """
        model, where = self.settings.model, self.placement
        if model.offload is not None or where.is_spread or where.ranks.size > 1:
            return model.offload
        from abliterate.offload import must_stream

        return must_stream(self.checkpoint, model.device, model.dtype, model.trust_remote_code)

    @property
    def generates(self) -> bool:
        """Whether the models that are opened give answers, not first tokens alone."""
        return not self.offload

    def load(self, checkpoint: Checkpoint) -> LoadedModel:
        import torch

        from abliterate.inference.in_memory import engine_of
        from abliterate.offload import load_or_stream

        model, where = self.settings.model, self.placement
        torch.manual_seed(model.seed)
        with where.ranks.fail_together():
            loaded = load_or_stream(
                checkpoint,
                model.device,
                model.dtype,
                model.trust_remote_code,
                self.offload,
                model.activation_memory,
                where,
            )
        log.info("%s", engine_of(loaded).opened(where))
        return loaded

    def load_in_memory(self) -> LoadedModel:
        """The model in memory, for what does not stream it, whatever ``--offload`` says.

        Raises:
            UsageError: the weights do not fit.
        """
        from abliterate.offload.open_model import too_large

        model, where = self.settings.model, self.placement
        if "loaded" not in self.__dict__ and not where.is_spread and where.ranks.size == 1:
            at = (model.device, model.dtype, model.trust_remote_code)
            if lacking := too_large(self.checkpoint, *at):
                raise UsageError(
                    f"{lacking}: this command needs the model in memory, use a smaller --dtype or "
                    "a larger machine"
                )
            self.__dict__["offload"] = False
        return self.loaded

    def release(self) -> None:
        """Let go of the model; it is loaded again when it is next needed."""
        if (loaded := self.__dict__.pop("loaded", None)) is not None:
            from abliterate.inference.in_memory import engine_of

            engine_of(loaded).close()
            del loaded
            gc.collect()
            import torch

            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @cached_property
    def identity(self) -> dict[str, Any]:
        return self.checkpoint.identity()

    @property
    def chat(self) -> ChatFormat:
        chat = self.settings.chat
        return ChatFormat(chat.system, chat.template_kwargs, chat.response_prefix)

    def base_inputs(self) -> dict[str, Any]:
        """What every stage depends on: the model, how it computes, how prompts are formatted."""
        model = self.settings.model
        return {
            "model": self.identity,
            "dtype": model.dtype,
            "device": model.device,
            "offload": model.offload,
            "seed": model.seed,
            "chat": self.settings.chat.model_dump(),
            "versions": versions(),
        }


@contextmanager
def writing(
    ranks: RankGroup, folder: Path, command: str, files: Mapping[str, Kind], part: str = ""
) -> Iterator[None]:
    """Hold a run folder for a stage that writes to it: one process at a time, over nothing foreign.

    The first rank of a team holds it for all. A chain of stages holds it throughout.

    Args:
        ranks: the ranks of this job.
        folder: the run folder; made if need be, and removed if left empty.
        command: which stage, or chain of them.
        files: what it writes there, and by what a file of its own is known.
        part: held instead of the whole folder, by stages that only read what others write.

    Raises:
        InputError: another process writes there, or one of the files is a link or foreign.
        UsageError: the folder cannot be written to.
    """
    with ExitStack() as held:

        def take() -> None:
            check_writable(folder)
            held.enter_context(hold_folder(folder, command, part))
            claim(folder, files)

        ranks.run_on_main(take)
        yield


def load_if_current(
    record: Path, inputs: str, outputs: Mapping[str, Path]
) -> dict[str, Any] | None:
    """The record, if the stage ran on the same inputs and its outputs are still as it left them."""
    try:
        document: dict[str, Any] = parse_json(record.read_text(encoding="utf-8"))
        if document["inputs"] != inputs:
            return None
        if any(document["outputs"][name] != hash_file(path) for name, path in outputs.items()):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    log.info("%s is up to date", record)
    return document


def prompt_sources(settings: Settings, harmful: str | None, harmless: str | None) -> dict[str, str]:
    """A stage's prompt sources by kind; None for the one of ``extract``."""
    return {
        "harmful": harmful or settings.extract.harmful,
        "harmless": harmless or settings.extract.harmless,
    }


def prompt_keys(
    prompts: Mapping[str, Sequence[Prompt]], keep_text: bool = False
) -> dict[str, list[str]]:
    """Prompts by kind, as their hashes (or, to be hashed themselves, their texts)."""
    key: Callable[[str], str] = str if keep_text else prompt_key
    return {kind: [key(prompt.text) for prompt in chosen] for kind, chosen in prompts.items()}
