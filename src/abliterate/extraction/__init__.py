"""Difference of means: candidate directions from the residual stream, one a (position, layer).

Uses ``inference`` and ``offload`` for the passes.
"""
