"""Summaries and tables of the CUDA kernels, run on the CPU from their own source (tests/cuda_host)."""

from __future__ import annotations

import math
import random
import re

import cuda_host
import pytest
import torch
from cuda_host import build
from cuda_host.problems import Group, problem

from bsgap_kernels.triton.table import COLUMNS

pytestmark = [pytest.mark.torch_free, pytest.mark.skipif(cuda_host.COMPILER is None, reason="needs g++")]


def test_summaries_follow_the_cpu_op() -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = ((2, 7, 3), (1, 40, 40), (3, 20, 130), (2, 300, 120), (1, 5, 1))
    matrices = [
        torch.randn(*s, generator=generator, dtype=torch.float64)
        * torch.logspace(0, -4, s[-1], dtype=torch.float64)
        for s in shapes
    ]
    matrices[0][1] = 0
    matrices[3][0, 0, 0] = math.nan
    groups = []
    for A in matrices:
        m, n = A.shape[-2:]
        groups.append(Group(A.mT @ A if n <= m else A @ A.mT, m=m, roundings=m + n))
    p = problem(groups)
    for row, index in zip(p.table, p.order, strict=True):
        row[17], row[18] = matrices[index].shape[-2:]
    _, _, _, eigenvalues, _ = cuda_host.count_grams(
        p.grams, p.table, p.sides, p.batches, None, 0.0, 1e-2, None, None, False, True
    )
    cuda_host.clear_launches()
    summary = cuda_host.summaries(eigenvalues, p.table, p.sides, p.batches, None)
    assert cuda_host.launches() == [cuda_host.Launch("summary_kernel", (3, 1, 1), 128, 0)]
    for A, start in zip(matrices, p.starts, strict=True):
        expected = torch.ops.bsgap.spectral_summary(A)
        # Effective ranks and the decay's slope take logarithms of eigenvalues near their rounding.
        torch.testing.assert_close(
            summary[start : start + A.shape[0]], expected, rtol=1e-6, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("k", [1, 31, 32, 33, 64, 150, 300])
def test_summary_of_given_eigenvalues(k: int) -> None:
    # All columns but the ranks are sums in another order; thresholds of ranks lie between eigenvalues.
    values = torch.stack([0.9 ** torch.arange(k - 1, -1, -1, dtype=torch.float64), torch.ones(k)]).to(
        torch.float64
    )
    p = problem([Group(torch.zeros(2, k, k), m=k + 7)])
    exponent = torch.tensor([3, -3], dtype=torch.int32)
    summary = cuda_host.summaries(values.flatten(), p.table, p.sides, p.batches, exponent)
    top = torch.tensor([2.0**-3, 2.0**3], dtype=torch.float64)
    sigma = values.flip(-1).sqrt()
    q = sigma / sigma.sum(-1, keepdim=True)
    expected = torch.stack(
        [
            top,
            top * values.sum(-1).sqrt(),
            values.sum(-1),
            values.sum(-1) ** 2 / (values**2).sum(-1),
            torch.special.entr(q).sum(-1).exp(),
            torch.special.entr(q + 1e-7).sum(-1).exp(),
            1.0 + (sigma.cumsum(-1) < 0.99 * sigma.sum(-1, keepdim=True) * (1 - 1e-13)).sum(-1),
            1.0 + (values.flip(-1).cumsum(-1) < 0.99 * values.sum(-1, keepdim=True) * (1 - 1e-13)).sum(-1),
            ((top / math.sqrt(k + 7))[:, None] * sigma > 0.01).sum(-1).to(torch.float64),
        ],
        -1,
    )
    torch.testing.assert_close(summary[:, :9], expected, rtol=1e-12, atol=0)
    index = torch.arange(10, max(10, min(k, 99) + 1), dtype=torch.float64).log()
    if index.numel() < 3:
        assert bool(summary[:, 9].isnan().all())
    else:
        x, y = index - index.mean(), values.flip(-1)[0, 9 : min(k, 99)].log()
        slope = -float((x * (y - y.mean())).sum() / (x * x).sum())
        torch.testing.assert_close(float(summary[0, 9]), slope, rtol=1e-10, atol=0)


def test_columns_are_those_of_python() -> None:
    text = (build.CSRC / "cuda" / "table.cuh").read_text()
    names = re.findall(r"^  k(\w+),?$", text, re.MULTILINE)
    assert names.pop() == "TableColumns"
    snake = [re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower() for name in names]
    assert tuple({"observations": "m", "features": "n"}.get(name, name) for name in snake) == COLUMNS


@pytest.mark.parametrize("n", [0, 1, 499, 500, 501, 1203])
def test_fill_table(n: int) -> None:
    rng = random.Random(n)
    values = [rng.randint(-(2**63), 2**63 - 1) for _ in range(n)]
    cuda_host.clear_launches()
    assert cuda_host.fill_table(values).tolist() == values
    expected = cuda_host.Launch("fill_table_kernel", (1, 1, 1), 128, 0)
    assert cuda_host.launches() == [expected] * math.ceil(n / 500)
