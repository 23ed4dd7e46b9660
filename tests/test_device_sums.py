"""The limit of float32 sums on CUDA: its formula, a model of the tensor cores, and how it is measured."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import tensor_cores as cores
import torch
from gpu_support import DEVICE, ON_GPU, random
from torch import nn

from bsgap_kernels import dispatch
from bsgap_kernels.dispatch import (
    CUDA_FLOAT32_GRAM_MIN_RTOL,
    FLOAT32_GRAM_MIN_RTOL,
    float32_sums_serve,
    select_backend,
)
from bsgap_kernels.tracking import RankTracker
from bsgap_kernels.tracking.sums import Sums
from bsgap_kernels.triton import config

UNIT = Fraction(1, 2**23)
LIMIT = Fraction(CUDA_FLOAT32_GRAM_MIN_RTOL)
# Of a step of k products: each loses a quarter of the sum's last place, the sum itself up to one.
LOST = {k: Fraction(k, 4) + 1 for k in (8, 16)}


def units_of_float32(block: int, chunk: int) -> Fraction:
    """Units that a chunk of float32 products can lose, to first order."""
    steps = Fraction(block, 8)
    tf32 = 4  # the low parts' own rounding, once each, and their product
    corrections = 2 * steps * LOST[8] / 2**10  # 2⁻¹¹ of the products, in both orders
    added = Fraction(chunk // block - 1, 2)
    return steps * LOST[8] + corrections + added + tf32


@pytest.mark.parametrize("architecture", [9, 10])
@pytest.mark.parametrize("tile", config.TILES[:3])
def test_the_limit_leaves_float32_input_one_percent(tile: int, architecture: int) -> None:
    for layout in (config.SIDE_ALIGNED, config.ANY):
        own = config.gram_config("float32", 4, tile, False, architecture)
        assert own.dot == "tf32x3"
        lost = units_of_float32(own.block_depth(tile, layout), own.chunk)
        assert Fraction(99, 10000) < lost * UNIT / (2 * LIMIT**2) < Fraction(1, 100)


@pytest.mark.parametrize(("tile", "big"), [(16, False), (32, False), (64, False), (64, True), (128, True)])
def test_the_limit_leaves_16_bit_input_one_percent_to_truncation(tile: int, big: bool) -> None:
    own = config.gram_config("float32", 2, tile, big, 9)
    steps = own.chunk // 16
    assert Fraction(95, 10000) < steps * UNIT / (2 * LIMIT**2) < Fraction(1, 100)
    assert Fraction(48, 1000) < steps * LOST[16] * UNIT / (2 * LIMIT**2) < Fraction(49, 1000)


def test_the_limit_is_the_devices_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch._native, "has_cuda_kernels", lambda: True)  # also where nvcc was not there
    select_backend.cache_clear()
    assert FLOAT32_GRAM_MIN_RTOL < CUDA_FLOAT32_GRAM_MIN_RTOL < 1e-2  # the tracker's default
    for rtol, cpu, cuda in ((8.2e-3, False, False), (9e-3, True, False), (1e-2, True, True)):
        assert float32_sums_serve(rtol, "cpu") == cpu
        assert float32_sums_serve(rtol, "cuda") == cuda
        plan = select_backend("near_rank", torch.bfloat16, 4096, 64, rtol, device="cuda")
        assert plan.gram == ("float32" if cuda else "float64")
    select_backend.cache_clear()


@pytest.mark.parametrize(
    ("device", "rtol", "float32"),
    [("cpu", 9e-3, True), ("cuda", 9e-3, False), ("cuda", 1e-2, True), ("cpu", 8e-3, False)],
)
def test_a_site_sums_as_its_device_allows(
    device: str, rtol: float, float32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    add = Sums.add
    monkeypatch.setattr(dispatch, "device_kind", lambda A: device)
    monkeypatch.setattr(Sums, "add", lambda *a, **kw: [asked.append(kw["float32_sums"]), add(*a, **kw)])
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    with RankTracker(model, rtol=rtol) as tracker:
        for _ in range(2):
            model(torch.randn(16, 8))
            tracker.step()
    assert asked == [float32] * 2


def rows(rng: np.random.Generator, number: int, dtype: torch.dtype) -> list[Fraction]:
    """Non-negative entries of one of several spreads, as the type has them."""
    spread = rng.choice([0.1, 2.0, 8.0])
    values = torch.from_numpy(2.0 ** (-np.abs(rng.standard_normal(number)) * spread))
    values[0] = 1
    return [Fraction(float(v)) for v in values.to(dtype)]


def lost_of(found: Fraction, products: Sequence[Fraction]) -> Fraction:
    """Error of a sum in units of it."""
    exact = sum(products, Fraction(0))
    return abs(exact - found) / exact / UNIT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_of_16_bit_products_loses_no_more_than_stated(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = (rows(rng, 256, dtype) for _ in range(2))
        products = [v * w for v, w in zip(x, y, strict=True)]
        assert lost_of(cores.chain(Fraction(0), products, 16), products) <= 16 * LOST[16]


def test_a_sum_of_16_bit_products_can_lose_most_of_what_is_stated() -> None:
    small = Fraction(float(torch.tensor(0.99 * 2.0**-12.5).bfloat16()))
    products = [Fraction(1)] + [small**2] * 255
    found = cores.chain(Fraction(0), products, 16)
    assert found == 1
    assert 60 < lost_of(found, products) <= 16 * LOST[16]


def test_bfloat16_products_are_truncated_once_a_step_unless_small() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        # The last of 2⁸ sums is below 2⁹ of the smallest: no product has bits that aligning cuts off.
        x = [Fraction(float(v)) for v in torch.from_numpy(rng.uniform(1, 2**0.25, 256)).bfloat16()]
        products = [v * v for v in x]
        assert lost_of(cores.chain(Fraction(0), products, 16), products) <= 16


def test_a_sum_of_float32_products_loses_no_more_than_stated() -> None:
    own = config.gram_config("float32", 4, 64, True, 9)
    block, stated = own.block_depth(64, config.SIDE_ALIGNED), units_of_float32(32, 64)
    rng = np.random.default_rng(2)
    for _ in range(10):
        x, y = (rows(rng, own.chunk, torch.float32) for _ in range(2))
        products = [v * w for v, w in zip(x, y, strict=True)]
        assert lost_of(cores.sum_of_float32(x, y, block, own.chunk), products) <= stated
    small = Fraction(float(np.float32(0.99 * 2.0**-12.5)))
    x = [Fraction(1)] + [small] * (block - 1)
    x += x
    products = [v * v for v in x]
    lost = lost_of(cores.sum_of_float32(x, x, block, own.chunk), products)
    assert 7 < lost <= stated


@pytest.mark.gpu
@pytest.mark.parametrize("n", [64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sums_of_a_gpu_lose_no_more_than_stated(dtype: torch.dtype, n: int) -> None:
    stated = float(units_of_float32(32, 64) if dtype == torch.float32 else 16 * LOST[16])
    if ON_GPU and torch.cuda.get_device_capability()[0] == 8:
        stated *= 2  # half of the products a step, one bit less
    inputs = [random(2048, n, dtype=dtype).relu()]
    for lost_from in (24, 25, 26, 27):
        A = torch.full((2048, n), 0.99 * 2.0 ** (-lost_from / 2), dtype=dtype, device=DEVICE)
        A[::256] = 1
        inputs.append(A)
    for A in inputs:
        X = A.double().cpu()
        exact = X.mT @ X
        G = torch.ops.bsgap._feature_gram(A, False, True)[0].cpu()
        assert float(((G - exact).abs() / exact).max()) <= stated * float(UNIT)


@pytest.mark.skipif(os.environ.get("BSGAP_VIRTUAL_GPU") != "1", reason="runs in test_virtual_gpu.py")
def test_the_error_of_device_sums_is_measured(tmp_path: Path) -> None:
    bench = run_path(str(Path(__file__).resolve().parents[1] / "benchmarks" / "gram_error.py"))
    path = tmp_path / "gram_error-cuda.json"
    result = bench["measure_device"]("cpu", path, shapes=((600, 16),))
    assert json.loads(path.read_text(encoding="utf-8")) == result
    assert len(result["rows"]) == 10
    for row in result["rows"]:
        for name in ("float32", "bfloat16", "float16"):
            # The interpreter rounds to nearest: half a unit a product, of which a warp adds 128 in a chain.
            assert row[name] < 128 * 2.0**-24
            assert row["band"][name] == row[name] / (2 * CUDA_FLOAT32_GRAM_MIN_RTOL**2)
    lost = {row["family"]: row["float32"] for row in result["rows"]}
    assert lost["products below 2^-24"] > 10 * lost["gaussian"] > 0
