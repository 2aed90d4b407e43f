"""Baking the ablation into a checkpoint's files: plan, kernel, shards, journal, model card.

Uses ``writers`` for what to edit and ``checkpoints`` for where it lies.
"""
