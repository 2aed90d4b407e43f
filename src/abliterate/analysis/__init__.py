"""Looking at directions: inspection, tracing, and how much of refusal hangs on one.

Uses ``inference`` and ``extraction``, ``prompts`` and ``metrics``, and the records of a run; the
command line and the library stand above.
"""
