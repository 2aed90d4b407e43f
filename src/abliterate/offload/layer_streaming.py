"""Running a model that is larger than memory: all prompts through a block, then the next block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from abliterate.console import progress_bar
from abliterate.inference.forward import block_input
from abliterate.inference.layer_directions import LayerUnits
from abliterate.models.device_placement import to_device
from abliterate.offload.activation_store import Activations
from abliterate.offload.activation_swap import Lot, Parked, parking
from abliterate.offload.non_block_modules import load_on_use, read_rows, replace_forward
from abliterate.offload.paused_forward import Pass, Request, this_pass
from abliterate.offload.weights import Slot, Weights
from abliterate.writers import decoder_blocks, find_writers, stream_width

# Embeddings and projections up to this size are simply kept in memory.
RESIDENT = 64 << 20
# Rows of the vocabulary projection that are in memory at once, in bytes.
_CHUNK = 64 << 20
# Logits that are computed in one sweep over the projection, in bytes.
_SWEEP = 128 << 20


@dataclass(eq=False)
class BatchRun:
    """A batch on its way through the model.

    Attributes:
        call: runs the model once; what it returns goes to ``use``.
        use: takes the result.
        shape: rows and tokens of the batch.
        keep: how many last tokens' logits are wanted.
        start: the first block that computes; what is before hands on what it gets.
        change: sees the stream that enters each block and returns what is to enter instead.
        see: sees each block's index, input and output.
        units: directions that hooks project out of it: ``[d_model]``, ``[batch, d_model]`` or one
            for each layer.
    """

    call: Callable[[], Any]
    use: Callable[[Any], None]
    shape: tuple[int, int]
    keep: int = 1
    start: int = 0
    change: Callable[[int, Tensor], Tensor] | None = None
    see: Callable[[int, Tensor, Any], None] | None = None
    units: Tensor | LayerUnits | None = None

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def width(self) -> int:
        return self.shape[1]


class _Running(Pass):
    """A pass, and the job that it is of."""

    def __init__(self, job: BatchRun) -> None:
        super().__init__(job.call)
        self.job = job
        self.parked: Parked | None = None


class OffloadedModel:
    """A model whose blocks come from disk one after the other.

    Attributes:
        weights: the model and its files.
        activations: where batches wait between blocks.
        passes: how often the whole model was read.
        width: d_model of the residual stream.
        current: the job whose code runs at this moment; hooks on modules ask for it.
    """

    def __init__(
        self,
        weights: Weights,
        activation_memory: int,
        folder: Path | None = None,
        resident: int = RESIDENT,
    ) -> None:
        self.weights = weights
        self.model: PreTrainedModel = weights.model
        self.device = weights.device
        self.activations = Activations(activation_memory, folder)
        self.passes = 0
        self.current: BatchRun | None = None
        self._as_tuple = False
        self._park = parking(weights.device)
        self._lot = Lot(self.activations)
        self._in_memory: list[Slot] = []
        self._blocks = {id(block): i for i, block in enumerate(decoder_blocks(self.model))}
        self.width = stream_width(self.model, find_writers(self.model))
        self._place(resident)
        # What a pass is handed of these (a view of a table, say) is not its own to move.
        self._fixed = {
            tensor.untyped_storage()._cdata
            for module in self.model.modules()
            for tensor in (*module._parameters.values(), *vars(module).values(),
                           *module._buffers.values())
            if isinstance(tensor, Tensor) and not tensor.is_meta
        }  # fmt: skip

    @property
    def n_blocks(self) -> int:
        return len(self._blocks)

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read from disk so far."""
        return self.weights.mapped.bytes_read

    def summary(self) -> dict[str, int]:
        """What artifacts record of it."""
        return {
            "passes": self.passes,
            "bytes_read": self.bytes_read,
            "activation_memory": self.activations.budget,
            "bytes_spilled": self.activations.spilled,
        }

    def close(self) -> None:
        """Give the files back."""
        self.weights.mapped.close()

    def run(self, jobs: Sequence[BatchRun], description: str = "stream") -> None:
        """Take all jobs through the model together, reading each weight once.

        Raises:
            RuntimeError: memory ran out, or whatever the model itself raises.
        """
        later: dict[int, list[BatchRun]] = {}
        running: list[_Running] = []
        threads = torch.get_num_threads()
        self.passes += 1
        with torch.inference_mode(), progress_bar(description, self.n_blocks) as bar:
            try:
                for job in jobs:
                    if job.start:
                        later.setdefault(job.start, []).append(job)
                    else:
                        self._start(job, running)
                while running:
                    module = self._next(running)
                    layer = self._blocks.get(id(module))
                    for job in later.pop(layer, ()) if layer is not None else ():
                        self._start(job, running)
                    self._step(module, running)
                    bar.update(layer is not None)
            finally:
                self.current = None
                for one in running:
                    one.cancel()
                self._lot.clear()
                self._unload()
                torch.set_num_threads(threads)

    def _next(self, running: Sequence[_Running]) -> nn.Module:
        """The module that the pass that is furthest behind waits for."""
        request = min(running, key=lambda one: one.steps).request
        assert request is not None
        return request.module

    def _start(self, job: BatchRun, running: list[_Running]) -> None:
        one = _Running(job)
        running.append(one)
        self._go_on(one, running, one.start)

    def _go_on(self, one: _Running, running: list[_Running], go: Callable[[], None]) -> None:
        """Run a pass up to its next call, or to its end."""
        self.current = one.job
        go()
        if one.request is None:
            running.remove(one)
            result, one.result = one.result, None
            one.job.use(result)
        elif self._park:
            one.parked = one.parked or Parked(self._lot, self._fixed)
            one.parked.put((one.request.args, one.request.kwargs))
        else:
            self.activations.hold((one.request.args, one.request.kwargs))

    def _step(self, module: nn.Module, running: list[_Running]) -> None:
        """Every pass that waits for ``module`` gets it."""
        waiting = [one for one in running if one.request and one.request.module is module]
        if id(module) not in self._blocks:
            return self._project(module, waiting, running)
        self._load(module)
        layer = self._blocks[id(module)]
        while waiting:
            one = waiting.pop(0)
            request, one.request = one.request, None
            assert request is not None
            self.current = one.job
            self._compute(one, request, layer, running)
        return None

    def _compute(
        self,
        one: _Running,
        request: Request,
        layer: int,
        running: list[_Running],
    ) -> None:
        if one.parked is not None:
            one.parked.bring()
        args, kwargs = request.args, request.kwargs
        request.args, request.kwargs = (), {}  # or the caller's reference would keep them
        if one.job.change is not None:
            hidden = one.job.change(layer, block_input(args, kwargs))
            args, kwargs = (
                ((hidden, *args[1:]), kwargs)
                if args
                else (args, kwargs | {"hidden_states": hidden})
            )
            del hidden
        output = self._plain[layer](*args, **kwargs)
        self._as_tuple = isinstance(output, tuple)
        if one.job.see is not None:
            one.job.see(layer, block_input(args, kwargs), output)
        del args, kwargs
        self._go_on(one, running, partial(one.answer, output))

    def _enter(self, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What a block's forward is: wait until the block is in memory."""
        one = this_pass()
        assert isinstance(one, _Running)
        if self._blocks[id(block)] < one.job.start:
            hidden = block_input(args, kwargs)
            return (hidden,) if self._as_tuple else hidden
        return one.wait_for(block, args, kwargs)

    def _load(self, module: nn.Module) -> None:
        slots = self.weights.slots_of(module)
        if slots == self._in_memory:  # the same block once more
            return
        self._unload()
        self.weights.load(slots)
        self._in_memory = slots
        following = self._following(module)
        if following:
            self.weights.mapped.ahead(self.weights.names(following))

    def _unload(self) -> None:
        self.weights.drop(self._in_memory)
        self._in_memory = []

    def _following(self, module: nn.Module) -> list[Slot]:
        """What is read ahead while ``module`` computes."""
        index = self._blocks[id(module)] + 1
        modules = self._order[index : index + 1] or self._projections[:1]
        now = set(self.weights.names(self._in_memory))
        slots = [slot for m in modules for slot in self.weights.slots_of(m)]
        return [s for s in slots if s.group is not None and not now.intersection(s.group.names)]

    # -- what is outside the blocks

    def _place(self, resident: int) -> None:
        """Decide of every module whether it is kept, streamed, or read row by row."""
        self._order = decoder_blocks(self.model)
        self._plain = [block.forward for block in self._order]
        for block in self._order:
            replace_forward(block, partial(self._enter, block))
        inside = {id(m) for block in self._order for m in block.modules()}
        outside = [module for module in self.model.modules() if id(module) not in inside]
        streamed = self._stream_large(outside, resident)
        self._projections = self._wait_at_head()
        self._keep_small(outside, streamed)
        self._keep_first_parameters(inside, streamed)

    def _stream_large(self, outside: Sequence[nn.Module], resident: int) -> set[Slot]:
        """Read embeddings row by row and the head in parts, if they are larger than ``resident``.

        Returns:
            What is not kept in memory of them.
        """
        model, weights = self.model, self.weights
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        streamed: set[Slot] = set()
        for module in outside:
            slots = weights.direct_slots(module)
            if not slots:
                continue
            # A head of its own is needed at the end alone: where memory is short it is read then.
            late = module is head and weights.mapped.transient and len(slots[0].owners) == 1
            if not late and weights.size(slots) <= resident:
                continue
            if type(module) is type(embedding) and weights.source(slots[0]) and len(slots) == 1:
                read_rows(module, weights, slots[0])
                streamed.update(slots)
            elif module is head and type(module) is nn.Linear and weights.source(slots[0]):
                streamed.add(slots[0])
                weights.load([slot for slot in slots if slot not in streamed], keep=True)
        return streamed

    def _wait_at_head(self) -> list[nn.Module]:
        """Let passes wait for the vocabulary projection; those that they wait for.

        Also for one that stays in memory: one product of all batches beats one for each.
        """
        head = self.model.get_output_embeddings()
        if type(head) is not nn.Linear or not self.weights.direct_slots(head):
            return []
        replace_forward(head, partial(self._wait_for_projection, head))
        return [head]

    def _keep_small(self, outside: Sequence[nn.Module], streamed: Collection[Slot]) -> None:
        """Load what is left outside the blocks, for good."""
        model, weights = self.model, self.weights
        decoder = model.get_decoder()
        core = {id(m) for m in decoder.modules()} | {id(m) for m in model.children()} | {id(model)}
        for module in outside:
            slots = [slot for slot in weights.direct_slots(module) if slot not in streamed]
            if slots and id(module) in core:
                weights.load(slots, keep=True)
            elif slots:  # a tower beside the text decoder, which text prompts do not reach
                load_on_use(module, weights, slots)

    def _keep_first_parameters(self, inside: Collection[int], streamed: Collection[Slot]) -> None:
        """Code that asks a model for its device gets that of its first parameter."""
        for module in self.model.modules():
            first = next(iter(self.weights.slots_of(module)), None)
            if first is None or first in streamed or id(first.owner) in inside:
                continue
            if isinstance(module, PreTrainedModel):
                self.weights.load([first], keep=True)

    def _wait_for_projection(self, module: nn.Module, hidden: Tensor) -> Any:
        one = this_pass()
        assert isinstance(one, _Running)
        keep = one.job.keep
        if hidden.ndim == 3 and hidden.shape[1] > keep:
            hidden = hidden[:, -keep:].clone()  # the rest of its logits would be thrown away
        return one.wait_for(module, (hidden,), {})

    def _project(self, module: nn.Module, waiting: list[_Running], running: list[_Running]) -> None:
        """The vocabulary projection, as one product of as many batches as memory allows.

        One that is not kept in memory comes some rows at a time.
        """
        self._unload()
        weight = self.weights.direct_slots(module)[0]
        name = None if weight.kept else self.weights.source(weight)
        if name is None:
            rows: Tensor = module.weight  # type: ignore[assignment]
            step = len(rows)
        else:
            self.weights.mapped.fetch([name])
            rows = self.weights.mapped.tensor(name)
            step = max(1, _CHUNK // max(1, rows.shape[1] * weight.empty.dtype.itemsize))
        bias = getattr(module, "bias", None)
        while waiting:
            some: list[tuple[_Running, torch.Size]] = []
            given: list[Tensor] = []
            size = 0
            while waiting and (not some or size < _SWEEP):
                one = waiting.pop(0)
                request, one.request = one.request, None
                assert request is not None
                hidden: Tensor = request.args[0]
                if one.parked is not None:
                    one.parked.bring(hidden)
                some.append((one, hidden.shape[:-1]))
                given.append(hidden.reshape(-1, hidden.shape[-1]))
                size += len(given[-1]) * len(rows) * weight.empty.element_size()
            together, lengths = torch.cat(given), list(map(len, given))
            del hidden, given
            out = together.new_empty(len(together), len(rows))
            for first in range(0, len(rows), step):
                part = slice(first, first + step)
                chunk = to_device(rows[part], self.device).to(weight.empty.dtype)
                out[:, part] = nn.functional.linear(
                    together, chunk, None if bias is None else bias[part]
                )
            parts = list(torch.split(out, lengths))
            del out, together
            while some:
                one, shape = some.pop(0)
                if one.parked is not None:
                    one.parked.bring()
                logits = parts.pop(0).view(*shape, len(rows))
                self._go_on(one, running, partial(one.answer, logits))
                del logits
        if name is not None:
            self.weights.mapped.forget([name])
