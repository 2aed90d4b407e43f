"""What each stage takes on a machine: sizes from the configuration, speeds measured here.

Uses ``models`` and ``writers``; ``plan`` shows what it says.
"""
