"""Was a checkpoint abliterated, and along what: told from its files, with or without a base.

Uses ``writers`` and ``editing`` for where an edit shows, and ``checkpoints`` for the files; runs no
model, but for ``activation_evidence``, on which no verdict rests.
"""
