"""docs/metrics.md: every metric is on it, and its table is that of the committed result."""

from __future__ import annotations

import json

import discrimination
import pytest

from bsgap_kernels.tracking import METRICS


def test_every_metric_is_described() -> None:
    text = discrimination.PAGE.read_text(encoding="utf-8")
    assert [name for name in METRICS if f"`{name}`" not in text] == []


def test_the_table_is_that_of_the_result() -> None:
    result = json.loads(discrimination.RESULT.read_text(encoding="utf-8"))
    page = {discrimination.PAGE: discrimination.PAGE.read_text(encoding="utf-8")}
    assert discrimination.written(result) == page
    first = next(iter(result["models"].values()))
    site = next(iter(first["readings"][0]))
    first["readings"][0][site]["stable_rank"] *= 2
    assert discrimination.written(result) != page


def test_what_is_constant_and_saturated() -> None:
    readings = [{"a": {"near_rank@0.1": value, "k": 8, "stable_rank": 2.0 + place}, "b": {"k": 8}}
                for place, value in enumerate((8, 8, 7.9))]  # fmt: skip
    found = {"readings": readings}
    assert discrimination.judged(found, "near_rank@0.1") == pytest.approx((1.0, 1.0, 0.0125))
    assert discrimination.judged(found, "stable_rank") == pytest.approx((0.0, 0.0, 0.5))
