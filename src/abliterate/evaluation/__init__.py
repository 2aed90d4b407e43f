"""What a model answers under interventions, and what the answers are worth.

Uses ``inference`` and ``offload`` for the passes, ``prompts`` and ``metrics`` for the rest.
"""
