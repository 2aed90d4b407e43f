"""The command fragility."""

from __future__ import annotations


def fragility() -> None:
    """x"""
