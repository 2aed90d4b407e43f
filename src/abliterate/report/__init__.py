"""A run folder as one page that people can look at, and its figures as pictures.

Uses the records of all stages, from ``selection``, ``evaluation`` and ``auditing`` down; runs none.
"""

from __future__ import annotations

from abliterate.report.collect import Run, read_run
from abliterate.report.page import Report, build_report
from abliterate.report.png import write_pngs

__all__ = ["Report", "Run", "build_report", "read_run", "write_pngs"]
