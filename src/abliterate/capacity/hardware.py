"""Machines that are not at hand, by their makers' figures, and how a model is spread over one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from abliterate.errors import UsageError


@dataclass(frozen=True)
class Card:
    """An accelerator, by its maker's data sheet.

    Attributes:
        name: what is assumed of it.
        memory: bytes.
        flops: bfloat16 operations per second, dense.
        bandwidth: bytes per second from its memory.
        link: bytes per second between two of a machine.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float


CARDS = {
    "24GB": Card("24 GB, as an RTX 4090", 24 * 10**9, 165e12, 1.008e12, 25e9),
    "48GB": Card("48 GB, as an L40S", 48 * 10**9, 362e12, 0.864e12, 25e9),
    "80GB": Card("80 GB, as an A100", 80 * 10**9, 312e12, 2.039e12, 300e9),
    "H100": Card("80 GB, as an H100", 80 * 10**9, 989e12, 3.35e12, 450e9),
    "H200": Card("141 GB, as an H200", 141 * 10**9, 989e12, 4.8e12, 450e9),
}
# What models get of a maker's figures, and what stands around the cards.
COMPUTES, READS = 0.4, 0.6
DISK, COPY, NETWORK = 2e9, 8e9, 25e9
MAIN_MEMORY = 64 * 10**9  # beside each card
_FORM = re.compile(r"(?:(?:(\d{1,4})\s*x\s*)?(\d{1,3})\s*x\s*)?(\w+)", re.ASCII)


@dataclass(frozen=True)
class Hardware:
    """Machines of one kind: ``nodes`` with ``cards`` each."""

    nodes: int
    cards: int
    card: Card


@dataclass(frozen=True)
class Spread:
    """How a model and its prompts lie on a machine.

    Attributes:
        way: ``one device``, ``data parallel``, ``tensor parallel``, ``device map`` or ``offload``.
        parts: devices that hold one copy of the weights.
        copies: how many copies work at once.
        nodes: machines that one copy lies on.
        why: what stands against a faster way, empty if nothing does.
    """

    way: str
    parts: int = 1
    copies: int = 1
    nodes: int = 1
    why: str = ""

    @property
    def speed(self) -> int:
        """How many devices compute at once; those of a device map take turns."""
        return self.copies * (self.parts if self.way == "tensor parallel" else 1)


def parse_hardware(text: str) -> Hardware:
    """Read ``24GB``, ``8x80GB``, ``2x8xH100``: machines, cards in each, the card.

    Raises:
        UsageError: it is none of these.
    """
    found = _FORM.fullmatch(text.strip().lower())
    card = CARDS.get(found[3].upper()) if found else None
    counts = [int(n or 1) for n in (found[1], found[2])] if found else []
    if card is None or 0 in counts:
        raise UsageError(
            f"--machine is [MACHINES x] [CARDS x] CARD, such as 8x80GB or 2x8xH100, with a card of "
            f"{', '.join(CARDS)}, not '{text}'"
        )
    return Hardware(counts[0], counts[1], card)


def spread(weights: int, room: int, cards: int, nodes: int, heads: tuple[int, ...]) -> Spread:
    """Which way of running a model is taken on accelerators.

    Args:
        weights: bytes of the weights as they compute.
        room: bytes for weights on one card.
        cards: of one machine.
        nodes: machines.
        heads: numbers that tensor parallelism must divide: attention and key/value heads.
    """

    def refused(ranks: int) -> str:
        """Why so many ranks cannot divide the model; empty if they can."""
        if not heads:
            return "the configuration names no attention heads to divide"
        odd = [count for count in heads if count % ranks]
        counts = " and ".join(map(str, heads))
        return f"{ranks} ranks do not divide {counts} attention and key/value heads" if odd else ""

    if weights <= room:
        all_cards = cards * nodes
        return Spread("data parallel" if all_cards > 1 else "one device", copies=all_cards)
    # Ranks are one group: a model that takes several cards is held once, and other machines idle.
    if weights <= room * cards:
        why = refused(cards)
        return Spread("device map" if why else "tensor parallel", parts=cards, why=why)
    why = "the weights do not fit on all cards together"
    if weights <= room * cards * nodes:
        why = refused(cards * nodes)
        if not why:
            return Spread("tensor parallel", parts=cards * nodes, nodes=nodes)
    return Spread("offload", why=why)


def start_line(found: Spread, model: str, cards: int, nodes: int) -> str:
    """The command that runs it so (docs/ranks.md)."""
    run = f"-m abliterate run {model} -o RUN"
    if found.way == "one device":
        return f"abliterate run {model} -o RUN"
    if found.way == "device map":
        return f"abliterate run {model} -o RUN --device-map auto"
    if found.way == "offload":
        return f"abliterate extract {model} -o RUN --offload"
    over = nodes if found.way == "data parallel" else found.nodes
    launch = "--standalone" if over == 1 else f"--nnodes {over} --rdzv-endpoint HOST:29500"
    split = " --tensor-parallel" if found.way == "tensor parallel" else ""
    return f"torchrun {launch} --nproc-per-node {cards} {run}{split}"
