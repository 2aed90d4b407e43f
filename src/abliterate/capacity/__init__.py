"""What each stage takes on a machine: sizes from the configuration, speeds measured here.

Uses ``models`` and ``writers``, and of ``inference``, ``offload`` and ``editing`` what they allow
themselves; ``plan`` shows what it says.
"""
