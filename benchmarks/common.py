"""What the pytest-benchmark suites share: the package's cases and contenders as parameters, and the check."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import pytest
import torch

from bsgap_kernels.bench.cases import CASES, Case
from bsgap_kernels.bench.contenders import Contender, Result
from bsgap_kernels.bench.truth import Truth, judge, truth

RTOL = 1e-2
SMALL = ("32x32", "65536x64", "resnet56-channel")
"""Cases that run without `-m slow`: seconds each, so that the suite takes minutes."""


def parameters(contenders: Iterable[Contender]) -> list[object]:
    """Every contender on every case that suits it; what is not small is marked slow."""
    return [
        pytest.param(
            case, c, id=f"{case.name}-{c.name}", marks=[] if case.name in SMALL else pytest.mark.slow
        )
        for case in CASES
        for c in contenders
        if c.suits(case, RTOL)
    ]


@functools.lru_cache(maxsize=1)
def inputs_of(case: Case) -> list[torch.Tensor]:
    """The input of a case; one is kept, since the parameters go case by case."""
    return case.make()


@functools.lru_cache(maxsize=2)
def truth_of(case: Case, centred: bool) -> Truth:
    """The counts that are right."""
    return truth(inputs_of(case), RTOL, centred=centred)


def check(case: Case, contender: Contender, result: Result) -> None:
    """Fails where a count is wrong: a wrong count has no time."""
    verdict = judge(result, truth_of(case, contender.centred))
    assert not verdict.wrong, f"{contender.name}: {verdict.wrong} of {case.matrices} counts are wrong"
