"""Ranks with different numbers of batches, and models that move, over several ranks (gloo).

The scenarios are in uneven_worker.py and run in processes of their own; a test here reads what came out.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import uneven_worker
from ranks import cases, check, needs_ranks, outcomes_of

pytestmark = needs_ranks
WORKER = uneven_worker.__name__


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return outcomes_of(WORKER, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("name", "world"), cases(WORKER))
def test_ranks(name: str, world: int, outcomes: Path) -> None:
    check(outcomes, name, world)
