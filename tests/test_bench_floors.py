"""Ceilings of the processor and the floors made from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bsgap_kernels import _core
from bsgap_kernels.bench import CASES
from bsgap_kernels.bench.ceilings import measure_ceilings
from bsgap_kernels.bench.contenders import CONTENDERS, INTERVAL, NEAR_RANK, PROBED, TRACKER
from bsgap_kernels.bench.floors import Floor, Rates, floor

RATES = Rates(read=1e9, float32=4e9, float64=2e9)
FLOAT32 = torch.float32


def shortest(
    contender: str, *shapes: tuple[int, ...], rtol: float = 1e-2, dtype: torch.dtype = FLOAT32
) -> Floor:
    found = floor(contender, shapes, dtype, rtol, RATES)
    assert found is not None
    return found


def test_a_tall_matrix_by_hand() -> None:
    # 1000 x 20: 80 kB; triangle 1000 * 20 * 21 flops; tridiagonal form 4/3 * 8000.
    own = shortest(NEAR_RANK, (1000, 20))
    assert own.read == pytest.approx(80e-6)
    assert own.gram_math == pytest.approx(420e3 / 4e9)
    assert own.count == pytest.approx(32e3 / 3 / 2e9)
    assert own.total == pytest.approx(105e-6 + 32e3 / 3 / 2e9)
    assert own.milliseconds()["total"] == pytest.approx(own.total * 1e3, rel=1e-3)
    assert shortest(NEAR_RANK, (20, 1000)) == own
    assert Floor(read=3.0, gram_math=2.0, count=1.0).total == 4


def test_the_accumulation_of_the_plan_sets_the_rate() -> None:
    coarse, fine = (shortest(NEAR_RANK, (1000, 20), rtol=rtol) for rtol in (1e-2, 1e-3))
    assert fine.gram_math == pytest.approx(2 * coarse.gram_math)
    assert floor(NEAR_RANK, [(1000, 20)], FLOAT32, 1e-8, RATES) is None
    assert floor("torch.linalg.svdvals", [(1000, 20)], FLOAT32, 1e-2, RATES) is None
    assert shortest(NEAR_RANK, (1000, 20), dtype=torch.bfloat16).read == pytest.approx(40e-6)


def test_counts_of_large_sides_are_factorisations() -> None:
    k = 500
    once = k**3 / 3 / 2e9
    assert shortest(NEAR_RANK, (k, k)).count == pytest.approx(2 * once)
    assert shortest(INTERVAL, (k, k)).count == pytest.approx(3 * once)
    assert shortest(TRACKER, (k, k)) == shortest(NEAR_RANK, (k, k))
    probed, rigorous = shortest(PROBED, (k, k)), shortest(INTERVAL, (k, k))
    assert probed.count == rigorous.count
    # A triangle in float32 and nine vectors through A and back, against a triangle in float64.
    assert probed.gram_math == pytest.approx(rigorous.gram_math / 2 + 36 * k * k / 2e9)
    assert shortest(PROBED, (k, 20)) == shortest(INTERVAL, (k, 20))


def test_batches_and_groups_add_up() -> None:
    one, other = shortest(NEAR_RANK, (100, 10)), shortest(NEAR_RANK, (30, 300))
    batch = shortest(NEAR_RANK, (5, 100, 10))
    group = shortest(NEAR_RANK, (100, 10), (30, 300))
    for part in ("read", "gram_math", "count"):
        assert getattr(batch, part) == pytest.approx(5 * getattr(one, part))
        assert getattr(group, part) == pytest.approx(getattr(one, part) + getattr(other, part))


def test_every_op_of_ours_has_a_floor_on_every_case() -> None:
    for case in CASES:
        for c in CONTENDERS:
            found = floor(c.name, case.shapes, case.dtype, 1e-2, RATES)
            assert (found is not None) == c.ours, (case.name, c.name)


def test_ceilings_of_this_processor() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = measure_ceilings(seconds=0.01, size=1 << 22)
    finally:
        torch.set_num_threads(threads)
    assert (found["threads"], found["bytes"]) == (2, 1 << 22)
    for name in ("fp32_flops", "fp64_flops", "read_bytes_per_s"):
        # Between a slow and an impossible core: a chain that the compiler left out shows as 1e15.
        assert 1e8 < found[f"{name}_per_core"] < 1e12
        assert 1e8 < found[name] < 2e12
    rates = Rates.of_ceilings(found)
    assert (rates.read, rates.float32, rates.float64) == (
        found["read_bytes_per_s"],
        found["fp32_flops"],
        found["fp64_flops"],
    )


def test_rates_name_what_they_cannot_take() -> None:
    with pytest.raises(ValueError, match="dtype must be 'float32' or 'float64', got 'float16'"):
        _core.fma_rate("float16", 0.0)
    for wrong in (np.ones(0), np.ones((4, 4))[:, ::2]):
        with pytest.raises(ValueError, match="buffer must be contiguous and not empty"):
            _core.read_rate(wrong, 0.0)
    assert _core.read_rate(np.ones(3, np.float16), 0.0) > 0
