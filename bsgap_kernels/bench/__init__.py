"""`bsgap bench`: our ops beside what a user could write with torch or NumPy, counts checked in the same run.

>>> from bsgap_kernels.bench import BenchConfig, run
>>> run(BenchConfig(cases=["32x32"], rounds=5))  # doctest: +SKIP
"""

from .cases import CASES, Case, select_cases
from .command import main
from .config import BenchConfig
from .run import SCHEMA, run

__all__ = ["CASES", "SCHEMA", "BenchConfig", "Case", "main", "run", "select_cases"]
