"""Forward passes with and without interventions, and answers, of a model in memory.

Uses ``writers`` for the hook points and ``models`` for the model.
"""
