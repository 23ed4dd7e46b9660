"""A site's sums on a GPU: how many launches they take, and whose memory is kept."""

from __future__ import annotations

import pytest
import torch
from gpu_support import DEVICE, cuda_only, launched, random
from torch import Tensor

import bsgap_kernels as bsgap
from bsgap_kernels.tracking.sums import Sums

pytestmark = pytest.mark.gpu


@cuda_only
@pytest.mark.parametrize(("n", "dtype"), [(24, torch.float32), (64, torch.bfloat16), (200, torch.float16)])
def test_a_site_takes_one_launch(n: int, dtype: torch.dtype) -> None:
    A = random(3000, n, dtype=dtype)
    sums = Sums.zeros(n, DEVICE, sums=True)
    assert launched(lambda: sums.add(A)) == ["gram_kernel"]
    X = A.double().cpu()
    assert torch.allclose(sums.gram.cpu(), sums.totals.cpu()[2] * (X.mT @ X), rtol=1e-12)


@cuda_only
def test_what_is_kept_comes_from_no_pool_that_allocations_are_redirected_to() -> None:
    from bsgap_kernels.triton import gram, site

    before = set(gram._COUNTERS)
    pool, stream = torch.cuda.MemPool(), torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.cuda.use_mem_pool(pool):  # as a warm-up of torch.compile does
        control = torch.zeros(5, device=DEVICE)
        sums = Sums.zeros(23, DEVICE, sums=True)
        sums.add(random(211, 23))
        assert int(bsgap.near_rank(random(211, 23), rtol=1e-3)) == 23
    torch.cuda.synchronize()
    segments = [range(s["address"], s["address"] + s["total_size"]) for s in pool.snapshot()]

    def inside(tensor: Tensor) -> bool:
        return any(tensor.data_ptr() in segment for segment in segments)

    assert inside(control)
    (bound,) = site._SITES[id(sums.gram)].bound.values()
    kept = [*sums.tensors(), bound.table, bound.counters]
    kept += [counters for place, counters in gram._COUNTERS.items() if place not in before]
    kept += list(list(gram._PREPARED.values())[-1].tables.values())
    assert len(kept) >= 6
    assert not any(inside(tensor) for tensor in kept)
