"""Ranks that ``torchrun`` or ``accelerate launch`` started: sharing work, failing together.

Uses ``console`` and ``errors``.
"""
