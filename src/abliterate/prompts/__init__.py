"""From prompt sources to token ids: files, bundled sets and hub datasets, sampling, templates.

Uses ``hub`` for data sets, ``storage``, ``settings`` and ``metrics``, and what lies below.
"""
