"""The study of large batches: its plan (plan.yaml), its runs, and what they show.

Read upward: `plan.py` (what was declared), `run.py` (sweeps and sharpness), `analysis.py` (effects and
verdicts), `page.py` (the tables of docs/study.md), `command.py` (`bsgap study`).
"""
