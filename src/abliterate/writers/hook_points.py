"""Where ``ablate`` can act: the modules whose outputs are the terms that the stream is a sum of."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from abliterate.writers.backtrace import Node, Query, Walk, node_of
from abliterate.writers.op_trace import Call, Trace
from abliterate.writers.plan import HookPoint
from abliterate.writers.residual_stream import BlockCall


def _plain_parents(walk: Walk) -> dict[Node, list[Node]]:
    """For each node, those that it is a term of; edges through gains are left out."""
    parents: dict[Node, list[Node]] = {}
    for node, children in walk.children.items():
        for child in children:
            if not node.gains and not child.gains:
                parents.setdefault(child, []).append(node)
    return parents


def _reaching(parents: dict[Node, list[Node]], targets: set[Node]) -> set[Node]:
    """Nodes with a path to a target: the stream, if the targets are the block boundaries."""
    reached: set[Node] = set()
    pending = [p for t in targets for p in parents.get(t, [])]
    while pending:
        node = pending.pop()
        if node not in reached:
            reached.add(node)
            pending += parents.get(node, [])
    return reached


class SiteFinder:
    """Chooses sites so that every path from a writer to the stream passes one."""

    def __init__(self, trace: Trace, walk: Walk, blocks: Sequence[BlockCall], size: int) -> None:
        self.trace, self.walk, self.blocks, self.size = trace, walk, blocks, size
        self.inputs = {self._last(b.stream_in, b.begin) for b in blocks}
        self.outputs = {self._last(b.stream_out, b.end) for b in blocks}
        self.boundaries = self.inputs | self.outputs
        self.parents = _plain_parents(walk)
        self.stream = _reaching(self.parents, self.boundaries)
        self.makers = self._makers()
        self.sites: dict[HookPoint, None] = {}

    def _last(self, tensor: Tensor, seq: int) -> Node:
        return node_of(self.trace, Query(tensor, tensor.ndim - 1, seq))

    def _is_channels(self, tensor: Tensor) -> bool:
        return tensor.ndim > 1 and tensor.shape[-1] % self.size == 0 and tensor.is_floating_point()

    def _makers(self) -> dict[Node, list[HookPoint]]:
        """For each node, modules that output it and never anything that is not such a term."""
        makers: dict[Node, list[HookPoint]] = {}
        bad: set[tuple[str, int]] = set()
        for call in self.trace.calls:
            for index, tensor in enumerate(call.outputs):
                if tensor is None or not call.module:
                    continue
                node = self._last(tensor, call.end) if self._is_channels(tensor) else None
                if node is None or node not in self.walk.children or node in self.stream:
                    bad.add((call.module, index))
                else:
                    site = HookPoint(call.module, self._layer(call), "output", index)
                    makers.setdefault(node, []).append(site)
        return {n: [s for s in sites if (s.module, s.index) not in bad]
                for n, sites in makers.items()}  # fmt: skip

    def _layer(self, call: Call) -> int | None:
        for block in self.blocks:
            if call.module == block.module or call.module.startswith(block.module + "."):
                return block.layer
        return None

    def find(self) -> tuple[HookPoint, ...]:
        """Sites in the order of the model's blocks, those before the first block first."""
        terms = self.boundaries - self.stream
        for node in self.stream:
            terms |= {c for c in self.walk.children[node] if not c.gains and c not in self.stream}
        for node in terms:
            if node in self.outputs:  # all of it is written anew, so that is where to act
                self._cover_boundary(node)
            elif not self._cover(node, set()):
                self._cover_readers(node)
        for node in self.stream:
            if any(c.gains for c in self.walk.children[node]) or self.walk.ends[node]:
                self._cover_sum(node)
        return tuple(sorted(self.sites, key=self._order))

    def _order(self, site: HookPoint) -> tuple[int, str, int]:
        return (-1 if site.layer is None else site.layer, site.module, site.index)

    def _cover(self, node: Node, seen: set[Node]) -> bool:
        """Cover a term by module outputs, the outermost first; False if some of it is no output."""
        if node in seen:
            return True
        seen.add(node)
        makers = self.makers.get(node)
        if makers:
            self.sites[min(makers, key=lambda s: (s.module.count("."), s.module))] = None
            return True
        children = self.walk.children[node]
        if self.walk.ends[node] or any(c.gains for c in children) or not children:
            return self._harmless(node)
        covered = [self._cover(child, seen) for child in children]  # each of them, whatever fails
        return all(covered)

    def _harmless(self, node: Node) -> bool:
        """A node that nothing writes to: zeros."""
        return not self.walk.ends[node] and not self.walk.children[node]

    def _cover_readers(self, term: Node) -> None:
        """A term that is no module's output: act on the sums that it goes into."""
        if term in self.inputs:
            self._cover_sum(term)
        for node in self.parents.get(term, []):
            if node in self.stream:
                self._cover_sum(node)

    def _cover_sum(self, node: Node) -> None:
        """Act where the stream is read next: as a module's input, and where a block hands it on."""
        if node in self.boundaries:
            self._cover_boundary(node)
            return
        for call in self.trace.calls:
            first = next(iter(call.inputs), None)
            if first is None or not self._is_channels(first) or not call.module:
                continue
            if self._last(first, call.begin) == node:
                self.sites[HookPoint(call.module, self._layer(call), "input")] = None
        for parent in self.parents.get(node, []):
            self._cover_sum(parent)

    def _cover_boundary(self, node: Node) -> None:
        for block in self.blocks:
            if self._last(block.stream_out, block.end) == node:
                self.sites[HookPoint(block.module, block.layer, "output", block.index)] = None
                return
        for block in self.blocks:
            if self._last(block.stream_in, block.begin) == node:
                self.sites[HookPoint(block.module, block.layer, "input")] = None
