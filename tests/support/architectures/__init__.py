"""Tiny models of every architecture, and what becomes of them."""
