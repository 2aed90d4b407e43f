"""From prompt sources to token ids: files, bundled sets and hub datasets, sampling, templates.

Uses ``storage``, ``metrics``, ``console`` and ``errors``.
"""
