"""near_rank, its intervals and a step of the tracker beside their peers, under pytest-benchmark.

    python -m pytest benchmarks/bench_near_rank.py                       # the small cases
    python -m pytest benchmarks/bench_near_rank.py -m slow               # the others
    python -m pytest benchmarks/bench_near_rank.py --benchmark-compare   # against a run saved before

For comparing one op before and after a change. The figures in the README come from `make bench`, which
interleaves the contenders and empties the cache: pytest-benchmark times one after the other, cache-warm.
"""

from __future__ import annotations

import pytest
from common import RTOL, check, inputs_of, parameters
from pytest_benchmark.fixture import BenchmarkFixture

from bsgap_kernels.bench.cases import Case
from bsgap_kernels.bench.contenders import CONTENDERS, Contender


@pytest.mark.parametrize(("case", "contender"), parameters(CONTENDERS))
def test_near_rank(benchmark: BenchmarkFixture, case: Case, contender: Contender) -> None:
    """One contender on one case."""
    benchmark.group = case.name
    result = benchmark(contender, inputs_of(case), RTOL)
    check(case, contender, result)
