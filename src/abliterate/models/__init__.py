"""Getting at a model: checkpoints and hub ids, loading, and on which device it lies.

Uses ``checkpoints``, ``prompts`` and ``distributed``.
"""
