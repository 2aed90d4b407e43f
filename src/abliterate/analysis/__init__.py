"""Looking at directions: inspection, tracing, and how much of refusal hangs on one.

Uses everything up to ``capacity`` and ``verification``; the command line and the report use it.
"""
