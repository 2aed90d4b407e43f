"""A run folder: what its files are called, and the model and settings with which stages fill it.

``RUN/extract.json`` + ``directions.safetensors`` -> ``selection.json`` + ``direction.safetensors``
-> ``model/`` -> ``evaluation.json`` + ``completions/``. How a stage runs: ``abliterate.run_stage``.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

from abliterate.checkpoints.checkpoint import Checkpoint
from abliterate.console import log
from abliterate.metrics.refusal_tokens import token_text
from abliterate.prompts.chat_template import ChatFormat
from abliterate.prompts.sampling import load_prompts, prompt_key
from abliterate.prompts.source_kinds import wrong_kinds
from abliterate.prompts.sources import Prompt
from abliterate.prompts.thinking import Thinking, find_thinking
from abliterate.settings import ModelSettings, Settings
from abliterate.storage.artifacts import versions

if TYPE_CHECKING:
    from abliterate.distributed.rank_group import RankGroup
    from abliterate.inference.engine import Opener
    from abliterate.models.device_placement import Placement
    from abliterate.models.loading import LoadedModel
    from abliterate.offload import OpenOptions

EXTRACT, DIRECTIONS = "extract.json", "directions.safetensors"
ACTIVATIONS = "activations.safetensors"
SELECTION, EVALUATION, COMPLETIONS = "selection.json", "evaluation.json", "completions"
SCORES = "scores.safetensors"
INSPECT, TRACE, FRAGILITY = "inspect.json", "trace.json", "fragility.json"
MODEL, RUN = "model", "run.json"
# What the evaluation of ``run`` calls the checkpoint in ``model/``.
EDITED = "orthogonalized"


@dataclass(frozen=True)
class Session:
    """A checkpoint and settings; the model, and what runs it, is loaded when first needed.

    Attributes:
        checkpoint: of the model.
        settings: of the stages.
        commits: of hub data sets, by ``org/name[@revision]`` as a source names them: those that
            the run's records name, and those that were looked up since. Records list them all.
        computed: how the model computes, once it has been loaded, as :meth:`how_computed` says.
    """

    checkpoint: Checkpoint
    settings: Settings
    commits: dict[str, str] = field(default_factory=dict)
    computed: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def loaded(self) -> LoadedModel:
        loaded = self.load(self.checkpoint)
        self.computed.update(computes(loaded))
        if "thinking" not in self.__dict__:
            self.__dict__["thinking"] = self._find_thinking(loaded.tokenizer)
        return loaded

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, which is read sooner than the model."""
        if "loaded" in self.__dict__:
            return self.loaded.tokenizer
        from abliterate.models.loading import load_config, load_tokenizer, require_safetensors

        trust = self.settings.model.trust_remote_code
        # What is wrong with the checkpoint, these say better.
        load_config(self.checkpoint, trust)
        require_safetensors(self.checkpoint)
        return load_tokenizer(self.checkpoint, trust)

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
    def opener(self) -> Opener:
        """How models are opened, as told or by what is free now."""
        from abliterate.offload import choose_opener

        return choose_opener(self.checkpoint, self._options)

    @property
    def _options(self) -> OpenOptions:
        from abliterate.offload import OpenOptions

        model = self.settings.model
        return OpenOptions(
            model.device,
            model.dtype,
            model.trust_remote_code,
            model.offload,
            model.activation_memory,
            self.placement,
            model.load_in,
            model.attn_implementation,
        )

    def load(self, checkpoint: Checkpoint) -> LoadedModel:
        import torch

        from abliterate.inference.in_memory import engine_of

        where = self.placement
        torch.manual_seed(self.settings.model.seed)
        with where.ranks.fail_together():
            loaded = self.opener.open(checkpoint)
        log.info("%s", engine_of(loaded).opened(where))
        dtype = str(loaded.model.dtype).removeprefix("torch.")
        self.compare_dtype(dtype, checkpoint)
        if checkpoint != self.checkpoint and dtype != self.computed.get("dtype", dtype):
            self.computed["checkpoint_dtype"] = dtype
        return loaded

    def expect_dtype(self, dtype: object) -> None:
        """From now on a model that is loaded in another dtype than extract's is told of."""
        if isinstance(dtype, str):
            self.__dict__["extract_dtype"] = dtype
            if (known := self.computed.get("dtype")) is not None:
                self.compare_dtype(known)

    def compare_dtype(self, dtype: str, checkpoint: Checkpoint | None = None) -> None:
        """Say so where it is not extract's dtype in which a model computes, or has computed."""
        before = self.__dict__.get("extract_dtype")
        if before is not None and dtype != before:
            log.warning(
                "%s runs in %s, extract ran in %s: figures of the two differ "
                "(docs/reproducibility.md); give --dtype %s to stay with extract's",
                (checkpoint or self.checkpoint).name,
                dtype,
                before,
                before,
            )

    def load_in_memory(self) -> LoadedModel:
        """The model in memory, for what needs it there, whatever the settings say.

        Raises:
            UsageError: the weights do not fit.
        """
        from abliterate.offload import in_memory_opener

        if "loaded" not in self.__dict__:
            self.__dict__["opener"] = in_memory_opener(self.checkpoint, self._options)
        return self.loaded

    def release(self) -> None:
        """Let go of the model; it is loaded again when it is next needed."""
        if (loaded := self.__dict__.pop("loaded", None)) is not None:
            from abliterate.inference.in_memory import engine_of

            self.computed.update(batches_of(loaded))
            engine_of(loaded).close()
            del loaded
            gc.collect()
            import torch

            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def how_computed(self) -> dict[str, Any]:
        """What records say of how the model has computed: nothing if it was not loaded.

        Returns:
            ``dtype``, ``device``, ``attention`` and ``quantization``, as they were resolved, and
            ``batches``: the most ``rows`` and ``tokens`` that shared a forward pass since
            :meth:`begin_stage`, and the most ``answer_rows`` that were answered at once.
        """
        if "loaded" in self.__dict__:
            self.computed.update(batches_of(self.loaded))
        return dict(self.computed)

    def begin_stage(self) -> None:
        """Count the batches anew."""
        self.computed.pop("batches", None)
        if "loaded" in self.__dict__:
            from abliterate.inference.token_batches import forget_batches

            forget_batches(self.loaded.model)

    @cached_property
    def identity(self) -> dict[str, Any]:
        return self.checkpoint.identity()

    @property
    def chat(self) -> ChatFormat:
        return ChatFormat.of(self.settings.chat)

    def set_date(self, date: str) -> None:
        """From now on templates that ask for the date are told this one, and records hold it."""
        chat = self.settings.chat.model_copy(update={"date": date})
        # The one thing that is found out late: the first stage of a run sets it, once.
        settings = self.settings.model_copy(update={"chat": chat})
        object.__setattr__(self, "settings", settings)

    @cached_property
    def thinking(self) -> Thinking:
        """What is done about the model's thoughts, by its template and the settings."""
        return self._find_thinking(self.tokenizer)

    def _find_thinking(self, tokenizer: Any) -> Thinking:
        found = find_thinking(tokenizer, self.chat)
        if (line := found.line()) is not None:
            log.info("%s", line)
        return found

    def draw(
        self,
        sources: Mapping[str, str],
        split: str,
        n: int | None,
        option: str,
        used: Mapping[str, Sequence[str]] | None = None,
    ) -> dict[str, list[Prompt]]:
        """Prompts by kind; as :func:`abliterate.prompts.sampling.load_prompts` for each.

        Args:
            sources: where they come from, by kind.
            split: ``train``, ``val`` or ``test``.
            n: how many of each kind, or None for all.
            option: what asks for that many, for the error.
            used: keys of prompts that other stages have used, by kind: never drawn again.
        """
        seed, used = self.settings.model.seed, used or {}
        self.warn_of_kinds(sources)
        return {
            kind: load_prompts(
                source, split, n, seed, used.get(kind, ()), option, commits=self.commits
            )
            for kind, source in sources.items()
        }

    def warn_of_kinds(self, sources: Mapping[str, str]) -> None:
        """Say it, once, where sources are known to hold another kind of prompts than is asked for.

        Args:
            sources: where they come from, by kind: ``harmful``, ``harmless``, ``borderline``.
        """
        said: set[str] = self.__dict__.setdefault("said", set())
        for sentence in wrong_kinds(sources):
            if sentence not in said:
                log.warning("%s", sentence)
                said.add(sentence)

    def draw_test(
        self, n: int | None, used: Mapping[str, Sequence[str]]
    ) -> tuple[dict[str, list[Prompt]], dict[str, dict[str, list[str]]]]:
        """Test prompts by kind, pooled from the sources that evaluations name.

        Args:
            n: how many of each source, or None for all.
            used: keys of prompts that other stages have used, by kind: never drawn again.

        Returns:
            The prompts, each once, and where a kind has several sources the keys of each one's.
        """
        pooled: dict[str, list[Prompt]] = {}
        sets: dict[str, dict[str, list[str]]] = {}
        asked = {
            kind: getattr(self.settings.evaluate, kind) or (getattr(self.settings.extract, kind),)
            for kind in ("harmful", "harmless")
        }
        for harmful, harmless in product(*asked.values()):
            self.warn_of_kinds({"harmful": harmful, "harmless": harmless})
        for kind in asked:
            sources = dict.fromkeys(asked[kind])
            found: dict[str, Prompt] = {}
            for source in sources:
                drawn = self.draw({kind: source}, "test", n, "--n-test", used)[kind]
                keys = [prompt_key(prompt.text) for prompt in drawn]
                found = dict(zip(keys, drawn, strict=True)) | found  # the first of two alike
                sets.setdefault(kind, {})[source] = keys
            order = dict.fromkeys(key for keys in sets[kind].values() for key in keys)
            pooled[kind] = [found[key] for key in order]
        return pooled, {kind: held for kind, held in sets.items() if len(held) > 1}

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
            **{
                name: value
                for name in ("load_in", "attn_implementation")
                # As they are unless told otherwise they leave a record what it was without them.
                if (value := getattr(model, name)) != ModelSettings.model_fields[name].default
            },
        }


def computes(loaded: LoadedModel) -> dict[str, Any]:
    """How a model computes, by what was loaded: dtype, device, attention, quantization."""
    from abliterate.inference.in_memory import engine_of
    from abliterate.models.quantized_loading import how_it_computes

    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return {"dtype": dtype, "device": engine_of(loaded).devices, **how_it_computes(loaded.model)}


def batches_of(loaded: LoadedModel) -> dict[str, Any]:
    """The largest batches that it has run, if it counts any."""
    from abliterate.inference.token_batches import batches_record

    found = batches_record(loaded.model)
    return {} if found is None else {"batches": found}


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


def token_records(tokenizer: Any, tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Token ids as records list them, each with its text (``id:1234`` if it is no whole text)."""
    return [{"id": token, "token": token_text(tokenizer, token)} for token in tokens]
