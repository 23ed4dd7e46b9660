"""report.html of a sweep or a run: one file that opens offline.

Read upward from the files: `rows.py` (metrics.jsonl), `data.py` (runs, and what is missing), `figures*.py`,
`text.py` (table and findings), `page.py` (the HTML). `tracked.py` is the report of files that `RankTracker`
wrote in any other loop.
"""

from bsgap_kernels.lab.report.data import ReportError
from bsgap_kernels.lab.report.page import write_report
from bsgap_kernels.lab.report.tracked import is_tracked, write_tracked_report

__all__ = ["ReportError", "is_tracked", "write_report", "write_tracked_report"]
