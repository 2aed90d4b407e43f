"""Was a checkpoint abliterated, and along what: told from its files, with or without a base.

Uses ``writers``, ``checkpoints`` and what lies below; runs no model, but for
``activation_evidence``, on which no verdict rests.
"""
