"""report.html of a sweep or a run: one file that opens offline.

Read upward from the files: `rows.py` (metrics.jsonl), `data.py` (runs, and what is missing), `figures*.py`,
`text.py` (table and findings), `page.py` (the HTML).
"""

from bsgap_kernels.lab.report.data import ReportError
from bsgap_kernels.lab.report.page import write_report

__all__ = ["ReportError", "write_report"]
