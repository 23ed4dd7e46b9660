"""The limits of the dispatcher stand on a committed measurement."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest
import torch

from bsgap_kernels import _core
from bsgap_kernels.dispatch import (
    CUDA_FLOAT32_GRAM_MIN_RTOL,
    FLOAT32_GRAM_MIN_RTOL,
    MAX_FACTORISATIONS,
    PROBED_MIN_SIDE,
    TRIDIAGONAL_SIDE,
    float64_gram_min_rtol,
)

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
RESULT = RESULTS / "gram_error.json"


def test_the_band_around_the_threshold_stays_under_one_percent() -> None:
    measured = json.loads(RESULT.read_text(encoding="utf-8"))
    assert len(measured["rows"]) >= 20
    for row in measured["rows"]:
        for name in ("float32", "bfloat16", "float64"):
            limit = float64_gram_min_rtol(row["m"], row["n"]) if name == "float64" else FLOAT32_GRAM_MIN_RTOL
            assert row["band"][name] == row[name] / (2 * limit**2) < 0.01


def test_the_searches_found_nothing_beyond_what_is_proven() -> None:
    found = json.loads(RESULT.read_text(encoding="utf-8"))["searches"]
    assert {s["sums"] for s in found} == {"float32", "bfloat16", "float64"}
    for s in found:
        if s["non_negative"]:
            assert s["displacement"] < (0.005 if s["sums"] == "float64" else 0.01)
    # Of both signs no such bound is proven, and the page that says so has an example.
    assert max(s["displacement"] for s in found if not s["non_negative"]) > 0.1


def test_a_search_finds_again_what_is_committed() -> None:
    found = json.loads(RESULT.read_text(encoding="utf-8"))["searches"]
    bench = run_path(str(RESULTS.parent / "gram_error.py"))
    for s in found:
        if s["columns"] > 8 or s["m"] > 5000:
            continue
        theta = np.array([[float.fromhex(x) for x in row] for row in s["theta"]])
        again = bench["displacement"](theta, s["sums"], s["m"], s["non_negative"])
        assert again == pytest.approx(s["displacement"], rel=0.2)  # other instructions add in other orders


def exact_limit(rows: int, side: int) -> tuple[Fraction, Fraction]:
    """γ_c by its formula, with chunks of 256 rows in at most 16 slabs counted anew, and 2·d at the limit."""
    slabs = 1
    if side <= 512:
        slabs = max(1, min(16, rows // max(1024, 8 * side)))
        slabs = 1 if slabs < 4 and side > 128 else slabs
    each = -(-rows // slabs)
    c = min(256, rows) + -(-each // 256) + slabs + 2
    unit = Fraction(c, 2**53)
    return unit / (1 - unit), Fraction(float64_gram_min_rtol(rows, side)) ** 2


@pytest.mark.parametrize("side", [1, 7, 64, 128, 129, 512, 513, 2000])
@pytest.mark.parametrize("rows", [2000, 4096, 65536, 10**6, 10**8])
def test_the_limit_of_float64_sums_leaves_half_a_percent(rows: int, side: int) -> None:
    gamma, limit_squared = exact_limit(rows, side)
    assert gamma / (2 * limit_squared) == pytest.approx(0.005, rel=1e-12)
    assert float64_gram_min_rtol(side, rows) == float64_gram_min_rtol(rows, side)


def test_the_limit_of_float32_sums_leaves_one_percent() -> None:
    # Chains of 16 products, eight of them added up: 16 + 7 roundings.
    unit = Fraction(16 + 128 // 16 - 1, 2**24)
    d = unit / (1 - unit) / (2 * Fraction(FLOAT32_GRAM_MIN_RTOL) ** 2)
    assert Fraction(99, 10000) < d < Fraction(1, 100)
    assert _core.FLOAT32_SUM_ROUNDINGS == 23
    # So probes, which prove float32 sums, serve wherever these do.
    assert _core.PROBED_MIN_RTOL <= FLOAT32_GRAM_MIN_RTOL <= CUDA_FLOAT32_GRAM_MIN_RTOL


def laid(layout: str, outer: int, inner: int, side: int, dtype: torch.dtype) -> torch.Tensor:
    """outer x inner rows of `side` features, without memory: a plan looks at strides only."""
    size = (outer, inner, side)
    strides = {
        "rows": (inner * side, side, 1),
        "columns": (inner, 1, outer * inner),
        "two levels": (2 * inner * side, side, 1),
        "images": (inner * side, 1, inner),
        "elements": (4 * inner * side, 3 * side, 3),
    }[layout]
    return torch.empty_strided(size, strides, dtype=dtype, device="meta")


@pytest.mark.parametrize("layout", ["rows", "columns", "two levels", "images", "elements"])
def test_the_limit_on_a_gpu_covers_every_plan_of_its_sums(layout: str) -> None:
    from bsgap_kernels.triton.plan import gram_plan
    from bsgap_kernels.triton.table import describe

    shapes = ((1, 2), (3, 40), (16, 130), (64, 5000), (200, 10**5), (64, 10**7), (2000, 2001))
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    for (side, depth), dtype, inner in itertools.product(
        shapes, dtypes, (1, 2, 3, 7, 8, 16, 31, 33, 64, 100)
    ):
        outer = -(-depth // inner)
        view = describe(laid(layout, outer, inner, side, dtype), batch=False)
        assert view is not None
        for processors in (1, 20, 132):
            plan = gram_plan(
                [view], precision="float64", features_side=False, sums=False, processors=processors,
                architecture=9,
            )  # fmt: skip
            unit = Fraction(plan.rows[0]["roundings"], 2**53)
            limit = Fraction(float64_gram_min_rtol(view.m, view.n, "cuda"))
            assert unit / (1 - unit) / (2 * limit**2) <= Fraction(501, 100000)


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_the_constants_stand_on_the_measured_crossovers(isa: str) -> None:
    measured = json.loads((RESULTS / f"crossovers-{isa}.json").read_text(encoding="utf-8"))
    assert measured["machine"]["instruction_set"] == isa
    assert measured["constants"] == {
        "TRIDIAGONAL_SIDE": TRIDIAGONAL_SIDE,
        "MAX_FACTORISATIONS": MAX_FACTORISATIONS,
        "PROBED_MIN_SIDE": PROBED_MIN_SIDE,
    }
    noise = 1.15  # and what the one set of constants costs either instruction set
    for row in measured["lanes"]:
        if row["side"] <= TRIDIAGONAL_SIDE:
            assert row["eight in lanes"] <= noise * row["eight by ldlt"], row
    for row in measured["thresholds"]:
        assert row[f"ldlt at {MAX_FACTORISATIONS}"] <= noise * row["eigvalsh"], row
        assert row[f"ldlt at {2 * MAX_FACTORISATIONS}"] >= row["eigvalsh"] / noise, row
    for row in measured["certificates"]:
        pays = row["side"] >= PROBED_MIN_SIDE
        assert (
            row["probed"] <= noise * row["rigorous"] if pays else row["rigorous"] <= noise * row["probed"]
        ), row


def test_the_accumulations_are_as_good_as_measured() -> None:
    # One shape of the study again, so that a change of the kernels that costs digits does not pass.
    worst = json.loads(RESULT.read_text(encoding="utf-8"))["largest_eta"]
    A = np.random.default_rng(1).standard_normal((256, 32), dtype=np.float32)
    exact = A.astype(np.longdouble).T @ A.astype(np.longdouble)
    top = np.linalg.eigvalsh(exact.astype(np.float64))[-1]
    for name, float32 in (("float32", True), ("float64", False)):
        error = (_core.gram(A, float32=float32)["gram"] - exact).astype(np.float64)
        assert np.linalg.norm(error, 2) / top <= 2 * worst[name]
