"""What a model answers under interventions, and what the answers are worth.

Uses ``inference`` for the passes, ``prompts`` and ``metrics`` for the rest.
"""
