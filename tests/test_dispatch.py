"""The limits of the dispatcher stand on a committed measurement."""

from __future__ import annotations

import json
from pathlib import Path

from bsgap_kernels.dispatch import FLOAT32_GRAM_MIN_RTOL, FLOAT64_GRAM_MIN_RTOL

RESULT = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "gram_error.json"


def test_the_band_around_the_threshold_stays_under_one_percent() -> None:
    measured = json.loads(RESULT.read_text(encoding="utf-8"))
    cheap = {"float32": FLOAT32_GRAM_MIN_RTOL, "bfloat16": FLOAT32_GRAM_MIN_RTOL}
    limits = cheap | {"float64": FLOAT64_GRAM_MIN_RTOL}
    assert measured["rtol_limits"] == limits
    assert len(measured["rows"]) >= 20
    for name, limit in limits.items():
        worst = max(row[name] for row in measured["rows"])
        assert worst / (2 * limit**2) < 0.01


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
