"""Files of weights: safetensors shards, matrices in them, quantised formats, the hub.

Uses ``storage``, ``metrics`` and ``errors`` only: nothing here knows what a model computes.
"""
