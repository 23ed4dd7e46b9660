"""The limits of the dispatcher stand on a committed measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bsgap_kernels.dispatch import (
    FLOAT32_GRAM_MIN_RTOL,
    FLOAT64_GRAM_MIN_RTOL,
    MAX_FACTORISATIONS,
    PROBED_MIN_SIDE,
    TRIDIAGONAL_SIDE,
)

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
RESULT = RESULTS / "gram_error.json"


def test_the_band_around_the_threshold_stays_under_one_percent() -> None:
    measured = json.loads(RESULT.read_text(encoding="utf-8"))
    cheap = {"float32": FLOAT32_GRAM_MIN_RTOL, "bfloat16": FLOAT32_GRAM_MIN_RTOL}
    limits = cheap | {"float64": FLOAT64_GRAM_MIN_RTOL}
    assert measured["rtol_limits"] == limits
    assert len(measured["rows"]) >= 20
    for name, limit in limits.items():
        worst = max(row[name] for row in measured["rows"])
        assert worst / (2 * limit**2) < 0.01


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
    import numpy as np

    from bsgap_kernels import _core

    worst = json.loads(RESULT.read_text(encoding="utf-8"))["largest_eta"]
    A = np.random.default_rng(1).standard_normal((256, 32), dtype=np.float32)
    exact = A.astype(np.longdouble).T @ A.astype(np.longdouble)
    top = np.linalg.eigvalsh(exact.astype(np.float64))[-1]
    for name, float32 in (("float32", True), ("float64", False)):
        error = (_core.gram(A, float32=float32)["gram"] - exact).astype(np.float64)
        assert np.linalg.norm(error, 2) / top <= 2 * worst[name]
