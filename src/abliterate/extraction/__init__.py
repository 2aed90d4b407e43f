"""Difference of means: candidate directions from the residual stream, one a (position, layer).

Uses ``inference`` for the passes.
"""
