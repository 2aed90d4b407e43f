"""Files of weights: safetensors shards, matrices in them, quantised formats, the hub.

Uses ``storage`` and ``hub`` and what lies below: nothing here knows what a model computes.
"""
