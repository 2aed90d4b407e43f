"""The command line: a file per group of commands, options, tables.

The top floor: it may use everything, and nothing uses it.
"""

from abliterate.cli.app import main

__all__ = ["main"]
